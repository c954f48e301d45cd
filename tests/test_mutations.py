import pytest
from mutations import MUTATIONS, ROOT


@pytest.mark.parametrize("mutation", MUTATIONS, ids=[f"{each.path}-{i}" for i, each in enumerate(MUTATIONS)])
def test_what_is_mutated_is_there_once(mutation):
    assert (ROOT / "pyro_bmrs" / mutation.path).read_text(encoding="utf-8").count(mutation.before) == 1
    assert mutation.after != mutation.before
