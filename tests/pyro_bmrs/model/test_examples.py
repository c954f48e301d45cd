"""Noise with a draw for each example stays with its example, wherever a network puts the batch."""

import pytest
import torch
from torch import nn

import pyro_bmrs as bmrs


class TimeFirst(nn.Module):
    """Works on (time, batch, width) inside; as many steps as examples."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(3, 8)
        self.encoder = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0)
        self.head = nn.Linear(8, 2)

    def forward(self, x):
        return self.head(self.encoder(self.embed(x).transpose(0, 1)).mean(0))


class Windows(nn.Module):
    """Folds the parts of a sequence into the batch."""

    def __init__(self):
        super().__init__()
        self.embed, self.inner, self.head = nn.Linear(3, 8), nn.Linear(8, 8), nn.Linear(8, 2)

    def forward(self, x):
        batch, length, _ = x.shape
        h = self.embed(x).relu().reshape(batch * 2, length // 2, -1)
        return self.head(self.inner(h).relu().reshape(batch, length, -1).mean(1))


class Residual(nn.Module):
    """A residual network on images."""

    def __init__(self):
        super().__init__()
        self.stem, self.conv = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, 2)

    def forward(self, x):
        h = self.stem(x).relu()
        return self.head((h + self.conv(h).relu()).mean((2, 3)))


CASES = {"time first": (TimeFirst, (4, 3)), "windows": (Windows, (4, 3)), "residual": (Residual, (3, 5, 5))}


@pytest.mark.parametrize("name", CASES)
def test_each_example_sees_its_own_noise(name):
    make, shape = CASES[name]
    torch.manual_seed(0)
    net, x = make().eval(), torch.randn(4, *shape)
    structures = bmrs.find_structures(net, x[:3])
    model = bmrs.NoisyNetwork(bmrs.attach_noise(net, structures))
    for i in range(len(x)):
        ones = {site: torch.ones(len(x), size) for site, size in model.sizes.items()}
        other = {site: theta.clone() for site, theta in ones.items()}
        for theta in other.values():
            theta[i] = torch.rand(theta.shape[1])
        with torch.no_grad():
            moved = (model.run(x, ones) - model.run(x, other)).abs().amax(1)
        assert (moved > 1e-6).tolist() == [j == i for j in range(len(x))]
