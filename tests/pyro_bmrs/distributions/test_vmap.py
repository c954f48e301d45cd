"""Values and gradients under torch.func.vmap equal those one by one, so that replicas can be trained together."""

import pytest
import torch
from torch.distributions import kl_divergence
from torch.func import grad, vmap

import pyro_bmrs as bmrs


def posterior(loc, log_scale):
    return bmrs.TruncatedLogNormal(loc, log_scale.exp(), validate_args=False)


def kl(loc, log_scale, _):
    return kl_divergence(posterior(loc, log_scale), bmrs.LogUniform(validate_args=False)).sum()


def draw(loc, log_scale, uniform):
    return posterior(loc, log_scale).icdf(uniform).sum()


def moments(loc, log_scale, _):
    q = posterior(loc, log_scale)
    return (q.mean + q.snr.log() + q.log_normalizer).sum()


@pytest.mark.parametrize("function", [kl, draw, moments])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_vmap(function, dtype):
    loc = torch.linspace(-25, 3, 28, dtype=dtype).reshape(4, 7)
    log_scale = torch.linspace(4, -4, 28, dtype=dtype).reshape(4, 7)
    uniform = torch.rand(4, 5, 7, dtype=torch.float64)
    for evaluate in (function, grad(function, argnums=(0, 1))):
        together = vmap(evaluate)(loc, log_scale, uniform)
        apart = [evaluate(*each) for each in zip(loc, log_scale, uniform, strict=True)]
        stacked = torch.stack(apart) if torch.is_tensor(together) else tuple(map(torch.stack, zip(*apart, strict=True)))
        torch.testing.assert_close(together, stacked, rtol=1e-5, atol=1e-5)
