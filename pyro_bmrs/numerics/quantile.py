"""Quantiles of a Gaussian on an interval, exact, with implicit gradients."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.special import ndtr, ndtri

from pyro_bmrs.numerics.elementwise import Elementwise
from pyro_bmrs.numerics.interval import interval_coordinates
from pyro_bmrs.numerics.regimes import CONTINUED_FRACTION_FROM, log_integral_value, may_occur, mills, tail_ratio

__all__ = ["quantile"]

_FLAT_BELOW = 1e-6  # widths at which rounding in the normal quantile, magnified by the scale, would show


def quantile(probability: Tensor, loc: Tensor, scale: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Return ``x`` in ``[low, high]`` below which ``probability`` of the mass lies, in the dtype of ``loc``.

    ``probability`` is float64 of any shape that the others (of equal shape and dtype) broadcast to.
    Differentiable in every argument by the implicit gradients: ``dx/dloc = 1 - w_low - w_high`` with ``w_low`` and
    ``w_high`` in [0, 1] the pulls of the two bounds.
    """
    x, _, _ = _Quantile.apply(probability, loc, scale, low, high)
    return x


class _Quantile(Elementwise):
    """Work on the parameters is done in float64 at their own shape, work on each draw in their dtype."""

    @staticmethod
    def forward(
        probability: Tensor, loc: Tensor, scale: Tensor, low: Tensor, high: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        parameters = (loc.double(), scale.double(), low.double(), high.double())
        distance, width = interval_coordinates(*parameters)
        from_high = loc - high > low - loc
        from_near = torch.where(from_high, 1 - probability, probability)
        from_far = torch.where(from_high, probability, 1 - probability)
        step = _displacement(from_near, from_far, distance, width)
        signed_scale = torch.where(from_high, -parameters[1], parameters[1])
        x = torch.addcmul(torch.clamp(parameters[0], *parameters[2:]), step, signed_scale).to(loc)
        return torch.clamp(x, low, high), step.to(loc), from_near.to(loc)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        ctx.save_for_backward(*inputs[1:], *output[1:])
        ctx.mark_non_differentiable(*output[1:])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        loc, scale, low, high, step, from_near = ctx.saved_tensors
        distance, width = interval_coordinates(loc.double(), scale.double(), low.double(), high.double())
        from_high = loc - high > low - loc
        inside, outside = distance.clamp(max=0), distance.clamp(min=0)
        drop_near = (0.5 * inside**2).to(loc)
        drop_far = (0.5 * (distance + width - outside) * (distance + width + outside)).to(loc)
        drop = step * torch.add(outside.to(loc), step, alpha=0.5)  # log density at the mode less that at x
        largest = 80.0 if loc.dtype == torch.float32 else 700.0  # exponents within it neither overflow nor underflow
        pull_near = (drop - drop_near).clamp(-largest, largest).exp_().mul_(1 - from_near).clamp(0, 1)
        pull_far = (drop - drop_far).clamp(-largest, largest).exp_().mul_(from_near).clamp(0, 1)
        pull = pull_near + pull_far
        # What the parameters share is taken out of the sums over draws.
        pulled, free, far, steps = (
            (grad * each).sum_to_size(loc.shape).double() for each in (pull, 1 - pull, pull_far, step)
        )
        grad_scale = (steps + outside * free - inside * pulled - width * far).to(loc)
        near, far = (pulled - far).to(loc), far.to(loc)
        grad_probability = None
        if ctx.needs_input_grad[0]:
            log_mass = log_integral_value(distance, width)
            grad_probability = scale.double() * torch.exp((drop.double() + log_mass).clamp(max=700)) * grad
        return (
            grad_probability,
            free.to(loc),
            torch.where(from_high, -grad_scale, grad_scale),
            torch.where(from_high, far, near),
            torch.where(from_high, near, far),
        )


def _displacement(from_near: Tensor, from_far: Tensor, distance: Tensor, width: Tensor) -> Tensor:
    """Return the displacement from the mode, towards the far bound, of the quantile.

    ``from_near`` and ``from_far`` are the mass towards either bound, one less the other, each with its own digits.
    """
    inside, outside = distance.clamp(max=0), distance.clamp(min=0)
    step = _interior_quantile(from_near, from_far, distance, width) - outside
    in_tail, flat = distance > CONTINUED_FRACTION_FROM, width < _FLAT_BELOW
    if may_occur(in_tail):
        step = torch.where(in_tail, _tail_quantile(from_near, from_far, distance, width), step)
    if may_occur(flat):
        step = torch.where(flat, _flat_quantile(from_near, distance, width) + inside, step)
    return torch.clamp(step, inside, width + inside)


def _interior_quantile(from_near: Tensor, from_far: Tensor, distance: Tensor, width: Tensor) -> Tensor:
    """Invert the normal CDF from its nearer end."""
    far = distance + width
    above = from_far * ndtr(-distance) + from_near * ndtr(-far)
    below = from_far * ndtr(distance) + from_near * ndtr(far)
    z = ndtri(torch.minimum(above, below))
    return torch.where(above < below, -z, z)


def _flat_quantile(from_near: Tensor, distance: Tensor, width: Tensor) -> Tensor:
    """Quantile of the exponential that the density is when its curvature over the interval is zero."""
    slope = width * (distance + 0.5 * width)
    curved = -torch.log1p(from_near * torch.expm1(-slope)) / slope
    return width * torch.where(slope.abs() < 1e-12, from_near, curved)


def _tail_quantile(from_near: Tensor, from_far: Tensor, distance: Tensor, width: Tensor) -> Tensor:
    """Solve for the tail's survival by Newton's method, in logs: the start is right but for a Mills ratio."""
    start = distance.clamp(min=CONTINUED_FRACTION_FROM)
    at_start = mills(start)
    ratio = tail_ratio(start, width, at_start)
    log_survival = torch.where(
        from_near < 0.5,
        torch.log1p(-from_near * (1 - ratio)),
        torch.log(from_far + from_near * ratio).clamp(min=-1e4),
    )
    step = -2 * log_survival / (start + torch.sqrt(start**2 - 2 * log_survival))
    for _ in range(3):
        reached = mills(start + step)
        step = step - reached * (step * (start + 0.5 * step) - torch.log(reached / at_start) + log_survival)
    return torch.where(from_far <= 0, width, step.clamp(min=0))
