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

__all__ = ["kl_from_uniform"]

_NODES = 44  # exact to rounding for a whole bell; fewer lose digits quickly
_HIGHEST_ENERGY = 40.0  # what lies beyond adds less than rounding to any of the averages
_NIL_FROM = 700.0  # energies from which on a density is nil


def kl_from_uniform(distance: Tensor, width: Tensor) -> Tensor:
    """Return KL(truncated normal || uniform on the same interval), in nats.

    The formula of Neklyudov et al. (2017), ``log(width) - entropy``, rearranged so that no term is large
    where the result is not.
    """
    kl, _, _ = _KLFromUniform.apply(*torch.broadcast_tensors(distance, width))
    return kl


class _KLFromUniform(Elementwise):
    """The KL and both its partial derivatives at once."""

    @staticmethod
    def forward(distance: Tensor, width: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        inside, outside = distance.clamp(max=0), distance.clamp(min=0)
        far = width + inside
        reach = 2 * _HIGHEST_ENERGY / (outside + torch.sqrt(outside * outside + 2 * _HIGHEST_ENERGY))
        start, end = torch.maximum(inside, -reach), torch.minimum(far, reach)
        half = 0.5 * (end - start)
        integral, energy, mean, product = _averages(start, half, outside)
        kl = torch.log(width / integral) - energy
        # What a bound, moved outwards, adds to minus the KL: its density there, and how much more energy than average.
        energy_far = (far * (outside + 0.5 * far)).clamp(max=_NIL_FROM)
        energy_near = (0.5 * inside * inside).clamp(max=_NIL_FROM)
        gain_far = torch.exp(-energy_far) / integral * (1 + energy_far - energy)
        gain_near = torch.exp(-energy_near) / integral * (1 + energy_near - energy)
        grad_distance = torch.where(distance < 0, gain_near - gain_far, product - energy * mean)
        return kl.clamp(min=0), grad_distance, 1 / width - gain_far

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: tuple[Tensor, ...]) -> None:
        ctx.save_for_backward(*output[1:])
        ctx.mark_non_differentiable(*output[1:])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor, Tensor]:
        grad_distance, grad_width = ctx.saved_tensors
        return grad_distance * grad, grad_width * grad


def _averages(start: Tensor, half: Tensor, outside: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the integral I, and the averages of energy, displacement from the mode, and of the two's product."""
    nodes, weights = _gauss_legendre(start.device)
    displacement = (half.unsqueeze(-1) * nodes).add_(start.unsqueeze(-1))
    energy = torch.add(outside.unsqueeze(-1), displacement, alpha=0.5).mul_(displacement)
    mass = torch.neg(energy).exp_()
    total, mean_energy = mass @ weights, energy.mul_(mass) @ weights
    mean, mean_product = mass.mul_(displacement) @ weights, energy.mul_(displacement) @ weights
    return half * total, mean_energy / total, mean / total, mean_product / total


@cache
def _gauss_legendre(device: torch.device) -> tuple[Tensor, Tensor]:
    """Return nodes on [0, 2] and weights, in float64; kept, because copies to a device would stall it."""
    nodes, weights = np.polynomial.legendre.leggauss(_NODES)
    return torch.as_tensor(1 + nodes, device=device), torch.as_tensor(weights, device=device)
