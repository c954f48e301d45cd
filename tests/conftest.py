"""Every test starts from the same seed, an empty parameter store and Pyro's validation on."""

import matplotlib
import pyro
import pytest
import torch
from hypothesis import settings

matplotlib.use("Agg")
torch.set_num_threads(1)
settings.register_profile("bmrs", deadline=None, derandomize=True, max_examples=50)
settings.load_profile("bmrs")


@pytest.fixture(autouse=True)
def fresh_start():
    torch.manual_seed(0)
    pyro.clear_param_store()
    pyro.enable_validation(True)


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
