"""The integral of the exponential of any quadratic over an interval, whichever way it curves."""

import math
from typing import Any

import torch
from torch import Tensor

from pyro_bmrs.numerics.elementwise import Elementwise
from pyro_bmrs.numerics.interval import log_integral
from pyro_bmrs.numerics.regimes import integral_over_uniform, may_occur

__all__ = ["dawson", "log_quadratic_integral"]

_ASYMPTOTIC_FROM = 1e4  # where three terms of Dawson's asymptotic series are exact
_STRAIGHT = 1e-12  # relative curvature of an exponent over the interval, below which it is a straight line


def log_quadratic_integral(slope_low: Tensor, slope_high: Tensor, curvature: Tensor, width: Tensor) -> Tensor:
    """Return the log integral of ``exp(-E)`` over an interval, for a quadratic ``E`` whose least value there is 0.

    Args:
        slope_low: Slope of ``E`` at the lower bound, inwards.
        slope_high: Slope of ``E`` at the upper bound, inwards (the negative of its derivative).
        curvature: Second derivative of ``E``, of any sign.
        width: Of the interval.
    """
    steepest = torch.maximum(slope_low, slope_high)
    bend = curvature * width * width
    scale = torch.rsqrt(torch.where(bend.abs() > _STRAIGHT, curvature.abs(), 1 / (width * width)))
    result = log_integral(steepest * scale, width / scale) + torch.log(scale)
    if may_occur(bend < -_STRAIGHT):
        dome = _log_dome_integral(steepest * scale, width / scale) + torch.log(scale)
        result = torch.where(bend < -_STRAIGHT, dome, result)
    if may_occur(bend.abs() <= _STRAIGHT):
        ramp = torch.log(_mean_exponential(steepest * width)) + torch.log(width)
        result = torch.where(bend.abs() <= _STRAIGHT, ramp, result)
    return result


def _mean_exponential(rate: Tensor) -> Tensor:
    """Return the mean of ``exp(-rate * u)`` for uniform u in [0, 1]."""
    safe = torch.where(rate.abs() < 1e-8, 1.0, rate)
    return torch.where(rate.abs() < 1e-8, 1 - 0.5 * rate, -torch.expm1(-safe) / safe)


def _log_dome_integral(slope: Tensor, width: Tensor) -> Tensor:
    """Return log of the integral of ``exp(-slope * t + t**2 / 2)`` over [0, width], where 0 has the largest value.

    In units of the curvature; with D Dawson's function it is
    ``sqrt(2) * (D(slope / sqrt(2)) - exp(-width * (slope - width / 2)) * D((slope - width) / sqrt(2)))``.
    """
    is_narrow = (width < 1) & (width * (slope - 0.5 * width) < 1)
    narrow_width = torch.where(is_narrow, width, 0.5)
    tilt = torch.where(is_narrow, 0.5 * width * (slope - 0.5 * width), 0.25)
    mean = integral_over_uniform(tilt, -(narrow_width**2) / 8)
    narrow = torch.log(narrow_width) + torch.log1p(mean) - tilt - narrow_width**2 / 8
    wide_slope, wide_width = torch.where(is_narrow, 2.0, slope), torch.where(is_narrow, 2.0, width)
    drop = torch.exp(-wide_width * (wide_slope - 0.5 * wide_width))
    far = dawson((wide_slope - wide_width) / math.sqrt(2))
    wide = torch.log(math.sqrt(2) * (dawson(wide_slope / math.sqrt(2)) - drop * far))
    return torch.where(is_narrow, narrow, wide)


def dawson(x: Tensor) -> Tensor:
    """Return Dawson's function, ``exp(-x**2)`` times the integral of ``exp(t**2)`` from 0 to x, to full precision.

    By Rybicki's sampling theorem (Numerical Recipes, section 6.10), whose error with this step is below 1e-26.
    """
    return _Dawson.apply(x)


class _Dawson(Elementwise):
    @staticmethod
    def forward(x: Tensor) -> Tensor:
        step = 0.2
        near, beyond = x.clamp(-3, 3), x.abs() > _ASYMPTOTIC_FROM
        middle = torch.where((x.abs() > 3) & ~beyond, x, 3.0)
        small, large = torch.zeros_like(x), torch.zeros_like(x)
        centre = 2 * torch.round(0.5 * middle / step)
        offset = middle - centre * step
        for n in range(1, 48, 2):
            small = small + 2 * math.exp(-((n * step) ** 2)) * torch.sinh(2 * n * step * near) / n
            for m in (n, -n):
                large = large + torch.exp(-((offset - m * step) ** 2)) / (centre + m)
        sampled = torch.where(x.abs() > 3, large, torch.exp(-near * near) * small) / math.sqrt(math.pi)
        inverse = 0.5 / torch.where(beyond, x, 1.0)
        return torch.where(beyond, inverse * (1 + 2 * inverse**2 + 12 * inverse**4), sampled)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs, output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        x, value = ctx.saved_tensors
        beyond = x.abs() > 100  # where the difference would cancel
        inverse = torch.where(beyond, x, 1.0) ** -2
        return torch.where(beyond, -0.5 * inverse * (1 + 1.5 * inverse + 3.75 * inverse**2), 1 - 2 * x * value) * grad
