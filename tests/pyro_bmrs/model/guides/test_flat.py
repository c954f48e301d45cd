import pyro.distributions as dist
import pytest
import torch
from nets import build
from torch import nn
from torch.distributions import kl_divergence

import pyro_bmrs as bmrs


def test_parameters_exist_at_construction():
    model, guide, _ = build("lenet5")
    total = sum(model.sizes.values())
    assert guide.sizes == model.sizes
    assert {name: tuple(p.shape) for name, p in guide.named_parameters()} == {"loc": (total,), "log_scale": (total,)}


def test_posterior_prior_and_mean_are_slices_of_the_flat_ones():
    _, guide, _ = build("mlp")
    flat = guide.flat_posterior()
    assert torch.equal(torch.cat([q.loc for q in guide.posterior().values()]), flat.loc)
    assert torch.equal(torch.cat(list(guide.mean().values())), flat.mean)
    assert torch.equal(torch.cat([p.log_low for p in guide.prior().values()]), guide.log_low)


def test_kl_is_the_sum_over_what_remains():
    model, guide, _ = build("mlp", dtype=torch.float64)
    model.noise["fc2_noise.theta"].remove(torch.arange(12) < 5)
    priors = guide.prior()
    expected = sum((kl_divergence(q, priors[site]) * model.masks[site]).sum() for site, q in guide.posterior().items())
    torch.testing.assert_close(guide.kl(), expected)


def test_draws_have_the_posterior_mean():
    _, guide, _ = build("mlp", dtype=torch.float64)
    draws = guide.draw((20_000,))
    for site, mean in guide.mean().items():
        standard_error = guide.posterior()[site].stddev / 20_000**0.5
        assert ((draws[site].mean(0) - mean).abs() < 5 * standard_error).all()


def test_log_scale_is_clamped_to_its_range():
    _, guide, _ = build("mlp")
    with torch.no_grad():
        guide.log_scale.fill_(50.0)
    assert torch.allclose(guide.flat_posterior().scale, torch.tensor(5.0).exp())


def test_other_priors_are_refused_by_name():
    net = nn.Sequential(nn.Linear(2, 3), bmrs.MultiplicativeNoise(3, prior=dist.Beta(1.0, 2.0)), nn.Linear(3, 2))
    with pytest.raises(TypeError, match=r"'1.theta' has a Beta prior"):
        bmrs.TruncatedLogNormalGuide(bmrs.NoisyNetwork(net))
