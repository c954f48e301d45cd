"""Draws from a Gaussian on an interval, with implicit gradients: quantiles of uniforms, cheap enough for every step.

Work on the parameters is done in float64 at their own shape; work on each draw in float32, with few passes over them.
That is good to 1e-4 of the deviation on average, and to 1e-2 for draws rarer than one in a thousand, in which float32
has few digits left; ``quantile`` is exact.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pyro_bmrs.numerics.elementwise import Elementwise
from pyro_bmrs.numerics.interval import interval_coordinates
from pyro_bmrs.numerics.regimes import may_occur, mills, tail_ratio

__all__ = ["draw"]

_TAIL_FROM = 2.0  # distances from which on float32 has few numbers between the error function and 1
_FLAT_BELOW = 1e-3  # widths over which the error function hardly changes, and neither does the density's curvature
_LARGEST_ERF = 1 - 2**-24  # in float32
_NIL_FROM = 40.0  # energies of a bound at which it pulls no draw, whose own are below 20; more would only underflow


def draw(uniform: Tensor, loc: Tensor, scale: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Return the exponential of a draw in ``[low, high]`` for each ``uniform`` in [0, 1).

    All are float32; ``uniform`` is of any shape that the others (of equal shape) broadcast to. Differentiable in the
    parameters. Quantiles are taken from the bound nearest to ``loc``: at which end is no matter to a distribution.
    """
    theta, _ = _Draw.apply(uniform, loc, scale, low, high)
    return theta


class _Draw(Elementwise):
    """Works in place where it can: a step spends more on fresh memory than on arithmetic."""

    @staticmethod
    def forward(uniform: Tensor, loc: Tensor, scale: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        distance, width = interval_coordinates(loc.double(), scale.double(), low.double(), high.double())
        step = _interior(uniform, distance, width)
        for regime, of_regime in ((distance > _TAIL_FROM, _tail), (width < _FLAT_BELOW, _flat)):
            if may_occur(regime):
                step = torch.lerp(step, of_regime(uniform, distance, width), regime.to(step))
        from_high = loc - high > low - loc
        x = torch.where(from_high, -scale, scale) * step
        return torch.clamp(x.add_(torch.clamp(loc, low, high)), low, high).exp_(), step

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(*inputs, *output)
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        uniform, loc, scale, low, high, theta, step = ctx.saved_tensors
        distance, width = interval_coordinates(loc.double(), scale.double(), low.double(), high.double())
        inside, outside = distance.clamp(max=0), distance.clamp(min=0)
        grad = grad * theta
        energy = torch.add(outside.to(step), step, alpha=0.5).mul_(step)
        energy_near = (0.5 * inside * inside).clamp(max=_NIL_FROM)
        energy_far = 0.5 * (distance + width - outside) * (distance + width + outside)
        far, held_far = torch.zeros_like(distance), None
        if may_occur(energy_far < _NIL_FROM):
            held_far = (energy - energy_far.clamp(max=_NIL_FROM).to(step)).exp_().mul_(uniform).clamp(max=1)
            far = (grad * held_far).sum_to_size(loc.shape).double()
        # How a bound holds a draw back: its density over that at the draw, times the mass beyond the draw.
        held = energy.sub_(energy_near.to(step)).exp_()
        held = held.mul_(1 - uniform).clamp(max=1)
        freedom = 1 - held if held_far is None else 1 - held.add_(held_far)
        # What the parameters share is taken out of the sums over draws.
        free, total, steps = (part.sum_to_size(loc.shape).double() for part in (freedom.mul_(grad), grad, step * grad))
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
    centred = torch.lerp(near, far, uniform).erfinv_().mul_(math.sqrt(2))
    return centred.sub_(distance.clamp(min=0).to(uniform))


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
    minus_hazard = (uniform * -kept.to(uniform)).log1p_()
    slowed = (minus_hazard * -c).log1p_()
    energy = (slowed * slowed).mul_(b).add_(a).mul_(slowed).add_(minus_hazard).neg_()
    return energy.div_((energy * bend).add_(1).sqrt_().add_(1).mul_(half))


def _flat(uniform: Tensor, distance: Tensor, width: Tensor) -> Tensor:
    """Displacement from the mode where the density is exponential over the interval."""
    width, inside = width.clamp(max=_FLAT_BELOW), distance.clamp(-_FLAT_BELOW, 0)
    slope = width * (distance.clamp(min=-_FLAT_BELOW) + 0.5 * width)
    slope = torch.where(slope.abs() < 1e-6, 1e-6, slope)
    risen = (uniform * torch.expm1(-slope).to(uniform)).log1p_()
    return risen.mul_((-width / slope).to(uniform)).add_(inside.to(uniform))
