"""What a fitted posterior says of data, in ArviZ's container."""

import json
import warnings
from importlib.metadata import version

import arviz
import numpy as np
import pyro.distributions as dist
import pytest
import torch
from nets import blobs, small_classifier
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import pyro_bmrs as bmrs


@pytest.fixture(scope="module")
def fitted():
    """Return a model and its guide, fitted, and examples."""
    torch.manual_seed(0)
    model, guide = small_classifier()
    x, y = blobs(120)
    bmrs.fit(model, guide, (x, y), epochs=20, fine_tune_epochs=0, lr=1e-2, progress=False)
    return model, guide, (x[:50], y[:50])


@pytest.mark.slow
def test_pointwise_values_are_those_of_each_draw(fitted):
    model, guide, (x, y) = fitted
    data = bmrs.to_arviz(model, guide, (x, y), draws=7)
    site = next(iter(guide.sizes))
    pointwise = data.log_likelihood["obs"].values
    assert pointwise.shape == (1, 7, 50)
    with torch.no_grad():
        for i in range(7):
            noise = {name: torch.tensor(data.posterior[name].values[0, i]) for name in guide.sizes}
            expected = dist.Categorical(logits=model.run(x, noise)).log_prob(y)
            np.testing.assert_allclose(pointwise[0, i], expected.numpy(), rtol=1e-5, atol=1e-6)
    log_q = guide.posterior()[site].log_prob(torch.tensor(data.posterior[site].values[0])).sum(-1)
    np.testing.assert_allclose(data.sample_stats["log_q"].values[0], log_q.detach().numpy(), rtol=1e-4)
    log_prior = guide.prior()[site].log_prob(torch.tensor(data.posterior[site].values[0])).sum(-1).numpy()
    np.testing.assert_allclose(data.sample_stats["lp"].values[0], pointwise[0].sum(-1) + log_prior, rtol=1e-4)
    assert (data.observed_data["obs"].values == y.numpy()).all()
    assert data.posterior_predictive["obs"].shape == (1, 7, 50)
    assert (data.posterior_predictive["obs"].values == y.numpy()).mean() > 0.5


def test_constants_are_what_the_evidence_says(fitted):
    model, guide, _ = fitted
    data = bmrs.to_arviz(model, guide, draws=3)
    for site, delta_f in bmrs.evidence_changes(guide).items():
        constants = data.constant_data
        np.testing.assert_allclose(constants[f"{site}.delta_f_BMRS_N"].values, delta_f.numpy())
        np.testing.assert_allclose(constants[f"{site}.odds"].values, np.exp(delta_f.double().numpy()))
        np.testing.assert_allclose(constants[f"{site}.mean"].values, guide.mean()[site].detach().numpy())
        assert set(constants[f"{site}.layer"].values.tolist()) == {site.removesuffix(".theta")}
        assert constants[f"{site}.original_index"].values.tolist() == model.noise[site].index.tolist()
        assert {f"{site}.snr", f"{site}.kept", f"{site}.delta_f_BMRS_U_8"} <= set(constants)
        log_name = site.replace("theta", "log_theta")
        np.testing.assert_allclose(
            data.posterior[log_name].values, np.log(data.posterior[site].values), rtol=1e-5, atol=1e-5
        )


def test_attributes_say_how_it_was_made(fitted):
    model, guide, _ = fitted
    data = bmrs.to_arviz(model, guide, draws=3, seed=11)
    assert data.attrs["seed"] == 11
    assert json.loads(data.attrs["settings"])["draws"] == 3
    assert json.loads(data.attrs["versions"])["torch"] == version("torch")
    assert data.attrs["weights_trained_for"] == "draws of the noise"
    net, own = small_classifier()
    assert bmrs.to_arviz(own, draws=3).attrs["weights_trained_for"] == "nothing here"
    bmrs.fit(net, own, blobs(40), epochs=1, fine_tune_epochs=1, progress=False)
    assert bmrs.to_arviz(own, draws=3).attrs["weights_trained_for"] == "the posterior's mean"


def test_importance_ratios_have_a_k_hat(fitted):
    model, guide, examples = fitted
    data = bmrs.to_arviz(model, guide, examples, draws=200)
    ratios = data.log_likelihood.obs.values.sum(-1, dtype=np.float64)
    with torch.no_grad():
        for site, q in guide.posterior().items():  # what has been removed does not count
            theta, kept = torch.as_tensor(data.posterior[site].values), guide.noise[site].keep
            terms = guide.prior()[site].log_prob(theta).double() - q.log_prob(theta).double()
            ratios = ratios + terms[..., kept].sum(-1).numpy()
    if hasattr(arviz, "psislw"):
        _, k = arviz.psislw(ratios, normalize=False)
    else:  # ArviZ 1.x, which takes their negative
        _, k = pytest.importorskip("arviz_stats.base").array_stats.psislw(-ratios, axis=-1)
    assert data.attrs["pareto_k"] == pytest.approx(float(np.squeeze(k)), rel=1e-6)
    assert "pareto_k" not in bmrs.to_arviz(model, guide, examples, draws=10).attrs
    assert "pareto_k" not in bmrs.to_arviz(model, guide, draws=200).attrs


@pytest.mark.slow
def test_arviz_reads_it(fitted, tmp_path):
    model, guide, examples = fitted
    data = bmrs.to_arviz(model, guide, examples, draws=100)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of unreliable Pareto tails
        loo, waic = arviz.loo(data), arviz.waic(data)
        ranking = arviz.compare({"a": data, "b": bmrs.to_arviz(model, guide, examples, draws=100, seed=1)})
    assert np.isfinite(loo.elpd_loo)
    assert np.isfinite(waic.elpd_waic)
    assert set(ranking.index) == {"a", "b"}
    site = next(iter(guide.sizes))
    arviz.plot_forest(data, var_names=[site])
    arviz.plot_density(data, var_names=[site])
    arviz.plot_ppc(data)
    data.to_netcdf(tmp_path / "posterior.nc", engine="h5netcdf")
    stored = arviz.from_netcdf(tmp_path / "posterior.nc", engine="h5netcdf")
    assert stored.constant_data[f"{site}.layer"].values.tolist() == data.constant_data[f"{site}.layer"].values.tolist()
    assert stored.attrs["settings"] == data.attrs["settings"]


def test_data_come_in_any_form_and_are_streamed(fitted):
    model, guide, (x, y) = fitted
    loader = DataLoader(TensorDataset(x, y), batch_size=7)
    a, b = (bmrs.to_arviz(model, guide, data, draws=5) for data in ((x, y), loader))
    np.testing.assert_allclose(a.log_likelihood["obs"].values, b.log_likelihood["obs"].values, rtol=1e-5, atol=1e-6)
    assert a.log_likelihood["obs"].coords["example"].values.tolist() == list(range(50))


def test_numbers_and_several_labels():
    for outputs, likelihood, y in (
        (1, lambda out: dist.Normal(out.squeeze(-1), 0.5), torch.randn(30)),
        (3, lambda out: dist.Bernoulli(logits=out).to_event(1), torch.ones(30, 3)),
    ):
        net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), bmrs.MultiplicativeNoise(5), nn.Linear(5, outputs))
        model = bmrs.NoisyNetwork(net, likelihood=likelihood)
        data = bmrs.to_arviz(model, bmrs.TruncatedLogNormalGuide(model), (torch.randn(30, 4), y), draws=4)
        assert data.log_likelihood["obs"].shape == (1, 4, 30)
        assert data.posterior_predictive["obs"].shape == (1, 4, *y.shape)


def test_modes_hooks_and_random_state_are_left_alone(fitted):
    model, guide, examples = fitted
    model.train()
    torch.manual_seed(5)
    before = torch.rand(1)
    torch.manual_seed(5)
    bmrs.to_arviz(model, guide, examples, draws=2)
    assert torch.equal(torch.rand(1), before)
    assert model.training


def test_what_does_not_fit_is_refused(fitted):
    model, guide, (x, y) = fitted
    with pytest.raises(ValueError, match="another model"):
        bmrs.to_arviz(small_classifier()[0], guide)
    with pytest.raises(TypeError, match="guide must be"):
        bmrs.to_arviz(model)
    with pytest.raises(ValueError, match="data"):
        bmrs.to_arviz(model, guide, (x[:, :3], y), draws=2)
    with pytest.raises(TypeError, match="data must be"):
        bmrs.to_arviz(model, guide, 3, draws=2)
