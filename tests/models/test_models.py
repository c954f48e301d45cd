import pytest
import torch

import pyro_bmrs as bmrs
from models import lenet5, mlp


@pytest.mark.parametrize("channels", [1, 3])
def test_lenet5_has_the_papers_widths(channels):
    net = lenet5(in_channels=channels)
    assert net(torch.zeros(2, channels, 32, 32)).shape == (2, 10)
    sizes = bmrs.NoisyNetwork(net).sizes
    assert list(sizes.values()) == [6 * channels, 16 * channels, 120 * channels, 84 * channels]


def test_lenet5_has_the_known_number_of_parameters():
    assert bmrs.count_parameters(lenet5()) == 61_706


def test_mlp_has_noise_after_each_activation():
    net = mlp(20, hidden=7, layers=3, classes=4)
    assert net(torch.zeros(2, 4, 5)).shape == (2, 4)
    assert bmrs.NoisyNetwork(net).sizes == {f"fc{i}_noise.theta": 7 for i in (1, 2, 3)}
    assert bmrs.count_parameters(net) == 20 * 7 + 7 + 2 * (7 * 7 + 7) + 7 * 4 + 4


def test_noise_is_the_identity_outside_a_model():
    net = lenet5().eval()
    x = torch.randn(2, 1, 32, 32)
    plain = torch.nn.Sequential(*(m for m in net if not isinstance(m, bmrs.MultiplicativeNoise)))
    assert torch.equal(net(x), plain(x))
