import subprocess
import sys

import pytest

import pyro_bmrs as bmrs

HEAVY = ("lightning_fabric", "matplotlib", "arviz", "scipy", "sklearn", "joblib", "h5py", "torch._dynamo", "pandas")


@pytest.mark.slow
def test_what_is_slow_to_import_is_imported_when_used():
    program = (
        "import sys, torch, pyro; before = set(sys.modules); import pyro_bmrs; "
        f"print([name for name in {HEAVY} if name in sys.modules and name not in before])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_public_name_is_there():
    assert all(getattr(bmrs, name) is not None for name in bmrs.__all__)
    assert bmrs.plot_history.__module__ == "pyro_bmrs.inspection.plots"


def test_no_other_name_is():
    with pytest.raises(AttributeError, match="no attribute 'plot_nothing'"):
        bmrs.plot_nothing  # noqa: B018
