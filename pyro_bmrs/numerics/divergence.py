"""KL divergence of a Gaussian on an interval from the uniform, with exact gradients: it stands in every training step.

With energy ``E`` (0 at the mode, ``distance * t + t**2 / 2`` or ``z**2 / 2``), density ``exp(-E) / I`` and its values
``f`` at the bounds, ``KL = log(width) - log(I) - <E>``. One Gauss-Legendre rule, over the part of the interval where
the density is not nil in float64, gives all of its averages: sums of positive terms, which lose no digits wherever the
Gaussian sits, without a choice between regimes.
"""

from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pyro_bmrs.numerics.elementwise import Elementwise

__all__ = ["kl_from_uniform", "kl_of_truncated"]

_NODES = 44  # exact to rounding for a whole bell; fewer lose digits quickly
_HIGHEST_ENERGY = 40.0  # what lies beyond adds less than rounding to any of the averages
_NIL_FROM = 700.0  # energies from which on a density is nil


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


class _KLFromUniform(Elementwise):
    """The KL and all its partial derivatives at once."""

    @staticmethod
    def forward(loc: Tensor, scale: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, ...]:
        scale, above_low, above_high = scale.double(), loc.double() - low, loc.double() - high
        from_high = above_high + above_low > 0
        distance, width = torch.maximum(-above_low, above_high) / scale, (high.double() - low) / scale
        kl, by_distance, by_width = _kl_and_gradients(distance, width)
        by_distance, by_width = by_distance / scale, by_width / scale
        by_loc = torch.where(from_high, by_distance, -by_distance)
        return kl, by_loc, -(distance * by_distance + width * by_width), by_distance, by_width, from_high

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


def _kl_and_gradients(distance: Tensor, width: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    inside, outside = distance.clamp(max=0), distance.clamp(min=0)
    far = width + inside
    reach = 2 * _HIGHEST_ENERGY / (outside + torch.sqrt(outside * outside + 2 * _HIGHEST_ENERGY))
    start, end = torch.maximum(inside, -reach), torch.minimum(far, reach)
    integral, energy, mean, product = _averages(start, 0.5 * (end - start), outside)
    kl = torch.log(width / integral) - energy
    # What a bound, moved outwards, adds to minus the KL: its density there, and how much more energy than average.
    ends = torch.stack([inside, far])
    at_ends = torch.add(outside, ends, alpha=0.5).mul_(ends).clamp_max_(_NIL_FROM)
    gain_near, gain_far = (torch.exp(-at_ends) / integral * (1 + at_ends - energy)).unbind()
    by_distance = torch.where(distance < 0, gain_near - gain_far, torch.addcmul(product, energy, mean, value=-1))
    return kl.clamp(min=0), by_distance, width.reciprocal() - gain_far


def _averages(start: Tensor, half: Tensor, outside: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the integral I, and the averages of energy and, where ``start`` is 0, of displacement and the product.

    At ``start + half * node`` the energy is a quadratic in the node: one matrix product makes it for all nodes, and
    another takes the first moments of the nodes, of which all averages are made.
    """
    minus_powers, weighted_powers = _gauss_legendre(start.device)
    constant, linear = torch.add(outside, start, alpha=0.5).mul_(start), torch.add(outside, start).mul_(half)
    square = 0.5 * half * half
    mass = (torch.stack([constant, linear, square], -1) @ minus_powers).exp_()
    moments = mass @ weighted_powers
    total = moments[..., 0]
    first, second, third = (moments[..., 1:] / moments[..., :1]).unbind(-1)
    energy = torch.addcmul(constant, linear, first).addcmul(square, second)
    return half * total, energy, half * first, torch.addcmul(linear * second, square, third).mul_(half)


@cache
def _gauss_legendre(device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the energy's powers of nodes on [0, 2], of shape (3, nodes), and powers times weights, (nodes, 4).

    In float64; kept, because copies to a device would stall it.
    """
    nodes, weights = np.polynomial.legendre.leggauss(_NODES)
    powers = (1 + nodes) ** np.arange(4)[:, None]
    minus_powers = -powers[:3]
    return torch.as_tensor(minus_powers, device=device), torch.as_tensor((weights * powers).T.copy(), device=device)
