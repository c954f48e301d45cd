"""One training step, run plainly, compiled, or captured: from a batch to changed parameters."""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pyro_bmrs.svi.captured import CapturedStep
from pyro_bmrs.warn import warn

if TYPE_CHECKING:
    from lightning_fabric import Fabric

__all__ = ["NonFiniteLossError", "Step", "eager_step", "make_step"]

Step = Callable[[Any, Tensor, float, float], Tensor]
"""From inputs, observations, KL weight and batch weight (see ``NoisyObjective``) to the loss (or one per model)."""


class NonFiniteLossError(FloatingPointError):
    """Says that a loss is not finite, before any parameter has been changed by it."""

    def __init__(self, losses: Tensor) -> None:
        super().__init__(f"the loss became {losses.tolist()}")
        self.losses = losses


def make_step(objective: nn.Module, optimizer: torch.optim.Optimizer, fabric: "Fabric", compiled: bool) -> Step:
    """Return how to run a step of ``optimizer`` on ``objective``, compiled if asked for and possible."""
    needs_fabric = fabric.world_size > 1 or "mixed" in fabric.strategy.precision.precision
    if compiled and needs_fabric:
        warn("going on uncompiled: a compiled step runs in one process and without mixed precision", RuntimeWarning)
    elif compiled:
        return _compiled(objective, optimizer, fabric.device)
    if not needs_fabric:  # its wrappers would do nothing, and take their time
        return eager_step(objective, optimizer)
    wrapped: Any = fabric.setup_optimizers(optimizer)
    return eager_step(fabric.setup_module(objective), wrapped, fabric.backward)


def _compiled(objective: nn.Module, optimizer: torch.optim.Optimizer, device: torch.device) -> Step:
    if device.type == "cuda":
        return CapturedStep(objective, optimizer)
    from pyro_bmrs.svi.compiled import CompiledStep  # noqa: PLC0415  (torch's compilers)

    compiled = CompiledStep(objective)

    def step(x: Any, y: Tensor, kl_weight: float, batch_weight: float) -> Tensor:
        optimizer.zero_grad()
        loss = compiled(x, y, kl_weight, batch_weight)
        _check(loss)
        optimizer.step()
        return loss

    return step


def eager_step(
    losses_of: Callable[..., Tensor], optimizer: Any, backward: Callable[[Tensor], None] = Tensor.backward
) -> Step:
    """Return a step as torch runs it.

    Args:
        losses_of: From inputs, observations, KL weight and batch weight to a loss of shape ``()``, or one per model.
        optimizer: Of what the losses depend on.
        backward: Computes the gradients of a loss of shape ``()``.
    """

    def step(x: Any, y: Tensor, kl_weight: float, batch_weight: float) -> Tensor:
        optimizer.zero_grad()
        losses = losses_of(x, y, kl_weight, batch_weight)
        _check(losses)
        backward(losses if losses.dim() == 0 else losses.sum())
        optimizer.step()
        return losses.detach()

    return step


def _check(losses: Tensor) -> None:
    """Raise if a loss is not finite; a GPU is not asked, since that would stall it (``Trainer`` does so later)."""
    if losses.is_cuda or math.isfinite(losses.sum().item()):
        return
    if not bool(torch.isfinite(losses).all()):
        raise NonFiniteLossError(losses.detach())
