"""Statistics of batch norms: what noise has made of them, and that fine-tuning without noise sets them right."""

import pytest
import torch
from torch import nn

import pyro_bmrs as bmrs

X = torch.randn(512, 8, generator=torch.Generator().manual_seed(0))
Y = (X[:, 0] * X[:, 1] > 0).long()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::pyro_bmrs.FitWarning")
def test_fine_tuning_recalibrates_them():
    def off(fine_tune_epochs):
        """Return by how much the running variance exceeds that of the network without noise."""
        torch.manual_seed(0)
        net = nn.Sequential(
            nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 2)
        )
        structures = bmrs.find_structures(net, X[:2]).select(names="0")
        model = bmrs.NoisyNetwork(bmrs.attach_noise(net, structures))
        guide = bmrs.TruncatedLogNormalGuide(model, init_loc=-0.5)
        with torch.no_grad():
            guide.log_scale.fill_(0.0)
        still = {"lr": 1e-8, "posterior_lr": 1e-8, "criterion": None, "seed": 0, "progress": False}
        bmrs.fit(
            model,
            guide,
            (X, Y),
            epochs=10,
            fine_tune_epochs=fine_tune_epochs,
            batch_size=64,
            granularity="example",
            **still,
        )
        small = bmrs.compact(model, guide, None, X[:2])
        with torch.no_grad():
            true = small[:3](X).var(0)
        return float((small[3].running_var / true).mean()) - 1

    assert off(0) > 0.1
    assert abs(off(10)) < 0.05
