"""The log-uniform against scipy's, and against mpmath where its support is narrow."""

import mpmath
import pytest
import scipy.stats
import torch
from oracle import assert_close, double, integrate

from pyro_bmrs import LogUniform

BOUNDS = [(-20.0, 0.0), (-3.0, 2.0), (-40.0, -39.0), (1.0, 1.5)]


@pytest.fixture(params=BOUNDS, ids=str)
def pair(request):
    low, high = request.param
    return LogUniform(double(low), double(high)), scipy.stats.loguniform(*double([low, high]).exp().tolist())


def test_log_prob_and_cdf(pair):
    prior, expected = pair
    theta = torch.linspace(0, 1, 9, dtype=torch.float64)[1:-1] * prior.log_width + prior.log_low
    theta = theta.exp()
    assert_close(prior.log_prob(theta), torch.as_tensor(expected.logpdf(theta)), 1e-12)
    assert_close(prior.cdf(theta), torch.as_tensor(expected.cdf(theta)), 1e-12)


def test_icdf(pair):
    prior, expected = pair
    u = double([0.0, 1e-6, 0.2, 0.5, 0.99, 1.0])
    assert_close(prior.icdf(u), torch.as_tensor(expected.ppf(u)), 1e-12, floor=0)


def test_moments_and_entropy(pair):
    prior, expected = pair
    assert_close(prior.mean, double(expected.mean()), 1e-12, floor=0)
    assert_close(prior.variance, double(expected.var()), 1e-10, floor=0)
    assert_close(prior.entropy(), double(float(expected.entropy())), 1e-12)


def test_density_integrates_to_one(pair):
    prior, _ = pair
    mass = integrate(lambda x: (prior.log_prob(x.exp()) + x).exp(), prior.log_low, prior.log_high)
    assert_close(mass, double(1.0), 1e-12)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-4)], ids=str)
@pytest.mark.parametrize("width", [1e-1, 1e-2, 1e-3, 1e-5])
def test_moments_of_a_narrow_support(width, dtype, tolerance):
    """Where E[theta^2] - E[theta]^2 would cancel."""
    prior = LogUniform(torch.tensor(-1.0, dtype=dtype), torch.tensor(-1.0 + width, dtype=dtype))
    with mpmath.workdps(50):
        low, high = (mpmath.mpf(bound.item()) for bound in (prior.log_low, prior.log_high))
        first = (mpmath.exp(high) - mpmath.exp(low)) / (high - low)
        second = (mpmath.exp(2 * high) - mpmath.exp(2 * low)) / (high - low) / 2
        mean, variance = float(first), float(second - first**2)
    assert_close(prior.mean, double(mean), tolerance, floor=0)
    assert_close(prior.variance, double(variance), tolerance, floor=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_samples_follow_the_distribution(dtype):
    prior = LogUniform(torch.tensor(-20.0, dtype=dtype), torch.tensor(0.0, dtype=dtype))
    theta = prior.rsample((20_000,))
    assert theta.dtype == dtype
    assert prior.support.check(theta).all()
    assert scipy.stats.kstest(theta.double().log() / 20 + 1, "uniform").pvalue > 1e-3


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_extreme_quantiles_stay_within_the_support(dtype):
    """Where high is small against low, low + (high - low) can round to above high."""
    prior = LogUniform(-40 * torch.rand(1000, dtype=dtype) - 1, torch.rand(1000, dtype=dtype))
    for u in (0.0, 1.0):
        assert prior.support.check(prior.icdf(torch.tensor(u, dtype=dtype))).all()


def test_samples_are_differentiable_in_the_bounds():
    low, high = double(-3.0).requires_grad_(), double(2.0).requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: LogUniform(a, b).icdf(double([0.1, 0.5, 0.8])), (low, high))


@pytest.mark.parametrize("outside", [0.0, 1e-10, 1.0001, 1e10])
def test_outside_the_support(outside):
    assert LogUniform(validate_args=False).log_prob(torch.tensor(outside)) == -torch.inf
    with pytest.raises(ValueError, match="support"):
        LogUniform(validate_args=True).log_prob(torch.tensor(outside))
    assert LogUniform().cdf(torch.tensor(outside)) == (outside > 1)


def test_the_bounds_belong_to_the_support():
    prior = LogUniform(validate_args=True)
    assert torch.isfinite(prior.log_prob(torch.tensor([-20.0, 0.0]).exp())).all()


@pytest.mark.parametrize(
    ("low", "high"), [(0.0, 0.0), (1.0, -1.0), (-torch.inf, 0.0), (torch.tensor([-2.0, 3.0]), 1.0)]
)
def test_bounds_in_the_wrong_order(low, high):
    with pytest.raises(ValueError, match=r"(?s)log_low.*log_high"):
        LogUniform(low, high, validate_args=True)


def test_expand_and_to_event():
    prior = LogUniform(torch.tensor([[-20.0], [-10.0]]), 0.0).expand([2, 3])
    assert prior.batch_shape == (2, 3)
    assert prior.log_width.shape == prior.mean.shape == prior.entropy().shape == (2, 3)
    assert prior.rsample((4,)).shape == (4, 2, 3)
    event = prior.to_event(1)
    assert (event.batch_shape, event.event_shape) == ((2,), (3,))
    theta = event.rsample()
    assert_close(event.log_prob(theta), prior.log_prob(theta).sum(-1), 1e-6)
