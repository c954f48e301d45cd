"""The truncated log-normal: the oracle's rows, quadrature, symmetries, sampling, and what it refuses."""

import pytest
import scipy.stats
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracle import (
    MODERATE,
    ROWS,
    assert_close,
    assert_finite,
    cases,
    double,
    integrate,
    midpoints,
    moderate,
    rounded_to_float32,
    rows,
)

from pyro_bmrs import TruncatedLogNormal

# How each of the oracle's values is asked for. ``middle`` is exp(-10).
QUANTITIES = {
    "log_z": lambda q, middle: q.log_normalizer,
    "mean": lambda q, middle: q.mean,
    "log_mean": lambda q, middle: q.mean.log(),
    "variance": lambda q, middle: q.variance,
    "snr": lambda q, middle: q.snr,
    "cdf_mid": lambda q, middle: q.cdf(middle),
    "icdf_1e-6": lambda q, middle: q.log_icdf(double(1e-6)),
    "icdf_half": lambda q, middle: q.log_icdf(double(0.5)),
    "icdf_1-1e-6": lambda q, middle: q.log_icdf(double(1 - 1e-6)),
}
TRULY_RELATIVE = {"mean": 1e-10, "variance": 1e-6, "snr": 1e-6}


# --- reference values ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", QUANTITIES)
def test_oracle(key):
    actual = QUANTITIES[key](rows().q, double(-10.0).exp())
    relative = key in TRULY_RELATIVE
    assert_close(actual, ROWS[key], TRULY_RELATIVE.get(key, 1e-10), floor=0.0 if relative else 1.0)


@pytest.mark.parametrize("key", QUANTITIES)
def test_oracle_in_float32(key):
    middle = torch.tensor(-10.0).exp()
    single, exact = (QUANTITIES[key](case.q, middle.to(case.loc)).detach() for case in rounded_to_float32())
    assert single.dtype == torch.float32
    floor = {"mean": 0.0, "snr": 0.0, "variance": 1e-30}.get(key, 1.0)  # variances below 1e-38 underflow
    assert_close(single, exact, 1e-4, floor)


@pytest.mark.parametrize("case", MODERATE)
def test_density_integrates_to_one(case):
    mass = integrate(lambda x: (case.q.log_prob(x.exp()) + x).exp(), case.low, case.high)
    assert_close(mass, double(1.0), 1e-10)


@pytest.mark.parametrize("case", MODERATE)
def test_moments_and_entropy_by_quadrature(case):
    q = case.q

    def expected(function):
        return integrate(lambda x: (q.log_prob(x.exp()) + x).exp() * function(x), case.low, case.high)

    assert_close(q.mean, expected(torch.exp), 1e-10, floor=0)
    assert_close(q.variance, expected(lambda x: (x.exp() - q.mean) ** 2), 1e-9, floor=0)
    assert_close(q.stddev / q.mean, 1 / q.snr, 1e-12, floor=0)
    assert_close(q.entropy(), -expected(lambda x: q.log_prob(x.exp())), 1e-10)
    assert_close(q.log_theta_mean, expected(lambda x: x), 1e-10)
    assert_close(q.log_theta_variance, expected(lambda x: (x - q.log_theta_mean) ** 2), 1e-9, floor=0)


@pytest.mark.parametrize("case", MODERATE)
def test_log_prob_and_cdf_against_scipy(case):
    x = torch.linspace(0, 1, 21, dtype=torch.float64)[1:-1] * (case.high - case.low) + case.low
    expected = truncated_normal(case)
    assert_close(case.q.log_prob(x.exp()), torch.as_tensor(expected.logpdf(x)) - x, 1e-9)
    assert_close(case.q.cdf(x.exp()), torch.as_tensor(expected.cdf(x)), 1e-9)


def truncated_normal(case):
    """Return scipy's distribution of log(theta)."""
    loc, log_scale, low, high = (value.double() for value in case)
    scale = log_scale.exp()
    return scipy.stats.truncnorm((low - loc) / scale, (high - loc) / scale, loc=loc, scale=scale)


# --- properties over the whole plane -------------------------------------------------------------------------


def rounding(q):
    """Return what rounding of log(theta) makes of a probability: a log-concave density is at most 1 / deviation."""
    return 1e-12 + 1e-13 / q.log_theta_variance.sqrt()


@pytest.mark.slow
@given(cases(), st.floats(0, 1))
def test_finite_with_finite_gradients(case, u):
    case = case.requires_grad()
    q, p = case.q, double(u)
    inside = q.icdf(p).detach().clamp(q.support.lower_bound, q.support.upper_bound)
    values = {
        "log_normalizer": q.log_normalizer,
        "log_prob": q.log_prob(inside),
        "cdf": q.cdf(inside),
        "log_icdf": q.log_icdf(p),
        "icdf": q.icdf(p),
        "rsample": q.rsample((2,)),
        "mean": q.mean,
        "variance": q.variance,
        "snr": q.snr,
        "entropy": q.entropy(),
        "log_theta_mean": q.log_theta_mean,
        "log_theta_variance": q.log_theta_variance,
    }
    assert_finite(**values)
    for name, value in values.items():
        gradients = torch.autograd.grad(value.sum(), [case.loc, case.log_scale], retain_graph=True)
        assert_finite(**{f"d {name} / d {of}": g for of, g in zip(("loc", "log_scale"), gradients, strict=True)})


@given(cases())
def test_cdf_rises_from_zero_to_one(case):
    grid = torch.linspace(0, 1, 41, dtype=torch.float64)[:, None] * (case.high - case.low) + case.low
    steps = case.q.cdf(grid.exp()).diff(dim=0)
    assert (steps >= -1e-13).all()
    assert (case.q.cdf(case.low.exp() / 2) == 0).all()
    assert_close(case.q.cdf(case.high.exp() * 2), double(1.0), 1e-15)


@given(cases(), st.floats(0, 1))
def test_icdf_inverts_cdf(case, u):
    q = case.q
    assert (abs(q.cdf(q.icdf(double(u))) - u) <= rounding(q)).all()


@given(cases())
def test_samples_lie_within_the_bounds(case):
    for dtype in (torch.float64, torch.float32):
        q = type(case)(*(value.to(dtype) for value in case)).q
        theta = q.rsample((16,))
        assert theta.dtype == dtype
        assert q.support.check(theta).all()
        assert torch.isfinite(q.log_prob(theta)).all()


@pytest.mark.slow
@given(cases(), st.floats(0.01, 0.99))
def test_shift_of_log_theta(case, u):
    """Theta is a scale-free quantity: a constant on loc and both bounds changes only its unit."""
    case = case.on_grid()
    here, there = case.q, case.shifted(7.5).q
    assert_close(there.log_normalizer, here.log_normalizer, 1e-13)
    assert_close(there.snr, here.snr, 1e-9, floor=0)
    x = case.low + u * (case.high - case.low)
    assert (abs(there.cdf((x + 7.5).exp()) - here.cdf(x.exp())) <= rounding(here)).all()


@given(cases())
def test_reflection_of_log_theta(case):
    case = case.on_grid()
    assert_close(case.reflected().q.log_normalizer, case.q.log_normalizer, 1e-13)


# --- sampling ------------------------------------------------------------------------------------------------

SAMPLED = {
    "interior": moderate(-3.0, -0.2),
    "narrow": moderate(-10.0, -5.0),
    "tail below": moderate(-60.0, 0.7),
    "tail above": moderate(20.0, 0.0),
    "nearly flat": moderate(-8.0, 12.0),
    "other bounds": moderate(-1.0, 0.5, low=-2.0, high=3.0),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("case", SAMPLED.values(), ids=SAMPLED)
def test_samples_follow_the_distribution(case, dtype):
    case = type(case)(*(value.to(dtype) for value in case))
    x = case.q.rsample((20_000,)).double().log()
    assert scipy.stats.kstest(truncated_normal(case).cdf(x), "uniform").pvalue > 1e-3


@pytest.mark.parametrize("case", SAMPLED.values(), ids=SAMPLED)
def test_mean_of_samples(case):
    theta = case.q.rsample((100_000,))
    assert abs(theta.mean() - case.q.mean) < 4 * case.q.stddev / len(theta) ** 0.5


@pytest.mark.parametrize("case", SAMPLED.values(), ids=SAMPLED)
def test_pathwise_gradients_against_differences(case):
    u = double([0.01, 0.3, 0.5, 0.9, 0.999])
    case, step = case.requires_grad(), 1e-4
    jacobian = torch.autograd.functional.jacobian(
        lambda loc, log_scale: case._replace(loc=loc, log_scale=log_scale).q.log_icdf(u), (case.loc, case.log_scale)
    )
    for name, gradient in zip(("loc", "log_scale"), jacobian, strict=True):
        above, below = (case._replace(**{name: getattr(case, name) + sign * step}) for sign in (1, -1))
        assert_close(gradient, (above.q.log_icdf(u) - below.q.log_icdf(u)) / (2 * step), 1e-6)


@pytest.mark.parametrize("case", SAMPLED.values(), ids=SAMPLED)
def test_pathwise_gradient_of_the_mean(case):
    """The mean of the draws' gradients is the gradient of the mean."""
    case = case.requires_grad()
    leaves = [case.loc, case.log_scale]
    by_draws = torch.autograd.grad(case.q.icdf(midpoints(100_000)).mean(), leaves)
    closed = torch.autograd.grad(case.q.mean, leaves)
    for drawn, expected in zip(by_draws, closed, strict=True):
        assert_close(drawn / case.q.mean, expected / case.q.mean, 1e-4)


# --- shapes and refusals -------------------------------------------------------------------------------------


def test_shapes():
    q = TruncatedLogNormal(torch.zeros(2, 1), torch.ones(3))
    assert q.batch_shape == (2, 3)
    assert q.mean.shape == q.variance.shape == q.snr.shape == q.entropy().shape == q.log_normalizer.shape == (2, 3)
    assert q.rsample((4,)).shape == (4, 2, 3)
    expanded = q.expand([5, 2, 3])
    assert expanded.batch_shape == expanded.mean.shape == (5, 2, 3)
    event = q.to_event(1)
    assert (event.batch_shape, event.event_shape) == ((2,), (3,))
    theta = event.rsample()
    assert_close(event.log_prob(theta), q.log_prob(theta).sum(-1), 1e-6)


@pytest.mark.parametrize("outside", [-1.0, 0.0, 1e-10, 1.0001, 1e10])
def test_outside_the_support(outside):
    theta = torch.tensor(outside)
    assert TruncatedLogNormal(-1.0, 0.5, validate_args=False).log_prob(theta) == -torch.inf
    assert TruncatedLogNormal(-1.0, 0.5).cdf(theta) == (outside > 1)
    with pytest.raises(ValueError, match="support"):
        TruncatedLogNormal(-1.0, 0.5, validate_args=True).log_prob(theta)


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan")])
def test_scale_must_be_positive(scale):
    with pytest.raises(ValueError, match="scale"):
        TruncatedLogNormal(0.0, scale, validate_args=True)


@pytest.mark.parametrize(("low", "high"), [(0.0, 0.0), (1.0, -1.0), (-20.0, float("inf"))])
def test_bounds_in_the_wrong_order(low, high):
    with pytest.raises(ValueError, match=r"(?s)log_low.*log_high"):
        TruncatedLogNormal(-1.0, 0.5, low, high, validate_args=True)
