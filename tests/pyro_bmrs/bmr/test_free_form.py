"""Free-form evidence from sums of gradients, held to sums over a fine grid."""

import math

import pyro.distributions as dist
import pytest
import torch

import pyro_bmrs as bmrs
from pyro_bmrs.bmr.free_form import GradientSums, free_form_factor
from tests.oracle import assert_close

LOW, HIGH = torch.full((4,), -20.0).double(), torch.full((4,), 0.5).double()
LEVEL = torch.tensor([0.02, -0.001, 0.0, 0.3], dtype=torch.float64)  # of the gradient at theta = 0, per example
CURVATURE = torch.tensor([0.05, 0.001, 0.0, 0.2], dtype=torch.float64)  # by which it falls
N = 500


def drawn(examples=2000, noise=0.0, seed=0):
    """Return sums of gradients of examples whose log likelihood is a parabola in their noise."""
    generator = torch.Generator().manual_seed(seed)
    theta = torch.rand(examples, 4, generator=generator, dtype=torch.float64)
    error = noise * torch.randn(examples, 4, generator=generator, dtype=torch.float64)
    return GradientSums.of(theta, LEVEL - CURVATURE * theta + error)


def summed(prior, kl_weight=1.0, slope=LEVEL, curvature=CURVATURE):
    """Return the evidence by a sum over equidistant log(theta)."""
    u = torch.linspace(-20, 0.5, 400_001, dtype=torch.float64).unsqueeze(-1)
    theta = u.exp()
    gain = N / kl_weight * (slope * theta - 0.5 * curvature * theta.square())
    terms = gain + prior.log_prob(theta.clamp(float(LOW[0].exp()), float(HIGH[0].exp()))) + u
    return -(torch.logsumexp(terms, 0) + math.log(20.5 / 400_000))


@pytest.mark.parametrize("prior", [bmrs.LogUniform(LOW, HIGH), bmrs.TruncatedLogNormal(LOW + 15, LOW + 23, LOW, HIGH)])
@pytest.mark.parametrize("kl_weight", [1.0, 5.0])
def test_parabolas(prior, kl_weight):
    found = free_form_factor(drawn(), prior, N, kl_weight)
    assert_close(found.delta_f, summed(prior, kl_weight), 1e-4)
    assert float(found.standard_error.max()) < 1e-5
    assert float(found.delta_f[2]) == 0.0  # exactly, where the data say nothing
    u = torch.linspace(-20, 0.5, 20_001, dtype=torch.float64)
    mass = torch.trapezoid(found.log_density(u).exp(), u, dim=0)
    assert_close(mass, torch.ones(4).double(), 1e-2)
    assert found.log_density(u).shape == (20_001, 4)


@pytest.mark.slow
def test_standard_errors_are_those_of_repeated_draws():
    prior = bmrs.LogUniform(LOW, HIGH)
    found = [free_form_factor(drawn(noise=0.5, seed=seed), prior, N, 1.0) for seed in range(40)]
    spread = torch.stack([each.delta_f for each in found]).std(0)
    expected = torch.stack([each.standard_error for each in found]).mean(0)
    assert ((spread / expected).log().abs() < 0.7).all()


@pytest.mark.slow
def test_the_curvature_is_drawn_towards_the_gauss_newton_one():
    prior = bmrs.LogUniform(LOW, HIGH)
    scores = CURVATURE.sqrt() * torch.randn(4000, 4, generator=torch.Generator().manual_seed(0)).double()
    exact, few = summed(prior), {"examples": 200, "noise": 0.3}
    plain, guided = [], []
    for seed in range(20):
        sums = drawn(**few, seed=seed)
        plain.append(free_form_factor(sums, prior, N, 1.0).delta_f - exact)
        guided.append(free_form_factor(sums.with_curvature(scores), prior, N, 1.0).delta_f - exact)
    assert (torch.stack(guided).abs().mean(0) < torch.stack(plain).abs().mean(0)).all()


def test_sums_add_and_other_priors_are_refused():
    first, second = drawn(seed=1).with_curvature(torch.ones(5, 4)), drawn(seed=2)
    both = first + second
    assert torch.equal(both.values, first.values + second.values)
    assert (both.curvature_count, both.curvature.tolist()) == (5, [5.0] * 4)
    with pytest.raises(NotImplementedError, match="log-uniform and truncated log-normal priors, but got a Beta"):
        free_form_factor(first, dist.Beta(torch.ones(4), torch.ones(4)), N, 1.0)
