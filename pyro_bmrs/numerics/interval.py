"""A Gaussian on an interval: its integral and cumulants, with exact gradients."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pyro_bmrs.numerics.elementwise import Elementwise
from pyro_bmrs.numerics.regimes import cumulants, log_integral_value

__all__ = [
    "interval_coordinates",
    "log_integral",
    "mean_displacement",
    "relative_energy",
    "variance",
]


def interval_coordinates(loc: Tensor, scale: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``(distance, width)`` of the Gaussian with centre ``loc`` on ``[low, high]``."""
    return torch.maximum(low - loc, loc - high) / scale, (high - low) / scale


def relative_energy(x: Tensor, loc: Tensor, scale: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Return how far the log density at ``x`` lies below that at the mode, a number >= 0 inside the interval.

    Equal to ``((x - loc)**2 - (mode - loc)**2) / (2 * scale**2)`` without its cancellation.
    """
    mode = torch.clamp(loc, low, high)
    step = (x - mode) / scale
    return step * (0.5 * step + (mode - loc) / scale)


def log_integral(distance: Tensor, width: Tensor) -> Tensor:
    """Return the log integral of the Gaussian whose height is 1 at its mode, per unit of scale.

    The normaliser of the truncated normal is ``log_integral - mode**2 / 2 - log(2 pi) / 2`` with ``mode``
    the standardised mode; the mass itself is that times ``scale``.
    """
    return _LogIntegral.apply(*torch.broadcast_tensors(distance, width))


def mean_displacement(distance: Tensor, width: Tensor) -> Tensor:
    """Return the mean displacement from the mode towards the far bound, in units of scale."""
    return _MeanDisplacement.apply(*torch.broadcast_tensors(distance, width))


def variance(distance: Tensor, width: Tensor) -> Tensor:
    """Return the variance of the Gaussian on the interval, in units of scale squared."""
    return _Variance.apply(*torch.broadcast_tensors(distance, width))


def _far_density(distance: Tensor, width: Tensor) -> Tensor:
    mode = distance.clamp(min=0)
    far = distance + width
    return torch.exp(-0.5 * (far - mode) * (far + mode) - log_integral(distance, width))


class _LogIntegral(Elementwise):
    @staticmethod
    def forward(distance: Tensor, width: Tensor) -> Tensor:
        return log_integral_value(distance, width)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        distance, width = ctx.saved_tensors
        return -mean_displacement(distance, width) * grad, _far_density(distance, width) * grad


class _MeanDisplacement(Elementwise):
    @staticmethod
    def forward(distance: Tensor, width: Tensor) -> Tensor:
        return cumulants(distance, width).mean

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs, output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        distance, width, mean = ctx.saved_tensors
        to_far = width - mean + distance.clamp(max=0)
        grad_distance = (distance < 0).to(grad) - variance(distance, width)
        return grad_distance * grad, to_far * _far_density(distance, width) * grad


class _Variance(Elementwise):
    @staticmethod
    def forward(distance: Tensor, width: Tensor) -> Tensor:
        return cumulants(distance, width).variance

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        distance, width = ctx.saved_tensors
        _, mean, var, third, far_density = cumulants(distance, width)
        to_far = width - mean + distance.clamp(max=0)
        grad_width = torch.where(far_density > 0, (to_far**2 - var) * far_density, 0.0)
        return -third * grad, grad_width * grad
