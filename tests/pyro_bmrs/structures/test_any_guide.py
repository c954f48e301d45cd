"""Guides of any kind: what they say of the noise, and everything that looks at it."""

import math
import warnings

import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import (
    AutoDelta,
    AutoDiagonalNormal,
    AutoGuideList,
    AutoIAFNormal,
    AutoLowRankMultivariateNormal,
    AutoMultivariateNormal,
    AutoNormal,
)
from torch import nn

import pyro_bmrs as bmrs

X = torch.randn(60, 4, generator=torch.Generator().manual_seed(0))
Y = (X[:, 0] > 0).long()
SITES = {"2.theta": 6, "5.theta": 4}


def make(prior=None):
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(4, 6), nn.Tanh(), bmrs.MultiplicativeNoise(6, prior),
        nn.Linear(6, 4), nn.Tanh(), bmrs.MultiplicativeNoise(4, prior), nn.Linear(4, 2),
    )  # fmt: skip
    return bmrs.NoisyNetwork(net, num_data=60)


def fitted(model, guide):
    pyro.clear_param_store()
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.02}), Trace_ELBO())
    for _ in range(5):
        svi.step(X, Y)
    return guide


def by_hand(x, y=None):
    for site, size in SITES.items():
        loc = pyro.param(f"{site}.loc", torch.linspace(-3, -1, size))
        pyro.sample(site, bmrs.TruncatedLogNormal(loc, torch.tensor(0.4), -20.0, 0.0).to_event(1))


def of_a_hierarchy(x, y=None):
    level = pyro.sample("level", dist.Normal(-2.0, 0.5), infer={"is_auxiliary": True})
    for site, size in SITES.items():
        posterior = bmrs.TruncatedLogNormal(level.expand(size), torch.tensor(1.0), -20.0, 0.0)
        pyro.sample(site, posterior.to_event(1))


class Stated:
    """A posterior that is no program."""

    def posterior(self):
        return {
            site: bmrs.TruncatedLogNormal(torch.full((n,), -2.0), torch.tensor(0.3), -20, 0)
            for site, n in SITES.items()
        }


AUTOGUIDES = (AutoNormal, AutoDiagonalNormal, AutoMultivariateNormal, AutoLowRankMultivariateNormal, AutoIAFNormal)


def guides_for(model):
    in_parts = AutoGuideList(model)
    in_parts.append(AutoDiagonalNormal(pyro.poutine.block(model, expose=["2.theta"])))
    in_parts.append(AutoNormal(pyro.poutine.block(model, expose=["5.theta"])))
    return {**{kind.__name__: kind(model) for kind in AUTOGUIDES}, "list": in_parts}


@pytest.mark.slow
@pytest.mark.parametrize("name", [*(kind.__name__ for kind in AUTOGUIDES), "list"])
def test_marginals_of_autoguides_are_those_of_their_draws(name):
    model = make()
    guide = fitted(model, guides_for(model)[name])
    posterior = bmrs.noise_posterior(model, guide, X, Y)
    torch.manual_seed(1)
    with torch.no_grad():
        draws = [guide(X, Y) for _ in range(1500)]
    for site, marginal in posterior.posterior().items():
        theta = torch.stack([each[site] for each in draws])
        error = theta.std(0) / math.sqrt(1500) + marginal.stddev / math.sqrt(1000)
        assert ((marginal.mean - theta.mean(0)).abs() < 4.5 * error + 1e-6).all()
        assert ((marginal.stddev / theta.std(0)).log().abs() < 0.25).all()
    joint = posterior.draw((3, 2))
    assert {site: theta.shape for site, theta in joint.items()} == {site: (3, 2, n) for site, n in SITES.items()}


@pytest.mark.slow
@pytest.mark.parametrize("kind", [AutoNormal, AutoMultivariateNormal, AutoDelta])
def test_an_autoguide_is_taken_by_everything_that_looks(kind):
    model = make()
    guide = fitted(model, kind(model))
    masks = {site: torch.arange(n) != 1 for site, n in SITES.items()}
    small = bmrs.compact(model, guide, masks, X[:2])
    assert torch.allclose(small(X), bmrs.predict(model, guide, X, masks), atol=1e-6)
    assert small[0].out_features == 5
    scores = bmrs.evaluate(model, guide, (X, Y), draws=10)
    assert 0 <= scores.over_draws.accuracy <= 1
    assert math.isfinite(scores.elbo)
    data = bmrs.to_arviz(model, guide, (X, Y), draws=30)
    assert data.posterior["2.theta"].shape == (1, 30, 6)
    assert math.isfinite(float(data.sample_stats["log_q"].sum())) or kind is AutoDelta
    context = bmrs.PruningContext(model, guide, bmrs.find_structures(model.net, X[:2]), X, Y)
    assert {site: each.shape for site, each in bmrs.PosteriorMean(0.5).removable(context).items()} == {
        site: (n,) for site, n in SITES.items()
    }
    assert bmrs.WeightNorm(bmrs.SNR(1.0)).removable(context).keys() == SITES.keys()
    if kind is AutoDelta:
        with pytest.raises(NotImplementedError, match="is a point mass"):
            bmrs.evidence_changes(guide)
        return
    delta_f = bmrs.evidence_changes(guide, lambda prior: bmrs.precision_window(prior, 1, None))
    q = bmrs.noise_posterior(model, guide).posterior()
    expected = {site: math.log(20 / (20 - math.log(2))) + q[site].cdf(torch.tensor(0.5)).log() for site in SITES}
    for site in SITES:
        assert torch.allclose(delta_f[site], expected[site], atol=1e-3)
    assert len(bmrs.plot_forest(guide).collections) > 1
    assert len(bmrs.plot_ridge(guide, "5.theta").lines) == 4
    plt.close("all")


def test_a_program_written_by_hand_is_read_in_closed_form():
    model = make()
    pyro.clear_param_store()
    posterior = bmrs.noise_posterior(model, by_hand, X)
    ours = bmrs.TruncatedLogNormalGuide(model)
    with torch.no_grad():
        ours.loc.copy_(torch.cat([torch.linspace(-3, -1, n) for n in SITES.values()]))
        ours.log_scale.fill_(math.log(0.4))
    for site, delta_f in bmrs.evidence_changes(ours).items():
        assert torch.allclose(bmrs.evidence_changes(posterior)[site], delta_f, rtol=1e-5)
    assert torch.allclose(posterior.kl().double(), ours.kl().double(), rtol=1e-5)
    assert torch.allclose(bmrs.predict(model, by_hand, X), bmrs.predict(model, ours, X), atol=1e-6)
    model.noise["2.theta"].remove(torch.arange(6) < 2)
    assert torch.allclose(posterior.kl().double(), ours.kl().double(), rtol=1e-5)


@pytest.mark.slow
def test_a_hierarchy_is_known_by_its_draws():
    model = make()
    posterior = bmrs.noise_posterior(model, of_a_hierarchy, X)
    assert all(isinstance(each, dist.Empirical) for each in posterior.posterior().values())
    draws = posterior.draw((800,))["2.theta"].log()
    assert torch.corrcoef(draws.T)[0, 1] == pytest.approx(0.2, abs=0.12)  # of variances 0.25 and 1, less the bound at 0
    delta_f = bmrs.evidence_changes(posterior, lambda prior: bmrs.precision_window(prior, 3, None))["2.theta"]
    below = (posterior.posterior()["2.theta"].enumerate_support() <= 2.0**-3).float().mean(-1)
    assert torch.allclose(delta_f, math.log(20 / (20 - 3 * math.log(2))) + below.log(), atol=1e-4)
    with pytest.warns(bmrs.UnreliableEvidenceWarning, match="hardly any of 1000 draws"):
        assert (bmrs.evidence_changes(posterior)["2.theta"] < 0).all()
    with pytest.raises(NotImplementedError, match="no density at a point"):
        bmrs.evidence_changes(posterior, lambda prior: dist.Delta(torch.full_like(prior.log_low, 0.1)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert len(bmrs.plot_ridge(posterior).lines) == 6
    plt.close("all")


def test_an_object_may_state_its_posterior():
    model = make()
    posterior = bmrs.noise_posterior(model, Stated())
    assert torch.equal(posterior.mean()["2.theta"], Stated().posterior()["2.theta"].mean)
    assert bmrs.predict(model, Stated(), X).shape == (60, 2)

    class Wrong(Stated):
        def posterior(self):
            return {"2.theta": dist.Normal(0.0, 1.0), "5.theta": dist.Normal(0.0, 1.0)}

    with pytest.raises(ValueError, match=r"distribution of batch_shape \(6,\) for site '2.theta'"):
        bmrs.predict(model, Wrong(), X)
    with pytest.raises(ValueError, match="must be of the model's sites"):
        bmrs.predict(bmrs.NoisyNetwork(nn.Sequential(nn.Linear(4, 6), bmrs.MultiplicativeNoise(6))), Stated(), X)


@pytest.mark.parametrize("prior", [dist.HalfNormal(1.0), dist.HalfCauchy(1.0)])
def test_priors_on_the_positive_numbers(prior):
    model = make(prior)
    guide = fitted(model, AutoNormal(model))
    delta_f = bmrs.evidence_changes(guide)
    assert all(torch.isfinite(each).all() for each in delta_f.values())
    assert (bmrs.noise_posterior(model, guide).kl() > 0).item()


def test_what_is_no_guide_is_refused_by_name():
    model = make()
    with pytest.raises(ValueError, match="the AutoNormal has not been fitted"):
        bmrs.predict(model, AutoNormal(model), X)
    with pytest.raises(TypeError, match="guide must be one that is made of the model"):
        bmrs.predict(model, 3, X)
    with pytest.raises(TypeError, match=r"pass noise_posterior\(model, guide, ...\)"):
        bmrs.evidence_changes(by_hand)
    with pytest.raises(TypeError, match="the guide does not run on the 0 arguments given for it"):
        bmrs.noise_posterior(model, by_hand)
    in_part = AutoNormal(pyro.poutine.block(model, expose=["2.theta"]))
    in_part(X, Y)
    with pytest.raises(ValueError, match=r"the guide has no site '5[.]theta'"):
        bmrs.predict(model, in_part, X)
    with pytest.raises(ValueError, match="guide of another model"):
        bmrs.predict(model, bmrs.TruncatedLogNormalGuide(make()), X)
    with pytest.raises(TypeError, match="model must be a NoisyNetwork"):
        bmrs.noise_posterior(nn.Linear(2, 2), by_hand, X)
    wrong = lambda x: [pyro.sample(site, dist.Normal(torch.zeros(3), 1.0).to_event(1)) for site in SITES]  # noqa: E731
    with pytest.raises(ValueError, match=r"shape \(6,\) in the model but \(3,\) in the guide"):
        bmrs.predict(model, wrong, X)


@pytest.mark.slow
def test_reading_leaves_the_random_state_and_modes_alone():
    model = make()
    guide = fitted(model, AutoIAFNormal(model))
    state = torch.get_rng_state()
    bmrs.noise_posterior(model, guide, X, Y)
    bmrs.predict(model, guide, X)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
