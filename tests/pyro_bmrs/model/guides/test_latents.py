"""Weights with a prior and other latent sites in a network, fitted beside its noise."""

import copy
import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoDelta, AutoIAFNormal, AutoMultivariateNormal, AutoNormal
from pyro.nn import PyroModule, PyroSample
from torch import nn

import pyro_bmrs as bmrs

X = torch.randn(120, 4, generator=torch.Generator().manual_seed(0))
Y = (X[:, 0] + X[:, 1] > 0).long()
SHORT = {"epochs": 4, "fine_tune_epochs": 2, "batch_size": 40, "lr": 0.02, "seed": 0, "progress": False}
SITE = "net.0.weight"


def bayesian_layer():
    layer = PyroModule[nn.Linear](4, 8)
    layer.weight = PyroSample(dist.Normal(0.0, 1.0).expand([8, 4]).to_event(2))
    return layer


def layer_with_a_scale():
    """A layer whose weights have a scale of its own, which has a prior too."""
    layer = PyroModule[nn.Linear](4, 8)
    layer.scale = PyroSample(dist.HalfNormal(1.0))
    layer.weight = PyroSample(lambda self: dist.Normal(0.0, self.scale).expand([8, 4]).to_event(2))
    return layer


class Scaled(PyroModule):
    """A layer that draws its scale as it runs."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 8)

    def forward(self, x):
        return self.linear(x) * pyro.sample("scale", dist.LogNormal(0.0, 0.5))


def make(layer=bayesian_layer):
    torch.manual_seed(0)
    parts = (layer(), nn.Tanh(), bmrs.MultiplicativeNoise(8), nn.Linear(8, 2))
    model = bmrs.NoisyNetwork(PyroModule[nn.Sequential](*parts), num_data=120)
    return model, bmrs.TruncatedLogNormalGuide(model)


def fitted(layer=bayesian_layer, guide_class=AutoNormal, **settings):
    model, guide = make(layer)
    result = bmrs.fit(model, guide.add_latents(guide_class), (X, Y), **{**SHORT, **settings})
    return model, guide, result


@pytest.mark.slow
def test_the_loss_is_that_of_pyro():
    model, guide, _ = fitted(fine_tune_epochs=0)
    model.kl_weight = 3.0
    with torch.no_grad():
        ours = torch.tensor([bmrs.MeanFieldELBO("batch").loss(model, guide, X, Y) for _ in range(500)])
        theirs = torch.tensor([Trace_ELBO().loss(model, guide, X, Y) for _ in range(500)])
    error = (ours.var() / 500 + theirs.var() / 500).sqrt()
    assert (ours.mean() - theirs.mean()).abs() < 4 * error
    pyro.clear_param_store()
    before = [parameter.detach().clone() for parameter in guide.latents.module.parameters()]
    SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), bmrs.MeanFieldELBO()).step(X, Y)
    assert all(not torch.equal(*pair) for pair in zip(before, guide.latents.module.parameters(), strict=True))


@pytest.mark.slow
def test_a_conjugate_posterior_is_found():
    """A linear regression whose only noise stays at 1: its weights have the posterior that algebra gives."""
    torch.manual_seed(0)
    x = torch.randn(60, 2, dtype=torch.float64)
    y = x @ torch.tensor([1.0, -0.5]).double() + 0.5 * torch.randn(60, dtype=torch.float64)
    layer = PyroModule[nn.Linear](2, 1, bias=False)
    layer.weight = PyroSample(dist.Normal(torch.zeros(1, 2).double(), 1.0).to_event(2))
    noise = bmrs.MultiplicativeNoise(2, bmrs.LogUniform(torch.tensor(-0.001).double(), torch.tensor(0.001).double()))
    model = bmrs.NoisyNetwork(
        PyroModule[nn.Sequential](noise, layer), likelihood=lambda out: dist.Normal(out.squeeze(-1), 0.5)
    )
    guide = bmrs.TruncatedLogNormalGuide(model).add_latents(AutoMultivariateNormal)
    settings = {"epochs": 500, "fine_tune_epochs": 0, "batch_size": 60, "lr": 0.03, "seed": 0, "progress": False}
    bmrs.fit(model, guide, (x, y), criterion=None, kl_warmup_epochs=0, unremovable="mask", **settings)
    precision = torch.eye(2).double() + 4 * x.T @ x
    draws = guide.latents.draws(2000)[0]["net.1.weight"].squeeze(1)
    assert torch.allclose(draws.mean(0), 4 * torch.linalg.solve(precision, x.T @ y), atol=0.03)
    assert torch.allclose(torch.cov(draws.T), torch.linalg.inv(precision), rtol=0.25, atol=3e-4)


@pytest.mark.parametrize("layer", [bayesian_layer, layer_with_a_scale])
def test_layers_with_priors_are_fitted_and_cut(layer):
    model, guide, result = fitted(layer)
    masks = {"2.theta": torch.arange(8) < 5}
    small = bmrs.compact(model, guide, masks, X[:2])
    assert torch.allclose(small(X), bmrs.predict(model, guide, X, masks), atol=1e-6)
    assert small[0].weight.shape == (5, 4)
    assert isinstance(small[0].weight, nn.Parameter)
    assert torch.equal(small(X), small(X))
    assert result.history[-1]["loss"] < result.history[0]["loss"]
    dense = 4 * 8 + 8 + 8 * 2 + 2 + (layer is layer_with_a_scale)
    assert bmrs.count_parameters(model.net) == dense


@pytest.mark.slow
@pytest.mark.parametrize("guide_class", [AutoNormal, AutoDelta, AutoMultivariateNormal, AutoIAFNormal])
def test_guides_of_other_sites(guide_class):
    model, guide, _ = fitted(guide_class=guide_class)
    assert torch.equal(bmrs.predict(model, guide, X), bmrs.predict(model, guide, X))
    scores = bmrs.evaluate(model, guide, (X, Y), draws=5)
    assert scores.over_draws.log_likelihood < 0
    data = bmrs.to_arviz(model, guide, (X, Y), draws=30)
    assert data.posterior[SITE].shape == (1, 30, 8, 4)
    if guide_class is AutoNormal:
        values = torch.as_tensor(data.posterior[SITE].values[0])
        log_prior = dist.Normal(0.0, 1.0).log_prob(values).double().sum((1, 2)) - torch.log(
            torch.as_tensor(data.posterior["2.theta"].values[0]).double() * 20
        ).sum(-1)
        log_likelihood = torch.as_tensor(data.log_likelihood.obs.values[0]).double().sum(-1)
        assert torch.allclose(torch.as_tensor(data.sample_stats.lp.values[0]), log_prior + log_likelihood, atol=1e-2)


def test_a_scale_drawn_in_the_forward_pass_is_fitted_and_not_compacted():
    model, guide, _ = fitted(Scaled)
    assert list(guide.latents.point()) == ["scale"]
    assert torch.equal(bmrs.predict(model, guide, X), bmrs.predict(model, guide, X))
    with pytest.raises(NotImplementedError, match=r"site 'scale' is drawn in the network's forward pass.*PyroSample"):
        bmrs.compact(model, guide, None, X[:2])


@pytest.mark.slow
def test_one_autoguide_for_all_of_it():
    model, _ = make()
    guide = AutoNormal(model)
    pyro.clear_param_store()
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.02}), Trace_ELBO())
    for _ in range(5):
        svi.step(X, Y)
    small = bmrs.compact(model, guide, {"2.theta": torch.arange(8) < 5}, X[:2])
    assert small[0].weight.shape == (5, 4)
    data = bmrs.to_arviz(model, guide, (X, Y), draws=30)
    assert data.posterior[SITE].shape == (1, 30, 8, 4)
    assert bmrs.evaluate(model, guide, (X, Y), draws=5).kl > 0


@pytest.mark.slow
def test_a_resumed_fit_is_the_same(tmp_path):
    _, whole, _ = fitted()

    class Stop(bmrs.Callback):
        def on_epoch_end(self, record):
            if record["epoch"] == 3:
                raise KeyboardInterrupt

    model, guide = make()
    guide.add_latents(AutoNormal)
    with pytest.raises(KeyboardInterrupt):
        bmrs.fit(model, guide, (X, Y), **SHORT, folder=tmp_path, callbacks=[Stop()])
    model, guide = make()
    bmrs.fit(model, guide.add_latents(AutoNormal), (X, Y), **SHORT, folder=tmp_path, resume=True)
    for one, other in zip(whole.latents.module.parameters(), guide.latents.module.parameters(), strict=True):
        assert torch.equal(one, other)
    assert torch.equal(whole.loc, guide.loc)


def test_what_the_global_store_has_is_neither_used_nor_changed():
    alone = fitted()[1].latents.point()[SITE]
    pyro.param(f"AutoNormal.locs.{SITE}", torch.full((8, 4), 7.0))
    assert torch.equal(fitted()[1].latents.point()[SITE], alone)
    assert float(pyro.param(f"AutoNormal.locs.{SITE}").detach()[0, 0]) == 7.0


def test_copies_are_whole():
    model, guide, _ = fitted()
    expected = bmrs.predict(model, guide, X)
    for pair in (copy.deepcopy((model, guide)), pickle.loads(pickle.dumps((model, guide)))):
        assert torch.equal(bmrs.predict(*pair, X), expected)


def test_what_cannot_be_is_said():
    model, guide = make()
    with pytest.raises(ValueError, match=r"latent site 'net.0.weight'.*guide.add_latents\(AutoNormal\)"):
        bmrs.fit(model, guide, (X, Y), **SHORT)
    assert not model.fitted
    for wrong in (dist.Normal, lambda x, y: None, 3):
        with pytest.raises(TypeError, match="AutoNormal"):
            guide.add_latents(wrong)
    guide.add_latents(AutoNormal)
    with pytest.raises(ValueError, match="has not been fitted"):
        bmrs.predict(model, guide, X)
    with pytest.raises(ValueError, match="compile=True is for noise alone"):
        bmrs.fit(model, guide, (X, Y), compile=True, **SHORT)
    with pytest.raises(ValueError, match="shrink=True is for noise alone"):
        bmrs.fit(model, guide, (X, Y), pruning=bmrs.Continuous(shrink=True), **SHORT)
    with pytest.raises(ValueError, match="fit_ensemble is for noise alone"):
        bmrs.fit_ensemble(lambda: (model, guide), (X, Y), seeds=(0, 1), epochs=1, progress=False)
    with pytest.raises(ValueError, match="sampled_noise switches on noise alone"), bmrs.sampled_noise(model, guide):
        pass
    with pytest.raises(ValueError, match=r"draws the noise '2.theta' too.*poutine.block"):
        bmrs.fit(model, guide.add_latents(AutoNormal(model)), (X, Y), **SHORT)
    with pytest.raises(ValueError, match=r"latent site 'net.0.weight'"):
        bmrs.fit(model, guide.add_latents(AutoNormal(poutine.block(model, expose=[]))), (X, Y), **SHORT)


def test_layers_of_plain_modules_go_by_their_attribute_and_two_of_one_name_are_refused():
    torch.manual_seed(0)
    layers = (bayesian_layer(), nn.Tanh(), bmrs.MultiplicativeNoise(8), nn.Linear(8, 2))
    model = bmrs.NoisyNetwork(nn.Sequential(*layers))
    guide = bmrs.TruncatedLogNormalGuide(model).add_latents(AutoNormal)
    bmrs.fit(model, guide, (X, Y), **SHORT)
    small = bmrs.compact(model, guide, {"2.theta": torch.arange(8) < 5}, X[:2])
    assert torch.equal(small[0].weight, guide.latents.point()["weight"][:5])
    two = nn.Sequential(
        nn.Linear(4, 4), bayesian_layer(), nn.Linear(8, 4), bayesian_layer(), bmrs.MultiplicativeNoise(8)
    )
    model = bmrs.NoisyNetwork(nn.Sequential(two, nn.Linear(8, 2)))
    guide = bmrs.TruncatedLogNormalGuide(model).add_latents(AutoNormal)
    with pytest.raises(ValueError, match=r"sample site 'weight': put them into PyroModule modules"):
        bmrs.fit(model, guide, (X, Y), **SHORT)


def test_a_guide_with_other_sites_is_not_saved_in_part(tmp_path):
    _, guide, _ = fitted()
    with pytest.raises(ValueError, match=r"torch.save\(guide.latents.module.state_dict\(\)"):
        bmrs.save(guide, tmp_path / "guide")
