"""Transformed normals against any prior, held to sums over a fine grid, closed forms and cumulative probabilities."""

import math

import pyro.distributions as dist
import pytest
import torch
from torch.distributions.transforms import AffineTransform, ExpTransform, SigmoidTransform

import pyro_bmrs as bmrs
from pyro_bmrs.distributions import LogitNormal
from tests.oracle import assert_close


def double(*values):
    return torch.tensor(values, dtype=torch.float64)


Q = dist.LogNormal(double(-1.0, 0.5, 2.0), double(0.5, 1.0, 0.2))


def transformed(q):
    """Return a log-normal as a distribution of which no closed form knows more than that it is a transformed normal."""
    return dist.TransformedDistribution(q.base_dist, list(q.transforms))


def summed(q, p, reduced, low=-40.0, high=8.0):
    """Return the evidence change by a sum over equidistant log(theta)."""
    log_theta = torch.linspace(low, high, 400_001, dtype=torch.float64).unsqueeze(-1)
    theta = log_theta.exp()
    terms = q.log_prob(theta) + reduced.log_prob(theta) - p.log_prob(theta) + log_theta
    return torch.logsumexp(terms, 0) + math.log((high - low) / 400_000)


@pytest.mark.parametrize(
    ("prior", "reduced"),
    [
        (dist.HalfNormal(double(1.0)), dist.HalfNormal(double(0.1))),
        (dist.HalfNormal(double(3.0)), dist.HalfNormal(double(0.001))),
        (dist.Gamma(double(2.0), double(1.0)), dist.Gamma(double(1.0), double(3.0))),
        (dist.Gamma(double(0.2), double(0.2)), dist.Gamma(double(0.2), double(200.0))),
        (dist.HalfCauchy(double(1.0)), dist.HalfCauchy(double(0.01))),
        (dist.HalfCauchy(double(1.0)), dist.HalfNormal(double(1.0))),
        (dist.HalfCauchy(double(1.0)), dist.LogNormal(double(-3.0), double(0.01))),
    ],
)
def test_log_normal_posterior(prior, reduced):
    assert_close(bmrs.evidence_change(Q, prior, reduced), summed(Q, prior, reduced), 1e-8)


@pytest.mark.parametrize("scale", [1e-6, 1e-3, 0.5, 1.9])
def test_agrees_with_the_closed_form_of_log_normals(scale):
    prior, reduced = dist.LogNormal(double(0.0), double(2.0)), dist.LogNormal(double(-5.0), double(scale))
    assert_close(bmrs.evidence_change(transformed(Q), prior, reduced), bmrs.evidence_change(Q, prior, reduced), 1e-9)


def test_logit_normal_posterior_in_a_window():
    prior = bmrs.LogUniform(double(-20.0), double(0.0))
    q = LogitNormal(double(0.0, -5.0, -18.0, -3.0), double(1.0, 2.0, 3.0, 1.0), math.exp(-20), 1.0)
    for p1, p2 in ((8, 23), (4, None), (1, 3)):
        window = bmrs.precision_window(prior, p1, p2)
        mass = q.cdf(window.support.upper_bound) - q.cdf(window.support.lower_bound)
        expected = math.log(20 / float(window.log_high - window.log_low)) + mass.log()
        assert_close(bmrs.evidence_change(q, prior, window), expected, 1e-7)


def test_the_prior_itself_changes_nothing_and_tails_that_win_diverge():
    prior = dist.HalfNormal(double(1.0))
    assert_close(bmrs.evidence_change(Q, prior, prior), torch.zeros(3).double(), 1e-9)
    for wider in (dist.HalfNormal(double(1.01)), dist.HalfCauchy(double(1.0))):
        assert torch.equal(bmrs.evidence_change(Q, prior, wider), torch.full((3,), math.inf).double())
    narrow, wide = dist.LogNormal(double(0.0), double(0.3)), dist.LogNormal(double(0.0), double(2.0))
    assert_close(bmrs.evidence_change(transformed(Q), narrow, wide), bmrs.evidence_change(Q, narrow, wide), 1e-9)


def test_points_shapes_precision_and_falling_transforms():
    prior = dist.HalfNormal(torch.ones(3))
    q = dist.LogNormal(torch.zeros(2, 1), 1.0)
    assert bmrs.evidence_change(q, prior, dist.HalfNormal(0.1)).shape == (2, 3)
    assert bmrs.evidence_change(q, prior, dist.HalfNormal(0.1)).dtype == torch.float32
    at = torch.tensor(0.5)
    assert_close(bmrs.evidence_change(q, prior, dist.Delta(at)), q.log_prob(at) - prior.log_prob(at), 1e-6)
    falling = dist.TransformedDistribution(dist.Normal(double(0.3), 1.0), [AffineTransform(0.0, -1.0), ExpTransform()])
    rising = dist.LogNormal(double(-0.3), 1.0)
    for reduced in (dist.Uniform(double(0.2), 1.0), dist.HalfNormal(double(0.2))):
        either = [bmrs.evidence_change(each, dist.HalfNormal(double(1.0)), reduced) for each in (falling, rising)]
        assert_close(*either, 1e-9)


def test_refuses_what_is_no_function_of_a_normal_or_outside_the_prior():
    prior, reduced = dist.HalfNormal(1.0), dist.HalfNormal(0.5)
    with pytest.raises(NotImplementedError, match=r"no evidence_change .* Weibull .* estimate_evidence_change"):
        bmrs.evidence_change(dist.Weibull(1.0, 2.0), prior, reduced)
    with pytest.raises(ValueError, match="LogNormal posterior has mass outside the support of the Uniform prior"):
        bmrs.evidence_change(Q, dist.Uniform(double(0.0), 1.0), dist.Uniform(double(0.0), 0.5))


def test_the_random_state_is_left_alone():
    state = torch.get_rng_state()
    bmrs.evidence_change(Q, dist.HalfCauchy(1.0), dist.Uniform(0.1, 0.2))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(("loc", "scale"), [(0.0, 1.0), (2.0, 10.0), (-8.0, 3.0)])
def test_moments_of_a_logit_normal(loc, scale):
    q = LogitNormal(double(loc), double(scale), 0.5, 2.0)
    z = torch.linspace(-12, 12, 400_001, dtype=torch.float64)
    weights = torch.exp(-z * z / 2)
    values = 0.5 + 1.5 * torch.sigmoid(loc + scale * z)
    mean = (values * weights).sum() / weights.sum()
    variance = ((values - mean).square() * weights).sum() / weights.sum()
    assert_close(q.mean, mean.reshape(1), 1e-6)
    assert_close(q.variance, variance.reshape(1), 1e-6)
    squashed = dist.TransformedDistribution(dist.Normal(loc, scale), [SigmoidTransform(), AffineTransform(0.5, 1.5)])
    at = double(0.7, 1.9)
    assert_close(q.log_prob(at), squashed.log_prob(at), 1e-6)
    assert q.expand([4, 2]).sample().shape == (4, 2)
    assert bool(q.support.check(q.sample((100,))).all())
