import pytest

from analysis.common.extras import require


def test_what_is_missing_is_named_with_its_extra():
    require("demo", "tyro")
    with pytest.raises(ImportError, match=r"this needs no_such_module: pip install 'pyro-bmrs\[demo\]'"):
        require("demo", "tyro", "no_such_module")
