import pyro
import pyro.distributions as dist
import pytest
import torch
from nets import blobs, build, small_classifier
from pyro import poutine
from pyro.infer import SVI, Predictive, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoNormal
from torch import nn

import pyro_bmrs as bmrs


def test_trace_has_one_site_a_layer_and_the_observations():
    model, _, x = build("lenet5")
    y = torch.zeros(len(x), dtype=torch.long)
    trace = poutine.trace(model).get_trace(x, y)
    assert [name for name in trace.stochastic_nodes if name in model.sizes] == list(model.sizes)
    for name, size in model.sizes.items():
        fn = trace.nodes[name]["fn"]
        assert (fn.batch_shape, fn.event_shape) == (torch.Size(), torch.Size([size]))
        assert isinstance(fn.base_dist, bmrs.LogUniform)
    assert trace.observation_nodes == ["obs"]


def test_scales_of_likelihood_and_kl():
    model, _ = small_classifier(num_data=600, kl_weight=3.0)
    x, y = blobs(50)
    trace = poutine.trace(model).get_trace(x, y)
    assert trace.nodes["obs"]["scale"] == 12
    assert trace.nodes["2.theta"]["scale"] == 3


def test_predictive_draws_noise_and_observations():
    model, guide, x = build("mlp")
    samples = Predictive(model, guide=guide, num_samples=7)(x)
    assert samples["obs"].shape == (7, len(x))
    assert samples["fc1_noise.theta"].squeeze().shape == (7, 12)


def test_a_guide_written_by_hand():
    model, _ = small_classifier(num_data=200)
    x, y = blobs(200)

    def guide(x, y=None):
        loc = pyro.param("loc", torch.full((16,), -1.0))
        scale = pyro.param("scale", torch.ones(16), constraint=dist.constraints.positive)
        pyro.sample("2.theta", bmrs.TruncatedLogNormal(loc, scale).to_event(1))

    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.02}), TraceMeanField_ELBO())
    losses = [svi.step(x, y) for _ in range(60)]
    assert sum(losses[-10:]) < sum(losses[:10])


@pytest.mark.parametrize("elbo", [TraceMeanField_ELBO, bmrs.MeanFieldELBO])
def test_an_automatic_guide(elbo):
    model, _ = small_classifier(num_data=200)
    x, y = blobs(200)
    svi = SVI(model, AutoNormal(model), pyro.optim.Adam({"lr": 0.02}), elbo())
    losses = [svi.step(x, y) for _ in range(60)]
    assert sum(losses[-10:]) < sum(losses[:10])


def test_a_network_without_structures_is_refused():
    with pytest.raises(ValueError, match=r"has no noise: attach it.*MultiplicativeNoise"):
        bmrs.NoisyNetwork(nn.Linear(2, 2), num_data=10)


@pytest.mark.parametrize(("name", "value"), [("num_data", 0), ("kl_weight", 0.0), ("kl_weight", -1.0)])
def test_arguments_must_be_positive(name, value):
    with pytest.raises(ValueError, match=f"{name} must be .*{value}"):
        small_classifier(**{name: value})


def test_a_likelihood_over_the_wrong_shape_is_refused():
    net = nn.Sequential(nn.Linear(2, 3), bmrs.MultiplicativeNoise(3), nn.Linear(3, 1))
    model = bmrs.NoisyNetwork(net, likelihood=lambda out: dist.Normal(out, 1.0))
    with pytest.raises(ValueError, match=r"batch_shape \(5,\).*Normal of batch_shape \(5, 1\)"):
        model(torch.randn(5, 2))


def test_layers_may_be_called_what_they_like():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.keys, self.values = nn.Linear(3, 4), nn.Linear(4, 5)
            self.add_module("a/b", nn.Linear(5, 6))
            self.a = nn.ModuleDict({"b": nn.Linear(6, 4)})
            self.forward_ = nn.Linear(4, 2)

        def forward(self, x):
            h = self.values(self.keys(x).relu()).relu()
            return self.forward_(self.a["b"](getattr(self, "a/b")(h).relu()).relu())

    net, x = Named(), torch.randn(2, 3)
    model = bmrs.NoisyNetwork(bmrs.attach_noise(net, bmrs.find_structures(net, x)))
    assert model.sizes == {"keys.theta": 4, "values.theta": 5, "a/b.theta": 6, "a.b.theta": 4}


@pytest.mark.parametrize(
    ("likelihood", "y"),
    [
        (lambda out: dist.Normal(out[:, 0], 0.1), torch.zeros(6, 1)),
        (lambda out: dist.Normal(out, 0.1).to_event(1), torch.zeros(6, 1)),
        (None, torch.zeros(6, 1, dtype=torch.long)),
    ],
)
def test_observations_are_not_broadcast(likelihood, y):
    net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), bmrs.MultiplicativeNoise(8), nn.Linear(8, 2))
    x, model = torch.randn(6, 4), bmrs.NoisyNetwork(net, likelihood)
    guide = bmrs.TruncatedLogNormalGuide(model)
    with pytest.raises(ValueError, match=r"the observations are of shape \(6, 1\)"):
        bmrs.MeanFieldELBO()(model, guide)(x, y)
    with pytest.raises(ValueError, match=r"the observations are of shape \(6, 1\)"):
        model(x, y)
    with pytest.raises(ValueError, match=r"train has observations of shape \(6, 1\)"):
        bmrs.fit(model, guide, (x, y), epochs=1, progress=False)


def test_noise_that_lacks_a_site_leaves_none_behind():
    model, _, x = build("mlp")
    plain = model.net(x)
    with pytest.raises(KeyError):
        model.run(x, {next(iter(model.sizes)): torch.zeros(next(iter(model.sizes.values())))})
    assert torch.equal(model.net(x), plain)


def test_parameters_that_follow_from_others_may_be_off_by_rounding():
    scale_tril = torch.diag(torch.logspace(-3, 2, 40))
    for likelihood, size, y in (
        (None, 50_257, torch.arange(6)),
        (lambda out: dist.MultivariateNormal(out, scale_tril=scale_tril), 40, torch.zeros(6, 40)),
    ):
        net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), bmrs.MultiplicativeNoise(8), nn.Linear(8, size))
        model = bmrs.NoisyNetwork(net, likelihood)
        few = {"epochs": 1, "fine_tune_epochs": 0, "progress": False, "criterion": None}
        with pytest.warns(bmrs.FitWarning):
            bmrs.fit(model, bmrs.TruncatedLogNormalGuide(model), (torch.randn(6, 4), y), **few)
