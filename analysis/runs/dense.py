"""The point of comparison: the same network trained as long, without noise, by the library's own training loop."""

import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.nn.functional import cross_entropy

from pyro_bmrs.eval_mode import evaluating
from pyro_bmrs.structures.inputs import to_input
from pyro_bmrs.svi.callbacks import Callback, Callbacks, JSONLines
from pyro_bmrs.svi.checkpoint import State, read_checkpoint, write_checkpoint
from pyro_bmrs.svi.data.in_memory import InMemory
from pyro_bmrs.svi.devices import keep_freed_memory, make_fabric
from pyro_bmrs.svi.schedule import Rates
from pyro_bmrs.svi.steps import Step, eager_step
from pyro_bmrs.svi.training import Trainee, Trainer

__all__ = ["PlainNetwork", "accuracy", "cosine_rates", "outputs", "train_dense"]

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
        callbacks: Called at the start and at every epoch.

    Returns:
        A record for each epoch.
    """
    network = PlainNetwork(net, data, batch_size, seed)
    training = _Training(network, Trainer(network, cosine_rates(lr, epochs, decay)))
    path = None if folder is None else folder / "checkpoint" / "dense.safetensors"
    if path is not None and path.exists():
        training.restore(read_checkpoint(path))
    with closing(
        Callbacks([*callbacks, *([] if folder is None else [JSONLines(folder / "metrics.jsonl")])])
    ) as all_callbacks:
        all_callbacks.on_start(epochs, training.history)
        while len(training.history) < epochs:
            record = training.epoch(validation)
            all_callbacks.on_epoch_end(record)
            if path is not None and (record["epoch"] % checkpoint_every == 0 or record["epoch"] == epochs):
                path.parent.mkdir(parents=True, exist_ok=True)
                write_checkpoint(path, training.state())
    net.eval()
    return training.history


def cosine_rates(lr: float, epochs: int, decay: bool = True) -> Rates:
    """Return the learning rates of a training without noise, along a cosine to zero if they decay."""
    return Rates(lr, lr, epochs, noisy_epochs=0, kl_warmup_epochs=0, decay=decay)


class PlainNetwork(Trainee):
    """A classifier without noise, trained on the cross-entropy.

    Args:
        net: The network, on the device of the data.
        data: Inputs, floating-point or bytes, and labels.
        batch_size: At most this many examples per step.
        seed: Of the data order.
    """

    def __init__(self, net: nn.Module, data: tuple[Tensor, Tensor], batch_size: int, seed: int) -> None:
        self.net, self.data = net, InMemory(*data, "train", batch_size)
        self.fabric = make_fabric(data[0].device, "32-true")
        keep_freed_memory(self.fabric.device)
        self.steps_per_epoch = self.data.steps
        self.order = Generator().manual_seed(seed)

    def parameters(self) -> tuple[list[Tensor], list[Tensor]]:
        return list(self.net.parameters()), []

    def batches(self) -> Iterator[tuple[Tensor, Tensor, float]]:
        for (x, y), batch_weight in self.data.shuffled(self.order, self.fabric):
            yield to_input(x), y, batch_weight

    def fine_tune_step(self, optimizer: torch.optim.Optimizer) -> Step:
        def loss_of(x: Tensor, y: Tensor, kl_weight: float, batch_weight: float) -> Tensor:
            return batch_weight * cross_entropy(self.net(x), y)

        return eager_step(loss_of, optimizer)

    def prepare(self) -> None:
        self.net.train()

    def state(self) -> State:
        return State({"order": self.order.get_state()})

    def restore(self, state: State) -> None:
        self.order.set_state(state.tensors["order"].cpu())


class _Training:
    """A training under way, with the records of its epochs so far."""

    def __init__(self, network: PlainNetwork, trainer: Trainer) -> None:
        self.net, self.trainer = network.net, trainer
        self.history: list[dict[str, Any]] = []

    def epoch(self, validation: tuple[Tensor, Tensor] | None) -> dict[str, Any]:
        """Run one epoch and return its record."""
        started = time.perf_counter()
        self.trainer.fine_tune_epoch()
        record: dict[str, Any] = {"epoch": len(self.history) + 1, "phase": "dense", "compression": 0.0}
        if validation is not None:
            record["accuracy_validation"] = accuracy(outputs(self.net, validation[0]), validation[1])
        record["seconds"] = time.perf_counter() - started
        self.history.append(record)
        return record

    def state(self) -> State:
        """Return all that a resumed training needs to know."""
        own = self.trainer.state()
        weights = {f"net.{name}": tensor for name, tensor in self.net.state_dict().items()}
        return State({**weights, **own.tensors}, {**own.info, "history": self.history})

    def restore(self, state: State) -> None:
        """Take up what ``state`` returned."""
        prefix = "net."
        weights = {name[len(prefix) :]: value for name, value in state.tensors.items() if name.startswith(prefix)}
        self.net.load_state_dict(weights)
        self.trainer.restore(state)
        self.history = state.info["history"]


def outputs(net: nn.Module, x: Tensor) -> Tensor:
    """Return a network's outputs in eval mode, without gradients, a batch at a time; bytes are divided by 255."""
    with evaluating(net), torch.no_grad():
        return torch.cat([net(to_input(batch)) for batch in x.split(_BATCH)])


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """Return the fraction of examples whose largest logit is the label's."""
    return (logits.argmax(-1) == labels).double().mean().item()
