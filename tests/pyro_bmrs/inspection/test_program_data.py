"""Any Pyro program fitted by SVI, in ArviZ's container."""

import warnings

import arviz
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal

import pyro_bmrs as bmrs

X = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))
Y = X @ torch.tensor([1.0, -2.0, 0.0]) + 0.5 * torch.randn(40, generator=torch.Generator().manual_seed(1))


def regression(x, y):
    w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    sigma = pyro.sample("sigma", dist.HalfNormal(1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(x @ w, sigma), obs=y)


def by_hand(x, y):
    pyro.sample("w", dist.Normal(torch.tensor([1.0, -2.0, 0.0]), 0.1).to_event(1))
    pyro.sample("sigma", dist.LogNormal(-0.7, 0.1))


@pytest.fixture(autouse=True)
def _clear():
    pyro.clear_param_store()
    torch.manual_seed(0)


@pytest.mark.slow
@pytest.mark.parametrize("make", [AutoNormal, AutoMultivariateNormal, lambda model: by_hand])
def test_groups_are_what_guide_and_model_say(make):
    guide = make(regression)
    if guide is not by_hand:
        svi = SVI(regression, guide, pyro.optim.Adam({"lr": 0.05}), Trace_ELBO())
        for _ in range(400):
            svi.step(X, Y)
    data = bmrs.guide_to_arviz(regression, guide, X, Y, draws=100)
    assert set(data.posterior.data_vars) == {"w", "sigma"} == set(data.prior.data_vars)
    w, sigma = data.posterior["w"].values[0], data.posterior["sigma"].values[0]
    assert w.shape == (100, 3)
    assert np.abs(w.mean(0) - [1, -2, 0]).max() < 0.3
    expected = dist.Normal(X @ torch.tensor(w).T, torch.tensor(sigma)).log_prob(Y.unsqueeze(-1)).T.numpy()
    np.testing.assert_allclose(data.log_likelihood["y"].values[0], expected, rtol=1e-4, atol=1e-4)
    prior = dist.Normal(0.0, 1.0).log_prob(torch.tensor(w)).sum(-1) + dist.HalfNormal(1.0).log_prob(torch.tensor(sigma))
    np.testing.assert_allclose(data.sample_stats["lp"].values[0], expected.sum(-1) + prior.numpy(), rtol=1e-4)
    assert np.isfinite(data.sample_stats["log_q"].values).all()
    assert data.posterior_predictive["y"].shape == (1, 100, 40)
    residuals = data.posterior_predictive["y"].values[0] - (torch.tensor(w) @ X.T).numpy()
    assert residuals.std() == pytest.approx(sigma.mean(), rel=0.1)
    np.testing.assert_array_equal(data.observed_data["y"].values, Y.numpy())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert np.isfinite(arviz.loo(data).elpd_loo)
        assert len(arviz.summary(data, kind="stats")) == 4


def test_our_own_models_and_guides_are_programs_too():
    net = torch.nn.Sequential(
        torch.nn.Linear(3, 5), torch.nn.Tanh(), bmrs.MultiplicativeNoise(5), torch.nn.Linear(5, 2)
    )
    model = bmrs.NoisyNetwork(net, num_data=40)
    data = bmrs.guide_to_arviz(model, bmrs.TruncatedLogNormalGuide(model), X, (Y > 0).long(), draws=5)
    assert data.posterior["2.theta"].shape == (1, 5, 5)
    assert data.log_likelihood["obs"].shape == (1, 5, 40)


def test_draws_are_reproducible_and_the_random_state_is_left_alone():
    torch.manual_seed(1)
    a, b = (bmrs.guide_to_arviz(regression, by_hand, X, Y, draws=4, seed=7) for _ in range(2))
    after = torch.rand(2)
    torch.manual_seed(1)
    assert torch.equal(after, torch.rand(2))
    assert (a.posterior["w"] == b.posterior["w"]).all()


def test_programs_without_data_and_with_factors():
    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.factor("pull", -z.square())

    data = bmrs.guide_to_arviz(model, lambda: pyro.sample("z", dist.Normal(0.0, 0.5)), draws=6)
    assert data.posterior["z"].shape == (1, 6)
    assert not hasattr(data, "observed_data")
    z = data.posterior["z"].values[0]
    lp = dist.Normal(0.0, 1.0).log_prob(torch.tensor(z)).numpy() - z**2
    np.testing.assert_allclose(data.sample_stats["lp"].values[0], lp, rtol=1e-5)


def test_what_does_not_fit_is_refused():
    weights = dist.Normal(torch.zeros(3), 1.0).to_event(1)
    with pytest.raises(ValueError, match="no site 'sigma'"):
        bmrs.guide_to_arviz(regression, lambda x, y: pyro.sample("w", weights), X, Y)
    with pytest.raises(ValueError, match="do not run on the arguments"):
        bmrs.guide_to_arviz(regression, by_hand, X, "y")
    with pytest.raises(TypeError, match="guide must be a Pyro program"):
        bmrs.guide_to_arviz(regression, 3, X, Y)
    with pytest.raises(ValueError, match="draws must be"):
        bmrs.guide_to_arviz(regression, by_hand, X, Y, draws=0)
