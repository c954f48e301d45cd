"""A family of its own in one file: fitted, pruned, compacted and inspected like the paper's."""

import math

import pytest
import torch
from nets import blobs
from pyro.distributions import Beta
from pyro.infer import TraceMeanField_ELBO
from torch import nn
from torch.distributions import kl_divergence

import pyro_bmrs as bmrs


def classifier(seed=0, **model_arguments):
    torch.manual_seed(seed)
    noise = bmrs.MultiplicativeNoise(32, prior=Beta(1.0, 3.0))
    model = bmrs.NoisyNetwork(nn.Sequential(nn.Linear(6, 32), nn.ReLU(), noise, nn.Linear(32, 3)), **model_arguments)
    return model, bmrs.BetaGuide(model)


def test_equals_the_stock_elbo():
    model, guide = classifier(num_data=200)
    x, y = blobs()
    losses = []
    for elbo in (TraceMeanField_ELBO(), bmrs.MeanFieldELBO("batch")):
        torch.manual_seed(1)
        losses.append(elbo.differentiable_loss(model, guide, x, y))
    torch.testing.assert_close(losses[0], losses[1])
    torch.testing.assert_close(guide.kl(), kl_divergence(guide.flat_posterior(), Beta(1.0, 3.0)).sum())


@pytest.mark.slow
def test_fit_prunes_with_the_evidence_of_its_own_spike():
    x, y = blobs(600)
    model, guide = classifier()
    result = bmrs.fit(
        model, guide, (x[:500], y[:500]), (x[500:], y[500:]), criterion=bmrs.BMRS_N(prior_log_odds=math.log(3)),
        epochs=40, fine_tune_epochs=20, batch_size=50, lr=1e-2, posterior_lr=0.2, seed=0, progress=False,
    )  # fmt: skip
    small = bmrs.compact(model, guide, result.masks, x[:4])
    assert result.compression > 0.2
    assert result.history[-1]["accuracy_validation"] > 0.9
    torch.testing.assert_close(small(x), bmrs.predict(model, guide, x, result.masks), rtol=0, atol=1e-5)
    for criterion in (bmrs.SNR(), bmrs.PosteriorMean()):
        context = bmrs.PruningContext(model, guide, bmrs.find_structures(model.net, x[:2]), x, y)
        assert bool(torch.isfinite(criterion.scores(context)["2.theta"]).all())


def test_evidence_is_that_of_the_betas():
    _, guide = classifier()
    delta_f = bmrs.evidence_changes(guide)["2.theta"]
    posterior, prior = guide.posterior()["2.theta"], guide.prior()["2.theta"]
    reduced = bmrs.spike(prior)
    draws = posterior.sample((20_000,)).double()
    ratio = torch.exp(reduced.log_prob(draws) - prior.log_prob(draws))
    assert torch.isfinite(delta_f).all()
    torch.testing.assert_close(delta_f, bmrs.evidence_change(posterior, prior, reduced))
    assert (delta_f < 0).all()  # a posterior near one is no spike at zero
    assert ratio.mean() < 1


def test_figures_and_arviz_take_it():
    _, guide = classifier()
    assert bmrs.plot_forest(guide) is not None
    assert bmrs.to_arviz(guide, draws=10).posterior["2.theta"].shape == (1, 10, 32)


def test_other_priors_are_refused():
    net = nn.Sequential(nn.Linear(2, 3), bmrs.MultiplicativeNoise(3), nn.Linear(3, 2))
    with pytest.raises(TypeError, match=r"LogUniform prior, but BetaGuide is for Beta ones"):
        bmrs.BetaGuide(bmrs.NoisyNetwork(net))
    with pytest.raises(ValueError, match="init_mean must lie inside"):
        bmrs.BetaGuide(classifier()[0], init_mean=1.0)
