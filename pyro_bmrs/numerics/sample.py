"""What a training step asks of Gaussians on intervals: draws with implicit gradients, and their KL from the uniform.

Draws are quantiles of uniforms. Work on the parameters is done in float64 at their own shape; work on each draw in
float32, with few passes over them. That is good to 1e-4 of the deviation on average, and to 1e-2 for draws rarer than
one in a thousand, in which float32 has few digits left; ``quantile`` is exact. The KL is exact, see ``divergence``.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pyro_bmrs.numerics.divergence import divergence
from pyro_bmrs.numerics.elementwise import Elementwise
from pyro_bmrs.numerics.regimes import may_occur, mills

__all__ = ["sample", "sample_and_kl"]

_TAIL_FROM = 2.0  # distances from which on float32 has few numbers between the error function and 1
_FAR_FROM = 300.0  # distances from which on a tail is an exponential's, to 1e-5, of which only the slope matters
_FLAT_BELOW = 1e-3  # widths over which the error function hardly changes, and neither does the density's curvature
_LARGEST_ERF = 1 - 2**-24  # in float32
_NIL_FROM = 40.0  # energies of a bound at which it pulls no draw, whose own are below 20


def sample(uniform: Tensor, loc: Tensor, scale: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Return the exponential of a draw in ``[low, high]`` for each ``uniform`` in [0, 1).

    All are float32; ``uniform`` is of any shape that the others (of equal shape) broadcast to. Differentiable in the
    parameters. Quantiles are taken from the bound nearest to ``loc``: at which end is no matter to a distribution.
    """
    theta, *_ = _DrawAndKL.apply(uniform, loc, scale, low, high)
    return theta


def sample_and_kl(uniform: Tensor, loc: Tensor, scale: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """Return the same, and the KL from the uniform on ``[low, high]`` in nats, of the parameters' shape.

    Differentiable in ``loc`` and ``scale``; bounds are constants.
    """
    theta, kl, *_ = _DrawAndKL.apply(uniform, loc, scale, low.detach(), high.detach())
    return theta, kl


class _Position(NamedTuple):
    """Where a Gaussian sits on its interval, in units of its scale, from the bound that is nearest.

    ``distance = inside + outside``: the one not above 0, the other not below. ``towards`` is the scale, negative where
    the way into the interval leads down.
    """

    distance: Tensor
    width: Tensor
    inside: Tensor
    outside: Tensor
    towards: Tensor

    @classmethod
    def of(cls, loc: Tensor, scale: Tensor, low: Tensor, high: Tensor) -> "_Position":
        loc, scale = loc.double(), scale.double()
        below, above = low - loc, loc - high
        distance = torch.maximum(below, above).div_(scale)
        outside = distance.clamp(min=0)
        towards = torch.where(above > below, -scale, scale)
        return cls(distance, (high.double() - low).div_(scale), distance - outside, outside, towards)


class _DrawAndKL(Elementwise):
    """Works in place where it can: a step spends more on fresh memory and on calls than on arithmetic."""

    @staticmethod
    def forward(uniform: Tensor, loc: Tensor, scale: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, ...]:
        position = _Position.of(loc, scale, low, high)
        found = divergence(position.distance, position.width)
        slopes = (found.by_distance / position.towards).neg_(), found.by_log_scale / scale
        ends = torch.stack([position.distance, position.distance + position.width]).mul_(math.sqrt(0.5))
        ends = torch.erf(ends).clamp_(-_LARGEST_ERF, _LARGEST_ERF)
        rows = -2 if loc.dim() else -1
        shared = torch.stack([*ends, *slopes, *position], rows).to(loc)  # all that is kept, once, and in float32
        near, far, _, _, distance, width, _, outside, towards = shared.unbind(rows)
        step = torch.lerp(near, far, uniform).erfinv_().mul_(math.sqrt(2)).sub_(outside)
        in_tail, flat = distance > _TAIL_FROM, width < _FLAT_BELOW
        if may_occur(in_tail):
            step = torch.where(in_tail, _tail(uniform, position, found.integral), step)
        if may_occur(flat):
            step = torch.where(flat, _flat(uniform, position), step)
        theta = torch.addcmul(torch.clamp(loc, low, high), step, towards)
        return theta.clamp_(low, high).exp_(), found.kl.to(loc), step, shared

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
        ctx.save_for_backward(inputs[0], output[0], *output[2:])
        ctx.mark_non_differentiable(*output[2:])
        ctx.set_materialize_grads(False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, grad_kl: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        uniform, theta, step, shared = ctx.saved_tensors
        _, _, by_loc, by_scale, _, width, inside, outside, towards = shared.unbind(max(-2, -shared.dim()))
        grad = torch.zeros_like(theta) if grad is None else grad * theta
        near, far = _held(grad, uniform, step, inside, outside, width)
        held = near + far
        free = grad.sum_to_size(width.shape) - held  # not in place: with one draw of each, the sum is what is summed
        along = torch.addcmul((grad * step).sum_to_size(width.shape), outside, free)
        along = along - inside * held - width * far
        from_high = towards < 0
        along = torch.where(from_high, -along, along)
        bounds: tuple[Tensor | None, Tensor | None] = (None, None)
        if ctx.needs_input_grad[3]:
            bounds = torch.where(from_high, far, near), torch.where(from_high, near, far)
        if grad_kl is not None:
            free, along = torch.addcmul(free, by_loc, grad_kl), torch.addcmul(along, by_scale, grad_kl)
        return None, free, along, *bounds


def _held(
    grad: Tensor, uniform: Tensor, step: Tensor, inside: Tensor, outside: Tensor, width: Tensor
) -> tuple[Tensor, Tensor]:
    """Return how much of the draws' gradients the near bound takes, and the far one, of the parameters' shape.

    A bound holds a draw back by its density over that at the draw, times the mass beyond the draw. What the parameters
    share is taken out of the sums over draws, so that no factor gets too small to be computed quickly.
    """
    at_near = 0.5 * inside * inside
    at_far = torch.add(outside + inside, width, alpha=0.5).mul_(width).add_(at_near)
    energies = torch.stack([at_near, at_far])
    densities = torch.where(energies < _NIL_FROM, torch.exp(-energies.clamp(max=_NIL_FROM)), 0.0)
    weighted = torch.add(outside, step, alpha=0.5).mul_(step).exp_().mul_(grad)
    far = (weighted * uniform).sum_to_size(width.shape)
    near = torch.addcmul(weighted, weighted, uniform, value=-1).sum_to_size(width.shape)
    return near * densities[0], far * densities[1]


def _tail(uniform: Tensor, position: _Position, integral: Tensor) -> Tensor:
    r"""Displacement from the near bound in a normal tail, by its survival.

    With cumulated hazard ``h`` and Mills ratio m, ``distance * t + t**2 / 2 = h - g(h)``, where
    ``g = log(m(distance) / m(distance + t))``, of slope ``1 - x m(x)`` in h, is small. It is taken as ``a L + b L**3``
    with ``L = log(1 + c h)``; a, b and c follow from its first three derivatives at 0, which are rational in
    Laplace's continued fraction ``m = 1 / (x + d), d = 1 / (x + e), e = 2 / (x + f)``. Far out, g is that of a nearer
    tail with its slope made smaller.
    """
    start = position.distance.clamp(min=_TAIL_FROM)
    nearer = start.clamp(max=_FAR_FROM)
    ratio, of_all = mills(torch.stack([nearer, start]))
    d = ratio.reciprocal() - nearer
    e = d.reciprocal() - nearer
    f = (2 / e).sub_(nearer)
    b = (f + d).sub_(e, alpha=2).mul_(d).div_(e * e).div_(6)
    c = (ratio * e).mul_((nearer / start).square_())
    minus_kept, a, b, minus_c, half, bend = (
        torch.stack([-integral / of_all, d / e, b, -c, 0.5 * start, 2 / (start * start)]).to(uniform).unbind()
    )
    minus_hazard = (uniform * minus_kept).log1p_()
    slowed = (minus_hazard * minus_c).log1p_()
    energy = (slowed * slowed).mul_(b).add_(a).mul_(slowed).add_(minus_hazard).neg_()
    return energy.div_((energy * bend).add_(1).sqrt_().add_(1).mul_(half))


def _flat(uniform: Tensor, position: _Position) -> Tensor:
    """Displacement from the mode where the density is exponential over the interval."""
    width, distance = position.width.clamp(max=_FLAT_BELOW), position.distance.clamp(min=-_FLAT_BELOW)
    slope = width * torch.add(distance, width, alpha=0.5)
    slope = torch.where(slope.abs() < 1e-6, 1e-6, slope)
    parts = torch.stack([torch.expm1(-slope), -width / slope, distance.clamp(max=0)])
    to_end, unit, inside = parts.to(uniform).unbind()
    return torch.addcmul(inside, (uniform * to_end).log1p_(), unit)
