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
    theta, *_ = _Draw.apply(uniform, loc, scale, low, high)
    return theta


class _Draw(Elementwise):
    """Works in place where it can: a step spends more on fresh memory than on arithmetic."""

    @staticmethod
    def forward(
        uniform: Tensor, loc: Tensor, scale: Tensor, low: Tensor, high: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        distance, width = interval_coordinates(loc, scale, low, high)
        step = _interior(uniform, distance, width)
        for regime, of_regime in ((distance > _TAIL_FROM, _tail), (width < _FLAT_BELOW, _flat)):
            if may_occur(regime):
                step = torch.lerp(step, of_regime(uniform, distance, width), regime.to(step))
        towards = torch.where(loc - high > low - loc, -1.0, 1.0)
        x = torch.addcmul(torch.clamp(loc, low, high), step, towards * scale)
        theta = torch.clamp(x, low, high).exp_()
        return theta, step, distance, width, towards

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
        ctx.save_for_backward(inputs[0], *output)
        ctx.mark_non_differentiable(*output[1:])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        uniform, theta, step, distance, width, towards = ctx.saved_tensors
        inside, outside = distance.clamp(max=0), distance.clamp(min=0)
        grad = grad * theta
        total = grad.sum_to_size(distance.shape)
        near = far = torch.zeros_like(distance)
        energy_near = 0.5 * inside * inside
        if may_occur(energy_near < _NIL_FROM):
            # How a bound holds a draw back: its density over that at the draw, times the mass beyond the draw.
            energy = torch.add(outside, step, alpha=0.5).mul_(step)
            at_near = energy.sub_(energy_near.clamp(max=_NIL_FROM)).exp_()
            drop = width * (distance + 0.5 * width)  # from the near bound to the far one
            if may_occur(energy_near + drop < _NIL_FROM):
                held = (at_near * torch.exp(-drop)).mul_(uniform).clamp_max_(1)
                far = held.mul_(grad).sum_to_size(distance.shape)
            held = torch.addcmul(at_near, at_near, uniform, value=-1).clamp_max_(1)
            near = held.mul_(grad).sum_to_size(distance.shape)
        # What the parameters share is taken out of the sums over draws.
        steps = (grad * step).sum_to_size(distance.shape)  # not in place: total may be grad
        free = total - near - far
        grad_scale = steps + outside * free - inside * (near + far) - width * far
        from_high = towards < 0
        return (
            None,
            free,
            towards * grad_scale,
            torch.where(from_high, far, near),
            torch.where(from_high, near, far),
        )


def _interior(uniform: Tensor, distance: Tensor, width: Tensor) -> Tensor:
    """Displacement from the mode by the inverse of the error function."""
    near, far = (
        torch.erf(end / math.sqrt(2)).clamp(-_LARGEST_ERF, _LARGEST_ERF) for end in (distance, distance + width)
    )
    centred = torch.lerp(near, far, uniform).erfinv_().mul_(math.sqrt(2))
    return centred.sub_(distance.clamp(min=0))


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
