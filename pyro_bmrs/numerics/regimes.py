"""Values of the three regimes: a Gaussian's integral and cumulants on an interval, without gradients."""

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from torch.special import erfcx, ndtr

__all__ = [
    "CONTINUED_FRACTION_FROM",
    "LOG_SQRT_2PI",
    "Cumulants",
    "can_branch_on",
    "cumulants",
    "integral_over_uniform",
    "log_integral_value",
    "may_occur",
    "mills",
    "tail_ratio",
]

LOG_SQRT_2PI = 0.5 * math.log(2 * math.pi)
CONTINUED_FRACTION_FROM = 3.0  # below, the plain differences lose fewer digits than the fraction needs terms

_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(8)
_CONTINUED_FRACTION_TERMS = 26
_MANY = 10_000  # elements from which on it pays to compute each in its own regime only
_FAR = 40.0  # normal tails beyond this are zero in float64


class Cumulants(NamedTuple):
    """Integral and cumulants of a Gaussian on an interval, in units of its scale (all of broadcast shape).

    Attributes:
        log_integral: Log integral of the Gaussian whose height is 1 at its mode.
        mean: Mean displacement from the mode, positive towards the far bound.
        variance: Variance.
        third: Third cumulant, positive where the tail points to the far bound.
        far_density: Density at the far bound.
    """

    log_integral: Tensor
    mean: Tensor
    variance: Tensor
    third: Tensor
    far_density: Tensor


def log_integral_value(distance: Tensor, width: Tensor) -> Tensor:
    regimes = (_narrow_log_integral, _interior_log_integral, _tail_log_integral)
    if distance.numel() < _MANY or not can_branch_on(distance):
        return _select(distance, width, *(regime(distance, width) for regime in regimes))
    narrow, inside = _is_narrow(distance, width), distance < 0
    result = torch.empty_like(distance)
    for where, regime in zip((narrow, ~narrow & inside, ~narrow & ~inside), regimes, strict=True):
        result[where] = regime(distance[where], width[where])
    return result


def cumulants(distance: Tensor, width: Tensor) -> Cumulants:
    narrow, inside = _is_narrow(distance, width), distance < 0
    found = _interior_cumulants(distance, width)
    for where, regime in ((~narrow & ~inside, _tail_cumulants), (narrow, _narrow_cumulants)):
        if may_occur(where):
            here = regime(distance, width)
            found = Cumulants(*(torch.where(where, a, b) for a, b in zip(here, found, strict=True)))
    return found


def can_branch_on(tensor: Tensor, on_device: bool = False) -> bool:
    """Return whether Python may look at values: not in a graph being traced, which would hold for these values only,
    nor where there are none, on the meta device.

    Nor on a GPU, which that stalls, unless ``on_device``, for what is asked seldom.
    """
    known = not tensor.is_meta and (on_device or not tensor.is_cuda)
    return known and get_proxy_mode() is None and not torch.compiler.is_compiling()


def may_occur(regime: Tensor) -> bool:
    """Return whether a regime is worth computing: always, where that cannot be asked."""
    if not can_branch_on(regime):
        return True
    try:
        return bool(regime.any())
    except RuntimeError:  # under vmap
        return True


def _is_narrow(distance: Tensor, width: Tensor) -> Tensor:
    return (width < 1) & (width * (distance + 0.5 * width) < 1)


def _select(distance: Tensor, width: Tensor, narrow: Tensor, interior: Tensor, tail: Tensor) -> Tensor:
    return torch.where(_is_narrow(distance, width), narrow, torch.where(distance < 0, interior, tail))


def _normal_density(x: Tensor) -> Tensor:
    return torch.exp(-0.5 * x * x - LOG_SQRT_2PI)


def mills(x: Tensor) -> Tensor:
    """Return the Mills ratio, normal tail over normal density, for x >= 0."""
    return math.sqrt(math.pi / 2) * erfcx(x / math.sqrt(2))


def tail_ratio(distance: Tensor, width: Tensor, near: Tensor) -> Tensor:
    """Return the fraction of the untruncated tail's mass that lies beyond the far bound."""
    distance = distance.clamp(min=0)
    return torch.exp(-width * (distance + 0.5 * width)) * mills(distance + width) / near


def _narrow_log_integral(distance: Tensor, width: Tensor) -> Tensor:
    distance, width = distance.clamp(-1, 1e100), width.clamp(max=1)
    slope, curvature = _narrow_shape(distance, width)
    mean = integral_over_uniform(slope, curvature)
    mode_to_middle = distance.clamp(max=0) + 0.5 * width
    drop = mode_to_middle * (distance.clamp(min=0) + 0.5 * mode_to_middle)
    return torch.log(width) + torch.log1p(mean) - drop


def integral_over_uniform(slope: Tensor, curvature: Tensor) -> Tensor:
    """Return the mean of ``exp(-slope * y - curvature * y**2) - 1`` for uniform y in [-1, 1], both at most about 1."""
    nodes, weights = (torch.as_tensor(v, dtype=slope.dtype, device=slope.device) for v in (_NODES, _WEIGHTS / 2))
    return torch.expm1(-nodes * torch.addcmul(slope.unsqueeze(-1), nodes, curvature.unsqueeze(-1))) @ weights


def _narrow_shape(distance: Tensor, width: Tensor) -> tuple[Tensor, Tensor]:
    """Return the density's log slope and curvature over the interval mapped to [-1, 1], clamped to the regime."""
    slope = (0.5 * width * (distance + 0.5 * width)).clamp(max=1.0)
    return slope, width * width / 8


def _interior_log_integral(distance: Tensor, width: Tensor) -> Tensor:
    return torch.log1p(-(ndtr(distance.clamp(max=0)) + ndtr(-(distance + width)))) + LOG_SQRT_2PI


def _tail_log_integral(distance: Tensor, width: Tensor) -> Tensor:
    near = mills(distance.clamp(min=0))
    return torch.log(near) + torch.log1p(-tail_ratio(distance, width, near))


def _narrow_cumulants(distance: Tensor, width: Tensor) -> Cumulants:
    distance, width = distance.clamp(-1, 1e100), width.clamp(max=1)
    slope, curvature = _narrow_shape(distance, width)
    nodes, weights = (torch.as_tensor(v, dtype=width.dtype, device=width.device) for v in (_NODES, _WEIGHTS / 2))
    masses = weights * torch.exp(-nodes * (slope.unsqueeze(-1) + nodes * curvature.unsqueeze(-1)))
    total = masses.sum(-1)
    masses = masses / total.unsqueeze(-1)
    mean = (masses * nodes).sum(-1)
    offsets = nodes - mean.unsqueeze(-1)
    spread = masses * offsets * offsets
    half, inside = 0.5 * width, distance.clamp(max=0)
    drop = (inside + half) * (distance.clamp(min=0) + 0.5 * (inside + half))
    return Cumulants(
        log_integral=torch.log(width * total) - drop,
        mean=half * (1 + mean) + inside,
        variance=half**2 * spread.sum(-1),
        third=half**3 * (spread * offsets).sum(-1),
        far_density=torch.exp(-slope - curvature) / (total * width),
    )


def _interior_cumulants(distance: Tensor, width: Tensor) -> Cumulants:
    near, far = distance.clamp(-_FAR, 0), (distance + width).clamp(max=_FAR)
    outside = ndtr(near) + ndtr(-far)
    mass = 1 - outside
    near_density, far_density = _normal_density(near) / mass, _normal_density(far) / mass
    mean = near_density - far_density
    var = 1 + near * near_density - far * far_density - mean**2
    third = 2 * mean + near**2 * near_density - far**2 * far_density - 3 * mean * var - mean**3
    return Cumulants(torch.log1p(-outside) + LOG_SQRT_2PI, mean, var, third, far_density)


class _Tail(NamedTuple):
    """Cumulants of a standard normal beyond a point, measured from there."""

    mean: Tensor
    variance: Tensor
    third: Tensor


def _tail_cumulants(distance: Tensor, width: Tensor) -> Cumulants:
    """Cumulants of the tail beyond the near bound, less the share of the tail beyond the far one."""
    distance = distance.clamp(min=0)
    ends = torch.stack([distance, distance + width])
    mills_at_ends = mills(ends)
    near, beyond = (_Tail(*values) for values in zip(*_untruncated_tail(ends, mills_at_ends), strict=True))
    density_ratio = torch.exp(-width * (distance + 0.5 * width))
    ratio = density_ratio * mills_at_ends[1] / mills_at_ends[0]
    kept = 1 / (1 - ratio)
    lost = ratio * kept
    # Where nothing lies beyond the far bound its moments do not matter, and may overflow.
    shift = torch.where(lost > 0, width + beyond.mean, torch.zeros_like(width))
    mean = kept * near.mean - lost * shift
    from_near, from_beyond = near.mean - mean, shift - mean
    var = kept * near.variance - lost * beyond.variance - kept * lost * (near.mean - shift) ** 2
    third = kept * (near.third + 3 * near.variance * from_near + from_near**3) - torch.where(
        lost > 0, lost * (beyond.third + 3 * beyond.variance * from_beyond + from_beyond**3), 0.0
    )
    log_integral = torch.log(mills_at_ends[0]) + torch.log1p(-ratio)
    return Cumulants(log_integral, mean, var, third, density_ratio / mills_at_ends[0] * kept)


def _untruncated_tail(start: Tensor, mills_at_start: Tensor) -> _Tail:
    """Cumulants of a standard normal beyond ``start`` >= 0, measured from there.

    The mean excess is D = 1/(start + E), E = 2/(start + F), F = 3/(start + ...): Laplace's continued fraction
    of the Mills ratio; variance D(E - D) and third cumulant D(2D^2 - 3DE + EF) follow from D' = D(D - E),
    E' = E(E - F), and none of them cancels however far the tail is.
    """
    far = start.clamp(CONTINUED_FRACTION_FROM, 1e100)
    f_far = 0.5 * (torch.sqrt(far * far + 4 * _CONTINUED_FRACTION_TERMS) - far)  # the fraction's rest, nearly
    for k in range(_CONTINUED_FRACTION_TERMS - 1, 2, -1):
        f_far = k / (far + f_far)
    e_far = 2 / (far + f_far)
    d_far = 1 / (far + e_far)
    near = start.clamp(max=CONTINUED_FRACTION_FROM)
    d_near = 1 / mills_at_start - near
    e_near = 1 / d_near - near
    f_near = 2 / e_near - near
    is_near = start < CONTINUED_FRACTION_FROM
    d, e, f = (torch.where(is_near, a, b) for a, b in ((d_near, d_far), (e_near, e_far), (f_near, f_far)))
    return _Tail(d, d * (e - d), d * (2 * d * d - 3 * d * e + e * f))
