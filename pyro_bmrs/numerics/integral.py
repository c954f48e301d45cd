"""The log of the integral of a positive function over an interval, many at once: for functions whose log is smooth."""

import math
from collections.abc import Callable
from functools import cache

import numpy as np
import torch
from torch import Tensor

__all__ = ["log_integral"]

_FARTHEST = 1e5  # where infinite intervals are first looked at
_GRID = 257
_NEGLIGIBLE = 45.0  # nats below the largest value of the integrand
_ZOOMS = 60
_PANELS = (16, 32, 64, 128, 256, 512, 1024)
_TOLERANCE = 1e-10  # nats


def log_integral(log_integrand: Callable[[Tensor], Tensor], low: Tensor, high: Tensor) -> Tensor:
    """Return the log of the integral of ``exp(log_integrand)`` from ``low`` to ``high``, to 1e-10 nats.

    The region that matters is found by zooming in on the largest values; a Gauss-Legendre rule follows there, with
    twice as many panels each time, until the result stands still. Of several peaks far narrower than their distances
    one may be overlooked.

    Args:
        log_integrand: From points of shape ``(points, *shape)``, float64, to the logs of the integrands there; may be
            -inf.
        low: Lower ends, of shape ``shape``, float64; -inf is allowed.
        high: Upper ends.

    Returns:
        Of shape ``shape``: +inf where the integrand is largest at an infinite end, -inf where it is zero.

    Raises:
        ArithmeticError: If the result does not stand still: the integrand is not smooth.
    """
    steps = torch.linspace(-1, 1, _GRID, dtype=torch.float64, device=low.device).reshape(-1, *(1,) * low.dim())
    z = torch.sinh(math.asinh(_FARTHEST) * steps).clamp(low, high)
    values = log_integrand(z)
    diverges = _largest_at_infinity(values, low, high)
    for _ in range(_ZOOMS):
        top = values.amax(0)
        matters = values > top - _NEGLIGIBLE
        begin = (matters.int().argmax(0) - 1).clamp_min(0)
        end = (_GRID - matters.flip(0).int().argmax(0)).clamp_max(_GRID - 1)
        a, b = (z.gather(0, each.unsqueeze(0))[0] for each in (begin, end))
        if bool((matters.sum(0) > _GRID // 3).all()):
            break
        z = a + (b - a) * (steps + 1) / 2
        values = log_integrand(z)
    nothing = top == -torch.inf
    settled = diverges | nothing
    result = _composite(log_integrand, a, b, _PANELS[0])
    for panels in _PANELS[1:]:
        before, result = result, _composite(log_integrand, a, b, panels)
        if bool((settled | ((result - before).abs() <= _TOLERANCE * (1 + before.abs()))).all()):
            return torch.where(diverges, torch.inf, torch.where(nothing, -torch.inf, result))
    raise ArithmeticError("the integral does not stand still: the integrand is not smooth")


def _largest_at_infinity(values: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Return whether the integrand is infinite, or largest at the last point that is known towards an infinite end."""
    top, at = values.max(0)
    known = (values > -torch.inf).int()
    at_start = (at == known.argmax(0)) & low.isinf()
    at_end = (at == _GRID - 1 - known.flip(0).argmax(0)) & high.isinf()
    return (top == torch.inf) | ((top > -torch.inf) & (at_start | at_end))


def _composite(log_integrand: Callable[[Tensor], Tensor], a: Tensor, b: Tensor, panels: int) -> Tensor:
    """Return the log of the integral by a Gauss-Legendre rule on each of ``panels`` panels."""
    nodes, log_weights = (each.to(a.device).reshape(-1, *(1,) * a.dim()) for each in _gauss_legendre())
    width = (b - a) / panels
    total = torch.full_like(a, -torch.inf)
    for panel in range(panels):
        z = a + (panel + 0.5 + 0.5 * nodes) * width
        total = torch.logaddexp(total, torch.logsumexp(log_integrand(z) + log_weights, 0))
    return total + torch.log(width / 2)


@cache
def _gauss_legendre() -> tuple[Tensor, Tensor]:
    nodes, weights = np.polynomial.legendre.leggauss(16)
    return torch.from_numpy(nodes), torch.from_numpy(np.log(weights))
