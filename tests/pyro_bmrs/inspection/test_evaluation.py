"""How good predictions are: at the posterior mean, and averaged over draws."""

import math

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from nets import blobs, small_classifier
from sklearn.metrics import brier_score_loss, log_loss
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import pyro_bmrs as bmrs


def spread_out(guide, log_scale=0.0):
    """Make draws of the noise differ."""
    with torch.no_grad():
        guide.loc.fill_(-0.5)
        guide.log_scale.fill_(log_scale)


def probabilities(model, guide, x, draws, seed=0):
    """Return the probabilities of each draw, by the network itself."""
    torch.manual_seed(seed)
    thetas = guide.draw((draws,))
    with torch.no_grad():
        return torch.stack(
            [model.run(x, {site: t[i] for site, t in thetas.items()}).double().softmax(-1) for i in range(draws)]
        )


def test_scores_are_those_of_the_textbook():
    model, guide = small_classifier()
    spread_out(guide)
    x, y = blobs(200)
    found = bmrs.evaluate(model, guide, (x, y), draws=30)
    drawn = probabilities(model.eval(), guide, x, 30)
    at_mean = bmrs.predict(model, guide, x).double().softmax(-1)
    for scores, p in ((found.at_mean, at_mean), (found.over_draws, drawn.mean(0))):
        assert scores.log_likelihood == pytest.approx(-log_loss(y, p.numpy(), labels=[0, 1, 2]), rel=1e-5)
        assert scores.accuracy == pytest.approx(float((p.argmax(-1) == y).double().mean()))
        truth = nn.functional.one_hot(y, 3)
        assert scores.brier == pytest.approx(float((p - truth).square().sum(-1).mean()), rel=1e-5)
        assert scores.ece == pytest.approx(expected_calibration_error(p, y), rel=1e-5)
        assert scores.rmse is None
    log_p = drawn.gather(-1, y.expand(30, -1).unsqueeze(-1)).log()
    kl = float(guide.kl().detach())
    expected = float(log_p.mean()) - kl / 200
    assert found.elbo == pytest.approx(expected, rel=1e-5)
    assert (found.examples, found.draws, found.kl) == (200, 30, pytest.approx(kl))


def expected_calibration_error(p, y):
    """By the definition, bin by bin."""
    confidence, label = (each.numpy() for each in p.max(-1))
    right = label == y.numpy()
    total = 0.0
    for low in np.arange(15) / 15:
        inside = (confidence >= low) & (confidence < low + 1 / 15)
        if inside.any():
            total += inside.mean() * abs(right[inside].mean() - confidence[inside].mean())
    return total


def test_binary_labels_count_both_classes():
    net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), bmrs.MultiplicativeNoise(6), nn.Linear(6, 1))
    model = bmrs.NoisyNetwork(net, likelihood=lambda out: dist.Bernoulli(logits=out).to_event(1))
    guide = bmrs.TruncatedLogNormalGuide(model)
    x, y = torch.randn(100, 4), (torch.rand(100, 1) < 0.5).float()
    found = bmrs.evaluate(model, guide, (x, y), draws=5).at_mean
    p = bmrs.predict(model, guide, x).sigmoid().squeeze(-1)
    assert found.brier == pytest.approx(2 * brier_score_loss(y.squeeze(-1), p.double()), rel=1e-5)
    assert found.accuracy == pytest.approx(float(((p > 0.5) == (y.squeeze(-1) > 0.5)).double().mean()))
    assert found.log_likelihood == pytest.approx(-log_loss(y.squeeze(-1), p.double()), rel=1e-5)


def test_numbers_have_an_error_of_the_averaged_mean():
    net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), bmrs.MultiplicativeNoise(6), nn.Linear(6, 1))
    model = bmrs.NoisyNetwork(net, likelihood=lambda out: dist.Normal(out.squeeze(-1), 0.3))
    guide = bmrs.TruncatedLogNormalGuide(model)
    spread_out(guide)
    x, y = torch.randn(80, 4), torch.randn(80)
    found = bmrs.evaluate(model, guide, (x, y), draws=20)
    torch.manual_seed(0)
    thetas = guide.draw((20,))
    with torch.no_grad():
        means = torch.stack([model.run(x, {site: t[i] for site, t in thetas.items()}).squeeze(-1) for i in range(20)])
    assert found.over_draws.rmse == pytest.approx(float((means.mean(0) - y).square().mean().sqrt()), rel=1e-5)
    log_p = dist.Normal(means.double(), 0.3).log_prob(y.double()).logsumexp(0) - math.log(20)
    assert found.over_draws.log_likelihood == pytest.approx(float(log_p.mean()), rel=1e-5)
    assert (found.at_mean.accuracy, found.at_mean.ece, found.at_mean.brier) == (None, None, None)
    counts = bmrs.NoisyNetwork(net, likelihood=lambda out: dist.Poisson(out.squeeze(-1).exp()))
    assert (
        bmrs.evaluate(counts, bmrs.TruncatedLogNormalGuide(counts), (x, torch.ones(80)), draws=3).at_mean.rmse is None
    )


def test_any_data_a_table_and_a_state_left_alone():
    model, guide = small_classifier()
    x, y = blobs(60)
    model.train()
    torch.manual_seed(3)
    before = torch.rand(1)
    torch.manual_seed(3)
    a = bmrs.evaluate(model, guide, (x, y), draws=4)
    b = bmrs.evaluate(model, guide, DataLoader(TensorDataset(x, y), batch_size=11), draws=4)
    assert torch.equal(torch.rand(1), before)
    assert model.training
    assert a.over_draws.log_likelihood == pytest.approx(b.over_draws.log_likelihood)
    assert a.over_draws.reliability.labels.sum() == 60
    for word in ("60 examples", "accuracy", "brier", "ece", "ELBO"):
        assert word in str(a)
    assert "rmse" not in str(a)


def test_what_does_not_fit_is_refused():
    model, guide = small_classifier()
    x, y = blobs(20)
    with pytest.raises(ValueError, match="another model"):
        bmrs.evaluate(small_classifier()[0], guide, (x, y))
    with pytest.raises(ValueError, match="draws must be"):
        bmrs.evaluate(model, guide, (x, y), draws=0)
    with pytest.raises(ValueError, match="data"):
        bmrs.evaluate(model, guide, (x[:, :2], y))
