"""KL(truncated log-normal || log-uniform): the oracle's rows, quadrature, draws, limits and symmetries."""

import mpmath
import pytest
import torch
from hypothesis import given
from oracle import (
    HIGH,
    LOW,
    MODERATE,
    ROWS,
    Case,
    assert_close,
    assert_finite,
    cases,
    double,
    midpoints,
    rounded_to_float32,
    rows,
)
from torch.distributions import Independent, kl_divergence

from pyro_bmrs import LogUniform, TruncatedLogNormal


def kl(case):
    return kl_divergence(case.q, case.p)


def kl_and_gradients(case):
    case = case.requires_grad()
    value = kl(case)
    return dict(
        zip(
            ("kl", "kl_grad_loc", "kl_grad_log_scale"),
            (value, *torch.autograd.grad(value.sum(), [case.loc, case.log_scale])),
            strict=True,
        )
    )


@pytest.mark.parametrize("key", ["kl", "kl_grad_loc", "kl_grad_log_scale"])
def test_oracle(key):
    assert_close(kl_and_gradients(rows())[key], ROWS[key], 1e-10)


@pytest.mark.parametrize("key", ["kl", "kl_grad_loc", "kl_grad_log_scale"])
def test_oracle_in_float32(key):
    single, exact = map(kl_and_gradients, rounded_to_float32())
    assert single[key].dtype == torch.float32
    assert_close(single[key], exact[key], 1e-4)


@pytest.mark.parametrize("case", MODERATE)
def test_quadrature(case):
    loc, log_scale, low, high = (mpmath.mpf(value.item()) for value in case)
    scale = mpmath.exp(log_scale)
    edges = [low, *(x for x in (loc - 4 * scale, loc, loc + 4 * scale) if low < x < high), high]

    def log_density(x):
        return -(((x - loc) / scale) ** 2) / 2

    log_mass = mpmath.log(mpmath.quad(lambda x: mpmath.exp(log_density(x)), edges))
    expected = mpmath.quad(
        lambda x: mpmath.exp(log_density(x) - log_mass) * (log_density(x) - log_mass + mpmath.log(high - low)), edges
    )
    assert_close(kl(case), double(float(expected)), 1e-10)


@pytest.mark.parametrize("case", MODERATE)
def test_mean_log_ratio_of_draws(case):
    theta = case.q.icdf(midpoints(100_000)).clamp(case.low.exp(), case.high.exp())
    assert_close(kl(case), (case.q.log_prob(theta) - case.p.log_prob(theta)).mean(), 1e-3)


@pytest.mark.parametrize("case", MODERATE)
def test_gradients_against_differences(case):
    step = 1e-5
    gradients = kl_and_gradients(case)
    for name in ("loc", "log_scale"):
        above, below = (kl(case._replace(**{name: getattr(case, name) + sign * step})) for sign in (1, -1))
        assert_close(gradients[f"kl_grad_{name}"], (above - below) / (2 * step), 1e-8)


def test_limits():
    flat = Case(double([-30.0, -5.0, 10.0]), double(14.0), double(LOW), double(HIGH))
    assert_close(kl(flat), double(0.0), 1e-9)
    # Far inside, the entropy of a normal; far outside, of an exponential.
    scale = double([1e-4, 1e-2])
    inside = Case(double(-10.0), scale.log(), double(LOW), double(HIGH))
    assert_close(kl(inside), torch.log(20 / scale) - 0.5 * torch.log(double(2 * torch.pi)) - 0.5, 1e-12)
    outside = Case(double([-60.0, 40.0]), double(1e-4).log(), double(LOW), double(HIGH))
    assert_close(kl(outside), torch.log(20 * 40 / double(1e-4) ** 2) - 1, 1e-8)


@given(cases())
def test_finite_and_not_negative(case):
    values = kl_and_gradients(case)
    assert_finite(**values)
    assert (values["kl"] >= -1e-14).all()  # rounding, where it is zero


@given(cases())
def test_shift_and_reflection_of_log_theta(case):
    case = case.on_grid()
    assert_close(kl(case.shifted(7.5)), kl(case), 1e-13)
    assert_close(kl(case.reflected()), kl(case), 1e-13)


@given(cases())
def test_gradients_in_float32_are_finite(case):
    assert_finite(**kl_and_gradients(Case(*(value.float() for value in case))))


def test_independent_sums_over_the_event():
    case = Case(double([[-3.0, -18.0, 2.0], [-9.0, 0.0, -30.0]]), double([[-1.0], [2.0]]), double(LOW), double(HIGH))
    q, p = Independent(case.q, 1), Independent(case.p.expand([2, 3]), 1)
    assert kl_divergence(q, p).shape == (2,)
    assert_close(kl_divergence(q, p), kl(case).sum(-1), 1e-14)


def test_prior_wider_than_the_posterior():
    """A uniform that spreads over more costs the log of how much more."""
    q = TruncatedLogNormal(double(-3.0), double(0.5), -6.0, -1.0)
    narrow, wide = (kl_divergence(q, LogUniform(*map(double, bounds))) for bounds in ((-6.0, -1.0), (-20.0, 0.0)))
    assert_close(wide, narrow + torch.log(double(4.0)), 1e-14)


@pytest.mark.parametrize(("low", "high"), [(-20.0, -5.0), (-10.0, 0.0), (-30.0, -25.0)])
def test_infinite_where_the_posterior_reaches_outside_the_prior(low, high):
    q = TruncatedLogNormal(torch.tensor(-3.0), torch.tensor(0.5))
    assert kl_divergence(q, LogUniform(low, high)) == torch.inf
