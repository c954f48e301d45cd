"""Draws from a Gaussian on an interval, with implicit gradients: quantiles of uniforms, cheap enough for every step.

Work on the parameters is done in float64 at their own shape; work on each draw in float32, with few passes over them.
That is good to about 1e-4 of a draw's displacement, which no number of draws would show; ``quantile`` is exact.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pyro_bmrs.numerics.interval import interval_coordinates
from pyro_bmrs.numerics.regimes import may_occur, mills, tail_ratio

__all__ = ["draw"]

_TAIL_FROM = 2.0  # distances from which on float32 has few numbers between the error function and 1
_FLAT_BELOW = 1e-3  # widths over which the error function hardly changes, and neither does the density's curvature
_LARGEST_ERF = 1 - 2**-24  # in float32
_NIL_FROM = 40.0  # energies of a bound at which it pulls no draw, whose own are below 20; more would only underflow


def draw(uniform: Tensor, loc: Tensor, scale: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Return a draw in ``[low, high]`` for each ``uniform`` in [0, 1), differentiable in the parameters.

    All are float32; ``uniform`` is of any shape that the others (of equal shape) broadcast to. Towards which bound a
    quantile is taken makes no difference to its distribution, so that it is always away from the nearest.
    """
    x, _ = _Draw.apply(uniform, loc, scale, low, high)
    return x


class _Draw(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(uniform: Tensor, loc: Tensor, scale: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        distance, width = interval_coordinates(loc.double(), scale.double(), low.double(), high.double())
        step = _interior(uniform, distance, width)
        for regime, of_regime in ((distance > _TAIL_FROM, _tail), (width < _FLAT_BELOW, _flat)):
            if may_occur(regime):
                step = torch.lerp(step, of_regime(uniform, distance, width), regime.to(step))
        from_high = loc - high > low - loc
        x = torch.addcmul(torch.clamp(loc, low, high), step, torch.where(from_high, -scale, scale))
        return torch.clamp(x, low, high), step

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(*inputs, output[1])
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        uniform, loc, scale, low, high, step = ctx.saved_tensors
        distance, width = interval_coordinates(loc.double(), scale.double(), low.double(), high.double())
        inside, outside = distance.clamp(max=0), distance.clamp(min=0)
        energy = step * torch.add(outside.to(step), step, alpha=0.5)
        energy_near = (0.5 * inside * inside).clamp(max=_NIL_FROM).to(step)
        held = torch.exp(energy - energy_near)  # by the near bound: its density over the draw's, less its share
        held = torch.addcmul(held, held, uniform, value=-1).clamp_(max=1)
        energy_far = 0.5 * (distance + width - outside) * (distance + width + outside)
        far = torch.zeros_like(distance)
        if may_occur(energy_far < _NIL_FROM):
            held_far = torch.exp(energy - energy_far.clamp(max=_NIL_FROM).to(step)).mul(uniform).clamp_(max=1)
            held, far = held + held_far, (grad * held_far).sum_to_size(loc.shape).double()
        # What the parameters share is taken out of the sums over draws.
        free, total, steps = (part.sum_to_size(loc.shape).double() for part in (grad * (1 - held), grad, grad * step))
        pulled = total - free
        from_high = loc - high > low - loc
        grad_scale = (steps + outside * free - inside * pulled - width * far).to(loc)
        near, far = (pulled - far).to(loc), far.to(loc)
        return (
            None,
            free.to(loc),
            torch.where(from_high, -grad_scale, grad_scale),
            torch.where(from_high, far, near),
            torch.where(from_high, near, far),
        )


def _interior(uniform: Tensor, distance: Tensor, width: Tensor) -> Tensor:
    """Displacement from the mode by the inverse of the error function."""
    ends = torch.erf(torch.stack([distance, distance + width]) / math.sqrt(2))
    near, far = ends.clamp(-_LARGEST_ERF, _LARGEST_ERF).to(uniform)
    centred = torch.erfinv(torch.lerp(near, far, uniform))
    return torch.add(-distance.clamp(min=0).to(uniform), centred, alpha=math.sqrt(2))


def _tail(uniform: Tensor, distance: Tensor, width: Tensor) -> Tensor:
    r"""Displacement from the near bound in a normal tail, by its survival.

    With cumulated hazard ``h`` and Mills ratio m, ``distance * t + t**2 / 2 = h - g(h)``, where
    ``g = log(m(distance) / m(distance + t))``, of slope ``1 - x m(x)`` in h, is small. It is taken as ``a L + b L**3``
    with ``L = log(1 + c h)``; a, b and c follow from its first three derivatives at 0, which are rational in
    Laplace's continued fraction ``m = 1 / (x + d), d = 1 / (x + e), e = 2 / (x + f)``.
    """
    start = distance.clamp(min=_TAIL_FROM)
    near = mills(start)
    kept = 1 - tail_ratio(start, width, near)
    root = torch.sqrt(start * start + 32)
    f = 0.5 * (root - start) * (1 - 1 / (root * root))  # the fraction's rest from its eighth term
    for k in range(7, 2, -1):
        f = k / (start + f)
    e = 2 / (start + f)
    d = 1 / (start + e)
    a, b, c, half, bend = (
        value.to(uniform) for value in (d / e, d * (d + f - 2 * e) / (6 * e * e), near * e, 0.5 * start, 2 / start**2)
    )
    minus_hazard = torch.log1p(uniform * -kept.to(uniform))
    slowed = torch.log1p(minus_hazard * -c)
    energy = torch.addcmul(minus_hazard, slowed, torch.addcmul(a, slowed * slowed, b)).neg_()
    return energy / torch.addcmul(half, half, torch.sqrt(1 + energy * bend))


def _flat(uniform: Tensor, distance: Tensor, width: Tensor) -> Tensor:
    """Displacement from the mode where the density is exponential over the interval."""
    width, inside = width.clamp(max=_FLAT_BELOW), distance.clamp(-_FLAT_BELOW, 0)
    slope = width * (distance.clamp(min=-_FLAT_BELOW) + 0.5 * width)
    slope = torch.where(slope.abs() < 1e-6, 1e-6, slope)
    risen = torch.log1p(uniform * torch.expm1(-slope).to(uniform))
    return torch.addcmul(inside.to(uniform), risen, (-width / slope).to(uniform))
