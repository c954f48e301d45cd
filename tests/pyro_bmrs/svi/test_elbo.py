import pyro
import pyro.distributions as dist
import pytest
import torch
from nets import blobs, build, small_classifier
from pyro import poutine
from pyro.infer import SVI, TraceMeanField_ELBO
from torch import nn
from torch.distributions import kl_divergence

import pyro_bmrs as bmrs
from pyro_bmrs.model.supply import supply_noise


def loss_and_gradients(elbo, model, guide, x, y, seed=1):
    torch.manual_seed(seed)
    module = elbo(model, guide)
    module.zero_grad()
    loss = module(x, y)
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in module.named_parameters()}


@pytest.mark.parametrize("name", ["mlp", "lenet5"])
@pytest.mark.parametrize("pruned", [False, True])
def test_equals_the_stock_elbo(name, pruned):
    model, guide, x = build(name, dtype=torch.float64)
    model.kl_weight = 2.5
    y = torch.arange(len(x)) % 4
    if pruned:
        for site, layer in model.noise.items():
            layer.remove(torch.arange(model.sizes[site]) % 3 == 0)
    stock = loss_and_gradients(TraceMeanField_ELBO(), model, guide, x, y)
    ours = loss_and_gradients(bmrs.MeanFieldELBO("batch"), model, guide, x, y)
    torch.testing.assert_close(ours, stock, rtol=1e-12, atol=1e-12)


def test_sites_with_weights_of_their_own_equal_the_stock_elbo():
    plain, _, x = build("mlp", dtype=torch.float64)
    y = torch.arange(len(x)) % 4
    model = bmrs.NoisyNetwork(plain.net, num_data=100, kl_weight=dict(zip(plain.sizes, (0.5, 3.0, 20.0), strict=True)))
    guide = bmrs.TruncatedLogNormalGuide(model, init_loc=-1.0, init_log_scale=0.3).double()
    stock = loss_and_gradients(TraceMeanField_ELBO(), model, guide, x, y)
    ours = loss_and_gradients(bmrs.MeanFieldELBO("batch"), model, guide, x, y)
    torch.testing.assert_close(ours, stock, rtol=1e-12, atol=1e-12)
    divergences = [
        kl_divergence(q, p).sum() for q, p in zip(guide.posterior().values(), guide.prior().values(), strict=True)
    ]
    torch.testing.assert_close(guide.kl(), 0.5 * divergences[0] + 3 * divergences[1] + 20 * divergences[2])


def test_draws_for_each_example_equal_the_stock_elbo_with_a_plate():
    """A plate over the batch inside scale(1/B) is what Pyro accepts for one draw per example."""
    model, guide, x = build("noise_before_tanh", dtype=torch.float64)
    y = torch.arange(len(x)) % 3
    site, layer = next(iter(model.noise.items()))

    def in_plate(distribution):
        with pyro.plate("examples", len(x)), poutine.scale(scale=1 / len(x)):
            return pyro.sample(site, distribution.to_event(1))

    def stock_model(x, y):
        net = model.net
        h = net[0](x) * in_plate(layer.prior)
        with pyro.plate("data", len(x)), poutine.scale(scale=100 / len(x)):
            pyro.sample("obs", dist.Categorical(logits=net[3](net[2](h))), obs=y)

    def stock_guide(x, y):
        in_plate(guide.posterior()[site])

    torch.manual_seed(1)
    stock = TraceMeanField_ELBO().differentiable_loss(stock_model, stock_guide, x, y)
    torch.manual_seed(1)
    ours = bmrs.MeanFieldELBO("example").differentiable_loss(model, guide, x, y)
    torch.testing.assert_close(ours, stock)
    parameters = [*model.parameters(), *guide.parameters()]
    torch.testing.assert_close(torch.autograd.grad(ours, parameters), torch.autograd.grad(stock, parameters))


def test_value_is_the_elbo_of_the_formula():
    model, guide, x = build("mlp", dtype=torch.float64)
    y = torch.arange(len(x)) % 4
    with torch.no_grad():
        guide.log_scale.fill_(-18.0)  # nothing left to chance: every draw is the mode
    theta = {site: q.icdf(torch.tensor(0.5, dtype=torch.float64)) for site, q in guide.posterior().items()}
    h = x
    for i in (1, 2, 3):
        h = torch.tanh(getattr(model.net, f"fc{i}")(h)) * theta[f"fc{i}_noise.theta"]
    log_likelihood = dist.Categorical(logits=model.net.output(h)).log_prob(y).sum()
    kl = sum(kl_divergence(q, guide.prior()[site]).sum() for site, q in guide.posterior().items())
    expected = kl - 100 / len(x) * log_likelihood
    for granularity in ("shared", "example", "batch", "element"):
        found = bmrs.MeanFieldELBO(granularity).differentiable_loss(model, guide, x, y)
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.slow
def test_granularity_changes_the_noise_of_the_gradient_and_not_its_mean():
    """With equal examples the draws of a batch are 64 independent looks at one gradient."""
    model, guide, x = build("mlp", dtype=torch.float64)
    x, y = x[:1].expand(64, -1), torch.zeros(64, dtype=torch.long)

    def gradients(granularity):
        samples = []
        for seed in range(150):
            torch.manual_seed(seed)
            loss = bmrs.MeanFieldELBO(granularity).differentiable_loss(model, guide, x, y)
            samples.append(torch.autograd.grad(loss, guide.loc)[0])
        return torch.stack(samples)

    example, batch = gradients("example"), gradients("batch")
    assert example.var(0).mean() < 2 / 64 * batch.var(0).mean()
    error = ((example.var(0) + batch.var(0)) / len(batch)).sqrt()
    assert ((example.mean(0) - batch.mean(0)).abs() < 5 * error).all()


def test_elements_have_noise_of_their_own():
    model, guide, x = build("lenet5")
    draws = bmrs.MeanFieldELBO("element")._draw(model, guide, x)
    shapes = {site: tuple(values.shape) for site, values in draws.items()}
    assert shapes["conv1_noise.theta"] == (6, 14, 14, 6)
    assert shapes["conv2_noise.theta"] == (6, 5, 5, 16)
    assert shapes["fc1_noise.theta"] == (6, 120)


@pytest.mark.parametrize("granularity", ["shared", "example", "batch", "element"])
def test_svi_step_trains_weights_and_posterior(granularity):
    model, guide = small_classifier(num_data=200)
    x, y = blobs(200)
    before = [p.detach().clone() for p in (*model.parameters(), *guide.parameters())]
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.02}), bmrs.MeanFieldELBO(granularity))
    losses = [svi.step(x, y) for _ in range(40)]
    after = [*model.parameters(), *guide.parameters()]
    assert sum(losses[-5:]) < sum(losses[:5])
    assert all(not torch.equal(old, new) for old, new in zip(before, after, strict=True))


def test_svi_gives_the_same_parameters_as_the_stock_elbo():
    results = []
    for elbo in (TraceMeanField_ELBO(), bmrs.MeanFieldELBO("batch")):
        pyro.clear_param_store()
        model, guide = small_classifier(num_data=200)
        x, y = blobs(200)
        svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.02}), elbo)
        torch.manual_seed(3)
        for _ in range(5):
            svi.step(x, y)
        results.append([p.detach().clone() for p in (*model.parameters(), *guide.parameters())])
    torch.testing.assert_close(*results)


@pytest.mark.slow
def test_particles_average():
    model, guide, x = build("mlp")
    y = torch.arange(len(x)) % 4
    one, sixteen = (
        torch.tensor([bmrs.MeanFieldELBO("batch", num_particles=n).loss(model, guide, x, y) for _ in range(60)])
        for n in (1, 16)
    )
    assert sixteen.var() < 0.25 * one.var()


def test_a_latent_site_that_the_guide_does_not_know_is_refused():
    class WithPrior(nn.Module):
        def forward(self, output):
            return dist.Normal(output.squeeze(-1), pyro.sample("noise_scale", dist.LogNormal(0.0, 1.0)))

    net = nn.Sequential(nn.Linear(2, 3), bmrs.MultiplicativeNoise(3), nn.Linear(3, 1))
    model = bmrs.NoisyNetwork(net, likelihood=WithPrior())
    guide = bmrs.TruncatedLogNormalGuide(model)
    with pytest.raises(ValueError, match="latent site 'noise_scale'"):
        bmrs.MeanFieldELBO().differentiable_loss(model, guide, torch.randn(4, 2), torch.randn(4))


def test_unknown_granularity_is_refused():
    with pytest.raises(ValueError, match="got 'pixel'"):
        bmrs.MeanFieldELBO("pixel")


@pytest.mark.parametrize("likelihood", [None, lambda logits: dist.Categorical(logits=logits)], ids=["own", "given"])
def test_score_of_the_observations_is_that_of_their_site(likelihood):
    model, _, x = build("mlp", dtype=torch.float64)
    model = bmrs.NoisyNetwork(model.net, likelihood, num_data=100)
    y = torch.arange(len(x)) % 4
    theta = {site: torch.rand(size, dtype=torch.float64) for site, size in model.sizes.items()}
    site = poutine.trace(poutine.condition(model, theta)).get_trace(x, y).nodes["obs"]
    found = model.log_likelihood(x, y, noise=theta)
    torch.testing.assert_close(found, (site["scale"] * site["fn"].log_prob(y)).sum())


def test_supplied_noise_makes_no_site_and_is_gone_afterwards():
    model, _, x = build("mlp")
    zeros = {site: torch.zeros(size) for site, size in model.sizes.items()}
    with poutine.trace() as traced:
        plain = model.net(x)
        with supply_noise(model.noise, zeros):
            found = model.net(x)
        torch.testing.assert_close(model.net(x), plain, rtol=0, atol=0)
    assert not traced.trace.nodes
    torch.testing.assert_close(found, model.net.output(torch.zeros(len(x), 12)))
    assert not torch.allclose(found, plain)


@pytest.mark.parametrize("label", [-100, -1, 4])
def test_a_label_that_is_no_class_is_refused(label):
    model, guide, x = build("mlp")
    with pyro.validation_enabled(False), pytest.raises(IndexError, match="out of bounds"):
        bmrs.MeanFieldELBO().loss(model, guide, x, torch.full((len(x),), label))
