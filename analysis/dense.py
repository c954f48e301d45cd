"""The point of comparison: the same network trained as long, without noise."""

import math
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import Adam
from torch.optim.lr_scheduler import CosineAnnealingLR

from pyro_bmrs.modes import evaluating
from pyro_bmrs.structures.inputs import to_input
from pyro_bmrs.svi.callbacks import Callback, Callbacks, JSONLines
from pyro_bmrs.svi.checkpoint import State, optimizer_tensors, read_checkpoint, restore_optimizer, write_checkpoint

__all__ = ["accuracy", "outputs", "train_dense"]

_BATCH = 1024


def train_dense(
    net: nn.Module,
    data: tuple[Tensor, Tensor],
    epochs: int,
    batch_size: int,
    lr: float,
    seed: int,
    *,
    decay: bool = True,
    validation: tuple[Tensor, Tensor] | None = None,
    folder: Path | None = None,
    checkpoint_every: int = 1,
    callbacks: Sequence[Callback] = (),
) -> list[dict[str, Any]]:
    """Train ``net`` in place by Adam, as ``pyro_bmrs.fit`` trains weights.

    Args:
        net: The network, on the device of the data.
        data: Inputs, floating-point or bytes, and labels.
        epochs: Number of epochs.
        batch_size: At most this many examples per step.
        lr: Initial learning rate.
        seed: Of the data order.
        decay: Whether the learning rate falls along a cosine to zero.
        validation: Data on which to measure the accuracy after every epoch.
        folder: Where to keep ``metrics.jsonl`` and a checkpoint, from which the next call goes on to the same result.
        checkpoint_every: Epochs between checkpoints.
        callbacks: Hear of the start and of every epoch.

    Returns:
        A record for each epoch.
    """
    training = _Training(net, data, epochs, batch_size, lr, seed, decay)
    path = None if folder is None else folder / "checkpoint" / "dense.safetensors"
    if path is not None and path.exists():
        training.restore(read_checkpoint(path))
    told = Callbacks([*callbacks, *([] if folder is None else [JSONLines(folder / "metrics.jsonl")])])
    with closing(told):
        told.on_start(epochs, training.history)
        while len(training.history) < epochs:
            record = training.epoch(validation)
            told.on_epoch_end(record)
            if path is not None and (record["epoch"] % checkpoint_every == 0 or record["epoch"] == epochs):
                path.parent.mkdir(parents=True, exist_ok=True)
                write_checkpoint(path, training.state())
    net.eval()
    return training.history


class _Training:
    """Network, optimiser, schedule and data order, and what the epochs so far have come to."""

    def __init__(
        self,
        net: nn.Module,
        data: tuple[Tensor, Tensor],
        epochs: int,
        batch_size: int,
        lr: float,
        seed: int,
        decay: bool,
    ) -> None:
        self.net, self.data = net, data
        self.steps = math.ceil(len(data[0]) / batch_size)
        self.optimizer = Adam(net.parameters(), lr, fused=True)
        self.schedule = CosineAnnealingLR(self.optimizer, epochs * self.steps) if decay else None
        self.order = Generator().manual_seed(seed)
        self.history: list[dict[str, Any]] = []

    def epoch(self, validation: tuple[Tensor, Tensor] | None) -> dict[str, Any]:
        """Run one epoch and return its record."""
        started = time.perf_counter()
        x, y = self.data
        self.net.train()
        for batch in torch.randperm(len(x), generator=self.order).to(x.device).tensor_split(self.steps):
            self.optimizer.zero_grad()
            cross_entropy(self.net(to_input(x[batch])), y[batch]).backward()
            self.optimizer.step()
            if self.schedule is not None:
                self.schedule.step()
        record: dict[str, Any] = {"epoch": len(self.history) + 1, "phase": "dense", "compression": 0.0}
        if validation is not None:
            record["accuracy_validation"] = accuracy(outputs(self.net, validation[0]), validation[1])
        record["seconds"] = time.perf_counter() - started
        self.history.append(record)
        return record

    def state(self) -> State:
        """Return all that a resumed training needs to know."""
        tensors = {f"net.{name}": tensor for name, tensor in self.net.state_dict().items()}
        tensors |= {**optimizer_tensors(self.optimizer), "order": self.order.get_state()}
        schedule = None if self.schedule is None else self.schedule.state_dict()
        lr = self.optimizer.param_groups[0]["lr"]
        info = {"history": self.history, "schedule": schedule, "lr": lr}
        return State(tensors, info)

    def restore(self, state: State) -> None:
        """Take up what ``state`` returned."""
        prefix = "net."
        weights = {name[len(prefix) :]: value for name, value in state.tensors.items() if name.startswith(prefix)}
        self.net.load_state_dict(weights)
        restore_optimizer(self.optimizer, state.tensors)
        if self.schedule is not None:
            self.schedule.load_state_dict(state.info["schedule"])
        self.optimizer.param_groups[0]["lr"] = state.info["lr"]
        self.order.set_state(state.tensors["order"].cpu())
        self.history = state.info["history"]


def outputs(net: nn.Module, x: Tensor) -> Tensor:
    """Return a network's outputs in eval mode, without gradients, a batch at a time; bytes are divided by 255."""
    with evaluating(net), torch.no_grad():
        return torch.cat([net(to_input(batch)) for batch in x.split(_BATCH)])


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """Return the fraction of examples whose largest logit is the label's."""
    return (logits.argmax(-1) == labels).double().mean().item()
