"""Bayesian linear regression, where the evidence of every nested model is known: reduction must find it exactly.

y = X w + noise of known scale, w ~ Normal(0, 1.5). The exact posterior is the guide; each of the other models is
reached by fixing weights at zero, once fitted and never again.
"""

from itertools import combinations

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from oracle import assert_close, double
from torch import Tensor

from pyro_bmrs.bmr.reduction import reduce
from pyro_bmrs.bmr.search import greedy_search

FEATURES, NOISE, PRIOR_SCALE = 6, 0.7, 1.5
TRUE = double([1.2, 0.0, -0.9, 0.0, 0.0, 0.8])
SUBSETS = [subset for size in range(FEATURES + 1) for subset in combinations(range(FEATURES), size)]


def simulate(seed, size=60):
    """Return correlated features and observations."""
    generator = torch.Generator().manual_seed(seed)
    x, shared, noise = (
        torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((size, FEATURES), (size, 1), (size,))
    )
    x = x + 0.7 * shared
    return x, x @ TRUE + NOISE * noise


def model(x, y):
    w = pyro.sample("w", dist.Normal(torch.zeros(FEATURES).double(), PRIOR_SCALE).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(x @ w, NOISE), obs=y)


def correlated_model(x, y):
    """The same with a prior that is written as one multivariate normal."""
    pyro.sample(
        "w", dist.MultivariateNormal(torch.zeros(FEATURES).double(), PRIOR_SCALE**2 * torch.eye(FEATURES).double())
    )
    pyro.sample("y", dist.Normal(x.sum(-1), NOISE).to_event(1), obs=y)


def exact_posterior(x, y, prior_scale: float | Tensor = PRIOR_SCALE):
    precision = x.T @ x / NOISE**2 + torch.eye(x.shape[1]).double() / prior_scale**2
    return dist.MultivariateNormal(torch.linalg.solve(precision, x.T @ y / NOISE**2), precision_matrix=precision)


def exact_guide(x, y):
    pyro.sample("w", exact_posterior(x, y))


def log_evidence(x, y, scales):
    """Log density of the observations, with the weights integrated out."""
    covariance = NOISE**2 * torch.eye(len(x)).double() + (x * scales**2) @ x.T
    return dist.MultivariateNormal(torch.zeros(len(x)).double(), covariance).log_prob(y)


def log_evidence_by_least_squares(x, y, kept):
    """The same for the features ``kept``, through the normal equations, in NumPy."""
    x, y = x.numpy()[:, kept], y.numpy()
    precision = x.T @ x / NOISE**2 + np.eye(len(kept)) / PRIOR_SCALE**2
    loc = np.linalg.solve(precision, x.T @ y / NOISE**2)
    residual = y @ y / NOISE**2 - loc @ precision @ loc
    log_determinant = np.linalg.slogdet(precision)[1] + 2 * len(kept) * np.log(PRIOR_SCALE)
    return -0.5 * (residual + log_determinant + len(y) * np.log(2 * np.pi * NOISE**2))


def mask_of(removed):
    mask = torch.zeros(FEATURES, dtype=torch.bool)
    mask[list(removed)] = True
    return mask


def point():
    return dist.Delta(torch.zeros(FEATURES).double(), event_dim=1)


@pytest.mark.parametrize("program", [model, correlated_model])
@pytest.mark.parametrize("seed", range(3))
def test_every_nested_model_has_its_log_bayes_factor(program, seed):
    x, y = simulate(seed)
    reduction = reduce(exact_guide, program, {"w": point()}, x, y)
    full = log_evidence(x, y, torch.full((FEATURES,), PRIOR_SCALE).double())
    for removed in SUBSETS:
        scales = PRIOR_SCALE * (~mask_of(removed)).double()
        kept = [feature for feature in range(FEATURES) if feature not in removed]
        expected = log_evidence(x, y, scales) - full
        delta_f = reduction.joint({"w": mask_of(removed)})
        assert_close(delta_f, expected, 1e-9)
        by_least_squares = log_evidence_by_least_squares(x, y, kept) - full.item()
        assert_close(delta_f, double(by_least_squares), 1e-9)


def test_each_weight_alone_is_its_element():
    x, y = simulate(0)
    reduction = reduce(exact_guide, model, {"w": point()}, x, y)
    alone = torch.stack([reduction.joint({"w": mask_of([feature])}) for feature in range(FEATURES)])
    assert_close(reduction.delta_f["w"], alone, 1e-12)
    assert (reduction.joint() - alone.sum()).abs() > 1  # the weights are correlated


@pytest.mark.parametrize("scale", [1e-3, 0.1, 1.0, 2.0])
def test_other_prior_scales(scale):
    x, y = simulate(1)
    narrow = dist.Normal(torch.zeros(FEATURES).double(), scale).to_event(1)
    reduction = reduce(exact_guide, model, {"w": narrow}, x, y)
    full = log_evidence(x, y, torch.full((FEATURES,), PRIOR_SCALE).double())
    for removed in SUBSETS[::5]:
        scales = torch.where(mask_of(removed), double(scale), double(PRIOR_SCALE))
        assert_close(reduction.joint({"w": mask_of(removed)}), log_evidence(x, y, scales) - full, 1e-9)
    posterior, expected = reduction.reduced_posteriors["w"], exact_posterior(x, y, double(scale))
    assert_close(posterior.loc, expected.loc, 1e-9)
    assert_close(posterior.covariance_matrix, expected.covariance_matrix, 1e-9)


@pytest.mark.parametrize("seed", range(8))
def test_greedy_search_finds_the_true_support(seed):
    x, y = simulate(seed, size=400)
    reduction = reduce(exact_guide, model, {"w": point()}, x, y)
    found = greedy_search(lambda removed: reduction.joint({"w": mask_of(removed)}), range(FEATURES))
    assert sorted(found.removed) == torch.nonzero(TRUE == 0).flatten().tolist()
    best = max(SUBSETS, key=lambda removed: reduction.joint({"w": mask_of(removed)}).item())
    assert sorted(found.removed) == list(best)
    assert_close(double(found.delta_f[-1]), reduction.joint({"w": mask_of(best)}), 1e-9)
