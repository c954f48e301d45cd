"""One training step, run plainly, compiled, or captured: from a batch to changed parameters."""

import math
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pyro_bmrs.svi.captured import CapturedStep

if TYPE_CHECKING:
    from lightning_fabric import Fabric

__all__ = ["NonFiniteLossError", "Step", "make_step"]

Step = Callable[[Any, Tensor, float, float], Tensor]
"""From inputs, observations, KL weight and share of the batch (see ``NoisyObjective``) to the loss, detached."""


class NonFiniteLossError(FloatingPointError):
    """Says that the loss is not finite, before any parameter has been changed by it."""

    def __init__(self, loss: float) -> None:
        super().__init__(f"the loss became {loss}")
        self.loss = loss


def make_step(objective: nn.Module, optimizer: torch.optim.Optimizer, fabric: "Fabric", compiled: bool) -> Step:
    """Return how to run a step of ``optimizer`` on ``objective``, compiled if asked for and possible."""
    needs_fabric = fabric.world_size > 1 or "mixed" in fabric.strategy.precision.precision
    if compiled and needs_fabric:
        warnings.warn(
            "going on uncompiled: a compiled step runs in one process and without mixed precision",
            RuntimeWarning,
            stacklevel=2,
        )
    elif compiled:
        return _compiled(objective, optimizer, fabric.device)
    if not needs_fabric:  # its wrappers would do nothing, and take their time
        return _eager(objective, optimizer, Tensor.backward)
    wrapped: Any = fabric.setup_optimizers(optimizer)
    return _eager(fabric.setup_module(objective), wrapped, fabric.backward)


def _compiled(objective: nn.Module, optimizer: torch.optim.Optimizer, device: torch.device) -> Step:
    if device.type == "cuda":
        return CapturedStep(objective, optimizer)
    from pyro_bmrs.svi.compiled import CompiledStep  # noqa: PLC0415  (torch's compilers)

    compiled = CompiledStep(objective)

    def step(x: Any, y: Tensor, kl_weight: float, share: float) -> Tensor:
        optimizer.zero_grad()
        loss = compiled(x, y, kl_weight, share)
        _check(loss)
        optimizer.step()
        return loss

    return step


def _eager(forward: nn.Module, optimizer: torch.optim.Optimizer, backward: Callable[[Tensor], None]) -> Step:
    def step(x: Any, y: Tensor, kl_weight: float, share: float) -> Tensor:
        optimizer.zero_grad()
        loss = forward(x, y, kl_weight, share)
        _check(loss)
        backward(loss)
        optimizer.step()
        return loss.detach()

    return step


def _check(loss: Tensor) -> None:
    """Raise if the loss is not finite; a GPU is not asked, since that would stall it (``Trainer`` does so later)."""
    if not loss.is_cuda and not math.isfinite(loss.item()):
        raise NonFiniteLossError(loss.item())
