"""The one training loop: epochs of steps with noise, and of the weights alone with noise at its posterior mean."""

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pyro_bmrs.checks import check_number
from pyro_bmrs.structures.inputs import Inputs
from pyro_bmrs.svi.checkpoint import State, optimizer_tensors, restore_optimizer
from pyro_bmrs.svi.schedule import Rates
from pyro_bmrs.svi.steps import NonFiniteLossError, Step

if TYPE_CHECKING:
    from lightning_fabric import Fabric

__all__ = ["Trainee", "Trainer"]

_CHECK_EVERY = 100  # steps between looks at the losses, each of which stalls a GPU


class Trainee:
    """What a ``Trainer`` trains: one model, several at once, or a network without noise.

    Attributes:
        fabric: Where it runs.
        steps_per_epoch: Number of its batches in an epoch.
        kl_weight: Weight of the KL once warmed up.
    """

    fabric: "Fabric"
    steps_per_epoch: int
    kl_weight: float = 1.0

    def parameters(self) -> tuple[list[Tensor], list[Tensor]]:
        """Return what is trained: at the learning rate of the weights, and at that of the posterior."""
        raise NotImplementedError

    def batches(self) -> Iterator[tuple[Inputs, Tensor, float]]:
        """Iterate over an epoch: inputs and observations on the device, and the weight of each batch's likelihood."""
        raise NotImplementedError

    def noisy_step(self, optimizer: torch.optim.Optimizer) -> Step:
        """Return a step of SVI."""
        raise NotImplementedError

    def fine_tune_step(self, optimizer: torch.optim.Optimizer) -> Step:
        """Return a step of the weights alone."""
        raise NotImplementedError

    def prepare(self) -> None:
        """Put the network in train mode, before an epoch and after each pruning."""
        raise NotImplementedError

    def after_step(self) -> None:
        """Do what is due after each step."""

    def check_parameters(self, step: int) -> None:
        """Raise ``FloatingPointError`` if a parameter is not finite after ``step``."""

    def nonfinite_loss(self, losses: Tensor, step: int) -> FloatingPointError:
        """Return the error to raise for the losses of ``step``, one of which is not finite."""
        return FloatingPointError(f"the loss became {losses.tolist()} at step {step}")

    def state(self) -> State:
        """Return what a resumed fit needs to know of the data and of random numbers."""
        return State()

    def restore(self, state: State) -> None:
        """Take up what ``state`` returned."""


class Trainer:
    """Optimiser, schedule and step count of one fit.

    Args:
        trainee: What is trained.
        rates: Learning rates and KL weight over the epochs.
        capturable: Whether the optimiser is to be captured in a CUDA graph.

    Attributes:
        multiplier: What the weight of the KL is multiplied by.
        step: Number of steps so far.
    """

    def __init__(self, trainee: Trainee, rates: Rates, capturable: bool = False) -> None:
        self.trainee, self.rates = trainee, rates
        self.multiplier = 1.0
        self.step = 0
        self._capturable = capturable
        self.start_optimizer()

    @property
    def steps_per_epoch(self) -> int:
        """Number of steps of an epoch."""
        return self.trainee.steps_per_epoch

    def start_optimizer(self) -> None:
        """Start Adam anew, on the parameters that there are now."""
        rates: list[Any] = list(self._rates())
        if self._capturable:
            rates = [torch.tensor(rate, device=self.trainee.fabric.device) for rate in rates]
        groups = [{"params": each, "lr": rate} for each, rate in zip(self.trainee.parameters(), rates, strict=True)]
        self.optimizer = torch.optim.Adam(groups, fused=True, capturable=self._capturable)
        self.network_changed()

    def multiply_kl(self, multiplier: float) -> None:
        """Multiply the weight of the KL from the next step on."""
        self.multiplier = multiplier

    def network_changed(self) -> None:
        """Prepare steps anew, since parameters have been replaced by smaller ones."""
        self._noisy_step: Step | None = None
        self._fine_tune_step: Step | None = None

    def noisy_epoch(self, after_step: Callable[[], None] | None = None) -> list[float]:
        """Run one epoch of SVI and return the mean loss of each model, in nats per example.

        Args:
            after_step: What to call after each step.
        """
        if self._noisy_step is None:
            self._noisy_step = self.trainee.noisy_step(self.optimizer)
        return self._epoch(self._noisy_step, after_step)

    def fine_tune_epoch(self) -> list[float]:
        """Run one epoch of the weights alone and return each model's mean negative log likelihood per example."""
        if self._fine_tune_step is None:
            self._fine_tune_step = self.trainee.fine_tune_step(self.optimizer)
        return self._epoch(self._fine_tune_step)

    def state(self) -> State:
        """Return all that a resumed fit needs to know: optimiser, step, data order and random state."""
        own = self.trainee.state()
        info = {"step": self.step, "multiplier": self.multiplier, **own.info}
        return State({**optimizer_tensors(self.optimizer), **own.tensors}, info)

    def restore(self, state: State) -> None:
        """Take up what ``state`` returned; parameters must have their shapes already."""
        self.step = state.info["step"]
        self.multiplier = check_number("its multiplier", state.info["multiplier"])
        restore_optimizer(self.optimizer, state.tensors)
        self.trainee.restore(state)

    def _rates(self) -> tuple[float, float]:
        return self.rates.learning_rates(self.step / self.steps_per_epoch)

    def _set_rates(self) -> None:
        for group, rate in zip(self.optimizer.param_groups, self._rates(), strict=True):
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate

    def _epoch(self, step: Step, after_step: Callable[[], None] | None = None) -> list[float]:
        trainee = self.trainee
        trainee.prepare()
        losses: list[Tensor] = []
        total = torch.zeros((), dtype=torch.float64, device=trainee.fabric.device)
        for x, y, batch_weight in trainee.batches():
            self._set_rates()
            factor = self.multiplier * self.rates.kl_warmup_factor(self.step, self.steps_per_epoch)
            try:
                losses.append(step(x, y, trainee.kl_weight * factor, batch_weight))
            except NonFiniteLossError as error:
                raise trainee.nonfinite_loss(error.losses, self.step) from None
            trainee.after_step()
            self.step += 1
            if after_step is not None:
                after_step()
                trainee.prepare()
            if len(losses) == _CHECK_EVERY or self.step % self.steps_per_epoch == 0:
                total = total + self._finite_sum(losses)
                losses = []
        trainee.check_parameters(self.step - 1)
        return mean_of_processes(trainee.fabric, total / self.steps_per_epoch).reshape(-1).tolist()

    def _finite_sum(self, losses: list[Tensor]) -> Tensor:
        """Return the sum of the last losses; on a GPU this is where they are first looked at, which stalls it."""
        values = torch.stack(losses).double()
        finite = torch.isfinite(values).reshape(len(values), -1).all(1)
        if not bool(finite.all()):
            first = int((~finite).nonzero()[0])
            raise self.trainee.nonfinite_loss(values[first], self.step - len(losses) + first)
        return values.sum(0)


def mean_of_processes(fabric: "Fabric", tensor: Tensor) -> Tensor:
    """Return the mean of the tensors of all processes."""
    return of_all_processes(fabric, tensor).mean(0)


def of_all_processes(fabric: "Fabric", tensor: Tensor) -> Tensor:
    """Return the tensors of all processes, stacked."""
    gathered: Tensor = fabric.all_gather(tensor)  # type: ignore[assignment]
    return gathered.reshape(fabric.world_size, *tensor.shape)
