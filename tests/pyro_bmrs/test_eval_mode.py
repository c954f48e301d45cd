import pytest
from torch import nn

from pyro_bmrs.eval_mode import evaluating


def test_each_module_gets_its_own_mode_back():
    net = nn.Sequential(nn.BatchNorm1d(2), nn.Dropout()).train()
    net[0].eval()  # frozen
    with evaluating(net):
        assert not any(module.training for module in net.modules())
    with pytest.raises(ZeroDivisionError), evaluating(net):
        1 / 0  # noqa: B018
    assert [module.training for module in net.modules()] == [True, False, True]
