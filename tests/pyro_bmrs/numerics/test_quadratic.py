"""Integrals of exponentials of quadratics of either curvature, and Dawson's function behind them."""

import mpmath
import pytest
import scipy.special
import torch
from hypothesis import given
from hypothesis import strategies as st

from pyro_bmrs import numerics


def test_dawson_against_scipy():
    x = torch.cat(
        [torch.linspace(-12, 12, 2001, dtype=torch.float64), torch.logspace(-12, 150, 200, dtype=torch.float64)]
    )
    expected = torch.from_numpy(scipy.special.dawsn(x.numpy()))
    torch.testing.assert_close(numerics.dawson(x), expected, rtol=2e-14, atol=0)


def test_dawson_gradient():
    x = torch.tensor([-4.0, -3.0, -0.3, 0.0, 0.9, 2.9, 3.1, 20.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(numerics.dawson, x)
    far = torch.tensor([99.0, 101.0, 1e5, -1e20], dtype=torch.float64, requires_grad=True)
    expected = -0.5 / far**2 - 0.75 / far**4 - 1.875 / far**6
    torch.testing.assert_close(torch.autograd.grad(numerics.dawson(far).sum(), far)[0], expected, rtol=1e-9, atol=0)


def by_quadrature(slope_low, curvature, width):
    """Log integral of exp(-(E - min E)), the interval cut finely towards the minimum."""
    slope_low, curvature, width = map(mpmath.mpf, (slope_low, curvature, width))

    def energy(t):
        return slope_low * t + curvature * t * t / 2

    stationary = [-slope_low / curvature] if curvature > 0 else []
    candidates = [mpmath.mpf(0), width, *(min(max(t, 0), width) for t in stationary)]
    least = min(candidates, key=energy)
    cuts = {min(max(least + sign * width / mpmath.mpf(10) ** k, 0), width) for k in range(10) for sign in (1, -1)}
    grid = sorted({mpmath.mpf(0), width, *cuts})
    return float(mpmath.log(mpmath.quad(lambda t: mpmath.exp(energy(least) - energy(t)), grid)))


@pytest.mark.parametrize("curvature", [-40.0, -0.8, -1e-3, -1e-10, -1e-15, 0.0, 1e-15, 1e-11, 1e-3, 2.0, 300.0])
@pytest.mark.parametrize("slope", [-30.0, -1.0, 0.0, 1e-4, 0.7, 200.0])
@pytest.mark.parametrize("width", [0.05, 1.0, 20.0])
def test_integral_against_quadrature(curvature, slope, width):
    values = (slope, -(slope + curvature * width), curvature, width)
    found = numerics.log_quadratic_integral(*(torch.tensor(v, dtype=torch.float64) for v in values))
    assert float(found) == pytest.approx(by_quadrature(slope, curvature, width), rel=1e-10, abs=1e-10)


@given(st.floats(-1e3, 1e3), st.floats(-1e3, 1e3), st.floats(1e-3, 50))
def test_integral_and_gradient_are_finite(slope, curvature, width):
    slope, curvature, width = (
        torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (slope, curvature, width)
    )
    value = numerics.log_quadratic_integral(slope, -(slope + curvature * width), curvature, width)
    assert torch.isfinite(value)
    assert all(bool(torch.isfinite(g)) for g in torch.autograd.grad(value, (slope, curvature, width)))
