"""Noise priors other than the paper's: KL, guide, ELBO, evidence and surgery follow without an edit."""

import pytest
import torch
from nets import blobs
from pyro.infer import TraceMeanField_ELBO
from torch import nn
from torch.distributions import kl_divergence

import pyro_bmrs as bmrs

PRIORS = {
    "log-normal": bmrs.TruncatedLogNormal(-3.0, 2.0),
    "other bounds": bmrs.LogUniform(-10.0, 1.0),
    "each its own": bmrs.TruncatedLogNormal(-torch.rand(16), 1 + torch.rand(16), -8.0, 0.5),
}


def classifier(*priors):
    torch.manual_seed(0)
    layers, width = [], 6
    for prior in priors:
        layers += [nn.Linear(width, 16), nn.ReLU(), bmrs.MultiplicativeNoise(16, prior=prior)]
        width = 16
    model = bmrs.NoisyNetwork(nn.Sequential(*layers, nn.Linear(width, 3)), num_data=200, kl_weight=0.5)
    return model, bmrs.TruncatedLogNormalGuide(model, init_loc=-0.5, init_log_scale=-1.0)


@pytest.mark.parametrize("names", [(name,) for name in PRIORS] + [tuple(PRIORS), ("other bounds", "log-normal")])
def test_elbo_equals_the_stock_one(names):
    model, guide = classifier(*(PRIORS[name] for name in names))
    x, y = blobs()
    expected = sum(kl_divergence(q, guide.prior()[site]).sum() for site, q in guide.posterior().items())
    torch.testing.assert_close(guide.kl(), expected)
    results = []
    for elbo in (TraceMeanField_ELBO(), bmrs.MeanFieldELBO("batch")):
        torch.manual_seed(1)
        loss = elbo.differentiable_loss(model, guide, x, y)
        results.append((loss, torch.autograd.grad(loss, [*model.parameters(), *guide.parameters()])))
    torch.testing.assert_close(*results)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::pyro_bmrs.UnreliableEvidenceWarning")  # of priors far from their bound
@pytest.mark.parametrize("name", PRIORS)
def test_fit_prune_and_compact(name):
    x, y = blobs()
    model, guide = classifier(PRIORS[name])
    result = bmrs.fit(model, guide, (x, y), epochs=20, fine_tune_epochs=3, batch_size=50, seed=0, progress=False)
    small = bmrs.compact(model, guide, result.masks, x[:4])
    torch.testing.assert_close(small(x), bmrs.predict(model, guide, x, result.masks), rtol=0, atol=1e-5)
    assert bool(torch.isfinite(torch.cat(list(bmrs.evidence_changes(guide).values()))).all())
    draws = guide.draw((100,))["2.theta"]
    assert bool(((draws >= torch.exp(guide.log_low)) & (draws <= torch.exp(guide.log_high))).all())
