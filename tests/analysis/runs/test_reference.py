import pytest
import torch
from nets import build
from torch.distributions import kl_divergence

import pyro_bmrs as bmrs
from analysis.runs.reference import reference_compression, reference_kl_weights
from models import lenet5, mlp


def test_biases_stay_and_the_posterior_counts():
    net = mlp(20, hidden=10, layers=2, classes=3)
    total = 20 * 10 + 10 + 10 * 10 + 10 + 10 * 3 + 3 + 2 * 20
    left = 20 * 4 + 10 + 4 * 5 + 10 + 5 * 3 + 3 + 2 * 9
    assert reference_compression(net, {"fc1_noise": 4, "fc2_noise": 5}) == pytest.approx(1 - left / total)
    assert reference_compression(net, {"fc1_noise": 10, "fc2_noise": 10}) == 0


def test_inputs_behind_flattened_maps_stay():
    net = lenet5(1)
    kept = {"conv1_noise": 4, "conv2_noise": 3, "fc1_noise": 17, "fc2_noise": 10}
    weights = 4 * 25 + 3 * 4 * 25 + 17 * 400 + 10 * 17 + 10 * 10
    left = weights + 6 + 16 + 120 + 84 + 10 + 2 * sum(kept.values())
    assert reference_compression(net, kept) == pytest.approx(1 - left / (61_706 + 2 * 226))


def test_the_references_loss_averages_over_structures_and_layers():
    model, guide, _ = build("lenet5", dtype=torch.float64)
    plain = {site: kl_divergence(q, guide.prior()[site]) for site, q in guide.posterior().items()}
    weighted = bmrs.NoisyNetwork(model.net, num_data=500, kl_weight=reference_kl_weights(model.net, 500))
    again = bmrs.TruncatedLogNormalGuide(weighted).double()
    again.load_state_dict(guide.state_dict())
    torch.testing.assert_close(again.kl() / 500, torch.stack([kl.mean() for kl in plain.values()]).mean())
