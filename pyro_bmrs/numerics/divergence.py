"""KL divergence of a Gaussian on an interval from the uniform, with exact gradients: it stands in every training step.

With energy ``E`` (0 at the mode, ``distance * t + t**2 / 2`` at a displacement ``t``), density ``exp(-E) / I`` and its
values ``f`` at the bounds, ``KL = log(width) - log(I) - <E>``. Its slopes in the parameters are covariances under the
density, as for any exponential family: ``-2 var(E)`` in log scale and ``cov(E, t)`` in distance. Where the centre lies
inside, the latter is nearly zero less zero, and is taken from the bounds instead. One Gauss-Legendre rule, over the
part of the interval where the density is not negligible, gives all averages: sums of positive terms, which lose no
digits wherever the Gaussian sits, without a choice between regimes.
"""

from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pyro_bmrs.numerics.elementwise import Elementwise

__all__ = ["Divergence", "divergence", "kl_from_uniform", "kl_of_truncated"]

_NODES = 36  # with the energy below: values are exact to 1e-12, slopes to 1e-9
_HIGHEST_ENERGY = 30.0  # what lies beyond adds less than that to any of the averages
_ZERO_FROM = 700.0  # energies from which on a density is zero


def kl_of_truncated(loc: Tensor, scale: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Return KL(truncated normal || uniform on the same interval), in nats, in float64, from parameters of any dtype.

    The formula of Neklyudov et al. (2017), ``log(width) - entropy``, rearranged so that no term is large
    where the result is not.
    """
    kl, *_ = _KLFromUniform.apply(loc, scale, low, high)
    return kl


def kl_from_uniform(distance: Tensor, width: Tensor) -> Tensor:
    """Return the same from the coordinates of the interval."""
    distance, width = torch.broadcast_tensors(distance, width)
    return kl_of_truncated(-distance, torch.ones_like(width), torch.zeros_like(width), width)


class Divergence(NamedTuple):
    """The KL of a Gaussian on an interval from the uniform, and what else the same averages give.

    Attributes:
        kl: In nats.
        by_distance: Its slope in ``distance``, at constant width.
        by_log_scale: Its slope in the log scale, at constant centre and bounds.
        gain_far: What the far bound, moved outwards by one scale, adds to minus the rest of it than log(width).
        integral: Of the Gaussian whose height is 1 at its mode, per unit of scale.
    """

    kl: Tensor
    by_distance: Tensor
    by_log_scale: Tensor
    gain_far: Tensor
    integral: Tensor


def divergence(distance: Tensor, width: Tensor) -> Divergence:
    """Return the KL and its slopes, without gradients, from coordinates of equal shape in float64.

    At ``middle + half * node`` the energy is a quadratic in the node: one matrix product makes it for all nodes, and
    another takes the first moments of the nodes, of which all averages are made.
    """
    minus_powers, weighted_powers = _gauss_legendre(distance.device)
    inside, outside = distance.clamp(max=0), distance.clamp(min=0)
    reach = 2 * _HIGHEST_ENERGY / (outside + torch.sqrt(outside * outside + 2 * _HIGHEST_ENERGY))
    far, start = width + inside, torch.maximum(inside, -reach)
    half = torch.minimum(far, reach).sub_(start).mul_(0.5)
    middle = start + half
    constant, linear = torch.add(outside, middle, alpha=0.5).mul_(middle), torch.add(outside, middle).mul_(half)
    square = 0.5 * half * half
    moments = (torch.stack([constant, linear, square], -1) @ minus_powers).exp_() @ weighted_powers
    total = moments[..., 0]
    first, second, third, fourth = (moments[..., 1:] / moments[..., :1]).unbind(-1)
    # Variances and covariance of the node and its square, and from these the energy's.
    of_node = torch.addcmul(second, first, first, value=-1)
    of_both = torch.addcmul(third, first, second, value=-1)
    of_square = torch.addcmul(fourth, second, second, value=-1)
    with_node = torch.addcmul(linear * of_node, square, of_both)
    variance = torch.addcmul(linear * with_node, square, torch.addcmul(linear * of_both, square, of_square))
    integral, energy = half * total, torch.addcmul(constant, linear, first).addcmul_(square, second)
    kl = torch.log(width / integral).sub_(energy).clamp_(min=0)
    # What a bound, moved outwards, adds to minus the KL: its density there, and how much more energy than average.
    ends = torch.stack([inside, far])
    at_ends = torch.add(outside, ends, alpha=0.5).mul_(ends).clamp_max_(_ZERO_FROM)
    gain_near, gain_far = torch.exp(-at_ends).div_(integral).mul_(at_ends.sub_(energy).add_(1)).unbind()
    by_distance = torch.where(distance < 0, gain_near - gain_far, half * with_node)
    return Divergence(kl, by_distance, variance.mul_(-2), gain_far, integral)


class _KLFromUniform(Elementwise):
    """The KL and all its partial derivatives at once."""

    @staticmethod
    def forward(loc: Tensor, scale: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, ...]:
        scale, above_low, above_high = scale.double(), loc.double() - low, loc.double() - high
        from_high = above_high + above_low > 0
        distance, width = torch.maximum(-above_low, above_high) / scale, (high.double() - low) / scale
        found = divergence(distance, width)
        by_distance, by_width = found.by_distance / scale, (width.reciprocal() - found.gain_far) / scale
        by_loc = torch.where(from_high, by_distance, -by_distance)
        return found.kl, by_loc, found.by_log_scale / scale, by_distance, by_width, from_high

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
        ctx.save_for_backward(*output[1:])
        ctx.mark_non_differentiable(*output[1:])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        by_loc, by_scale, by_distance, by_width, from_high = ctx.saved_tensors
        by_bounds: tuple[Tensor | None, Tensor | None] = None, None
        if any(ctx.needs_input_grad[2:]):
            near = torch.where(from_high, -by_distance, by_distance)
            by_low = torch.where(from_high, 0.0, near) - by_width
            by_high = torch.where(from_high, near, 0.0) + by_width
            by_bounds = by_low * grad, by_high * grad
        return by_loc * grad, by_scale * grad, *by_bounds


@cache
def _gauss_legendre(device: torch.device) -> tuple[Tensor, Tensor]:
    """Return minus the powers of nodes on [-1, 1], of shape (3, nodes), and powers times weights, (nodes, 5).

    In float64; kept, because copies to a device would stall it.
    """
    nodes, weights = np.polynomial.legendre.leggauss(_NODES)
    powers = nodes ** np.arange(5)[:, None]
    minus_powers = -powers[:3]
    return torch.as_tensor(minus_powers, device=device), torch.as_tensor((weights * powers).T.copy(), device=device)
