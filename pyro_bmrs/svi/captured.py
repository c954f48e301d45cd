"""A whole training step as one CUDA graph: network, noise, objective and optimiser, launched at once."""

from dataclasses import dataclass, field

import pyro
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from pyro_bmrs.model.noise import MultiplicativeNoise
from pyro_bmrs.warn import warn

__all__ = ["CapturedStep"]

_WARM_UPS = 3  # steps in which libraries make their workspaces and the optimiser its state


class CapturedStep:
    """Train by one batch: forward, backward and the optimiser's step, as one launch.

    For each layout of the batch the first steps run as usual on a side stream, the next is captured, and all others
    replay it: a last batch of another size gets a graph of its own, as do the first structures that a noise layer
    loses, and all graphs share one memory pool. What changes in place between two calls is seen: parameters, masks, a
    batch norm's statistics, the optimiser's moments, and learning rates (``group["lr"].fill_(rate)``, which does not
    stall the device). Random numbers are drawn afresh from torch's CUDA generator at each. Tensors that are *replaced*,
    by surgery or ``.to``, and submodules that change their mode, need a new ``CapturedStep``; so do Python numbers that
    the forward reads.

    A step that cannot be captured runs as usual, after a warning that says why.

    Args:
        objective: From ``(x, y, kl_weight, batch_weight)`` to a loss of shape ``()``, for instance a
            ``NoisyObjective``, on a CUDA device.
        optimizer: Of its parameters, with ``capturable=True`` and learning rates that are tensors on that device:
            ``torch.optim.Adam(objective.parameters(), lr=torch.tensor(1e-3, device="cuda"), fused=True,
            capturable=True)``.

    Attributes:
        captures: How many graphs there are.

    Raises:
        ValueError: If the parameters are not on a CUDA device, or the optimiser cannot be captured.
    """

    def __init__(self, objective: nn.Module, optimizer: Optimizer) -> None:
        self.objective, self.optimizer = objective, optimizer
        self.device = next(objective.parameters()).device
        if self.device.type != "cuda":
            raise ValueError(f"a step is captured on a CUDA device, but the parameters are on {self.device}")
        for group in optimizer.param_groups:
            rate = group["lr"]
            if not (group.get("capturable") and isinstance(rate, Tensor) and rate.device == self.device):
                raise ValueError(
                    "the optimiser cannot be captured: give it capturable=True and lr=torch.tensor(rate, "
                    f"device={str(self.device)!r}), but it has capturable={group.get('capturable')} and lr={rate!r}"
                )
        self.captures = 0
        self._noise = [module for module in objective.modules() if isinstance(module, MultiplicativeNoise)]
        self._batches: dict[object, _Batch] = {}
        self._stream = torch.cuda.Stream(self.device)
        self._pool = torch.cuda.graph_pool_handle()
        self._given_up = False

    def __call__(self, x: Tensor, y: Tensor, kl_weight: float, batch_weight: float = 1.0) -> Tensor:
        """Take a step and return the batch's loss before it, of shape ``()``, on the device.

        Args:
            x: Inputs, of shape ``(batch, ...)``.
            y: Observations, of shape ``(batch, ...)``.
            kl_weight: Weight of the KL in this step.
            batch_weight: Size of this batch over the mean size of those whose losses will be averaged with it.
        """
        masks = tuple(layer._masks() for layer in self._noise)  # a layer that has lost nothing yet applies no mask
        key = (x.shape, x.dtype, y.shape, y.dtype, self.objective.training, masks)
        if key not in self._batches:
            numbers = torch.zeros(2, dtype=next(self.objective.parameters()).dtype, device=self.device)
            inputs = torch.empty_like(x, device=self.device), torch.empty_like(y, device=self.device)
            self._batches[key] = _Batch(*inputs, numbers)
        batch = self._batches[key]
        batch.fill(x, y, kl_weight, batch_weight)
        if batch.warm_ups < _WARM_UPS or self._given_up:
            batch.warm_ups += 1
            return self._on_the_side(batch)
        if batch.graph is None:
            try:
                self._capture(batch)
            except RuntimeError as error:
                self._given_up = True
                warn(
                    f"the step cannot be captured and runs as usual, more slowly ({str(error).strip()[:500]})",
                    RuntimeWarning,
                )
                return self._on_the_side(batch)
        assert batch.graph is not None
        batch.graph.replay()
        return batch.loss.clone()

    def _capture(self, batch: "_Batch") -> None:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
            batch.loss = self._step(batch)
        batch.graph = graph
        self.captures += 1

    def _on_the_side(self, batch: "_Batch") -> Tensor:
        """Step on the stream of the captures: what autograd and the libraries keep belongs to a stream."""
        current = torch.cuda.current_stream(self.device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            loss = self._step(batch)
        current.wait_stream(self._stream)
        loss.record_stream(current)
        return loss

    def _step(self, batch: "_Batch") -> Tensor:
        self.optimizer.zero_grad(set_to_none=True)  # so that gradients are allocated where the graph can write them
        with pyro.validation_enabled(False):  # which asks the device
            loss = self.objective(batch.x, batch.y, batch.numbers[0], batch.numbers[1])
        loss.backward()
        self.optimizer.step()
        return loss.detach()


@dataclass
class _Batch:
    """The tensors from which the graph of one layout reads its batch, and the loss that it writes."""

    x: Tensor
    y: Tensor
    numbers: Tensor
    warm_ups: int = 0
    graph: torch.cuda.CUDAGraph | None = None
    loss: Tensor = field(default_factory=lambda: torch.zeros(()))

    def fill(self, x: Tensor, y: Tensor, kl_weight: float, batch_weight: float) -> None:
        self.x.copy_(x, non_blocking=True)
        self.y.copy_(y, non_blocking=True)
        self.numbers[0].fill_(kl_weight)
        self.numbers[1].fill_(batch_weight)
