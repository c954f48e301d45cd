"""When to prune, and how learning rates and the KL's weight run over the epochs."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from pyro_bmrs.checks import check_flag, check_integer, check_number, described

__all__ = ["MOST_EPOCHS", "Continuous", "PostTraining", "Pruning", "Rates", "ToSize"]

MOST_EPOCHS = 10**6
_NOISY_STEPS = 5000  # of a fit, by default
_FEWEST_EPOCHS = 3
_TRAVEL = 500.0  # nats that a posterior location must be able to travel
_LARGEST_POSTERIOR_LR = 0.3


@dataclass(frozen=True)
class Continuous:
    """Prune while training (algorithm 1 of the paper, upper half).

    Args:
        start: Epoch after which to prune first, counted from 1; by default the first one with the KL at its full
            weight, since what has been fitted before is not the model's posterior.
        every: Number of epochs between prunings.
        stop: Epoch after which to prune last; by default the last one with noise.
        shrink: Whether to cut what is removed out of network, guide and optimiser at once, so that later epochs get
            faster; otherwise it is masked until ``compact``. The fit is the same up to rounding.

    Raises:
        TypeError: If an argument is of another type.
        ValueError: If an epoch is not positive, or ``stop`` comes before ``start``.
    """

    start: int | None = None
    every: int = 1
    stop: int | None = None
    shrink: bool = False

    def __post_init__(self) -> None:
        for name, epoch in (("start", self.start), ("every", self.every), ("stop", self.stop)):
            if epoch is not None or name == "every":
                check_integer(f"{name} of Continuous", epoch, low=1)
        if self.start is not None and self.stop is not None and self.stop < self.start:
            raise ValueError(f"stop of Continuous must not come before start={self.start}, but got {self.stop}")
        check_flag("shrink of Continuous", self.shrink)

    def is_due(self, epoch: int, kl_warmup_epochs: float = 0) -> bool:
        """Return whether to prune after ``epoch``, counted from 1."""
        start = math.floor(kl_warmup_epochs) + 1 if self.start is None else self.start
        return start <= epoch <= (epoch if self.stop is None else self.stop) and (epoch - start) % self.every == 0


@dataclass(frozen=True)
class PostTraining:
    """Prune after training (algorithm 1, lower half): rank once, remove progressively, stop where the criterion does.

    Args:
        levels: Increasing fractions of all structures to remove.
        epochs_per_level: Epochs of fine-tuning at each level.
        stop: Whether to stop at the last structure that the criterion supports removing; otherwise all levels are
            visited in the order of the scores.

    Raises:
        TypeError: If an argument is of another type.
        ValueError: If ``levels`` do not increase within (0, 1], or ``epochs_per_level`` is not positive.
    """

    levels: tuple[float, ...] = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95)
    epochs_per_level: int = 1
    stop: bool = True

    def __post_init__(self) -> None:
        if not isinstance(self.levels, Sequence) or isinstance(self.levels, str):
            raise TypeError(f"levels of PostTraining must be a tuple of fractions, but got {described(self.levels)}")
        levels = tuple(check_number("each of the levels of PostTraining", level) for level in self.levels)
        if not levels or levels[-1] > 1 or any(low >= high for low, high in pairwise(levels)):
            raise ValueError(f"levels of PostTraining must increase within (0, 1], but got {levels}")
        object.__setattr__(self, "levels", levels)
        check_integer("epochs_per_level of PostTraining", self.epochs_per_level, low=1, high=MOST_EPOCHS)
        check_flag("stop of PostTraining", self.stop)


@dataclass(frozen=True)
class ToSize:
    """Prune while training, to a size: the weight of the KL is steered until the evidence supports that size.

    The weight of the KL is multiplied every now and then by more or less than 1, as the size that the criterion
    supports is too large or too small: a Lagrange multiplier on the expected cost. It begins small, so that there is no
    warm-up. What is supported is removed, never beyond the size; what is then still missing goes by score. The last
    structure of a site stays.

    Args:
        remove: Fraction of the cost to remove, inside (0, 1).
        cost: ``"parameters"``, or ``"flops"`` of a forward pass.

    Raises:
        TypeError: If ``remove`` is no number.
        ValueError: If ``remove`` is not inside (0, 1), or ``cost`` neither.
    """

    remove: float
    cost: Literal["parameters", "flops"] = "parameters"

    def __post_init__(self) -> None:
        if not 0 < check_number("remove", self.remove) < 1:
            raise ValueError(f"remove must be a fraction inside (0, 1), but got {self.remove}")
        if self.cost not in ("parameters", "flops"):
            raise ValueError(f'cost must be "parameters" or "flops", but got {self.cost!r}')


Pruning = Continuous | PostTraining | ToSize


@dataclass(frozen=True)
class Rates:
    """Learning rates and KL weight of each step of a fit.

    Args:
        lr: Initial learning rate of the weights, which falls along a cosine to zero over all epochs.
        posterior_lr: That of the posterior's parameters, over the epochs with noise.
        epochs: Number of all epochs.
        noisy_epochs: Number of those with noise.
        kl_warmup_epochs: Number of epochs over which the KL's weight rises linearly.
        decay: Whether they fall at all.
    """

    lr: float
    posterior_lr: float
    epochs: int
    noisy_epochs: int
    kl_warmup_epochs: float
    decay: bool = True

    def travel(self, steps_per_epoch: int) -> float:
        """Return how far a posterior location can get, in nats: Adam moves it by the rate in a step, at most."""
        return self.posterior_lr * self.noisy_epochs * steps_per_epoch * (0.5 if self.decay else 1.0)

    @classmethod
    def planned(
        cls,
        lr: float,
        posterior_lr: float | None,
        noisy_epochs: int | None,
        fine_tune_epochs: int | None,
        kl_warmup_epochs: float | None,
        steps_per_epoch: int,
        levels: int = 0,
        decay: bool = True,
    ) -> "Rates":
        """Return the rates with the defaults of ``fit`` filled in; ``levels`` is the epochs in between.

        What is left out follows from the number of steps, since it takes steps for weights to learn and for locations
        to travel, whatever the number of examples.

        Raises:
            TypeError: If an argument is of another type.
            ValueError: If a rate is not positive and finite, or a number of epochs is negative.
        """
        check_number("lr", lr)
        if noisy_epochs is None:
            noisy_epochs = min(max(math.ceil(_NOISY_STEPS / steps_per_epoch), _FEWEST_EPOCHS), MOST_EPOCHS)
        check_integer("epochs", noisy_epochs, high=MOST_EPOCHS)
        if fine_tune_epochs is None:
            fine_tune_epochs = math.ceil(noisy_epochs / 3) if noisy_epochs else 10
        check_integer("fine_tune_epochs", fine_tune_epochs, high=MOST_EPOCHS)
        if posterior_lr is None:
            needed = 2 * _TRAVEL / max(noisy_epochs * steps_per_epoch, 1)
            posterior_lr = max(50 * lr, min(needed, _LARGEST_POSTERIOR_LR))
        check_number("posterior_lr", posterior_lr)
        if kl_warmup_epochs is None:
            kl_warmup_epochs = noisy_epochs // 4 or noisy_epochs / 4
        else:
            check_integer("kl_warmup_epochs", kl_warmup_epochs, high=MOST_EPOCHS)
        check_flag("decay", decay)
        epochs = noisy_epochs + levels + fine_tune_epochs
        return cls(lr, posterior_lr, epochs, noisy_epochs, kl_warmup_epochs, decay)

    def learning_rates(self, epoch: float) -> tuple[float, float]:
        """Return the rates of weights and posterior after ``epoch`` epochs, a fraction inside one."""
        if not self.decay:
            return self.lr, self.posterior_lr
        return self.lr * _cosine(epoch, self.epochs), self.posterior_lr * _cosine(epoch, self.noisy_epochs)

    def kl_share(self, step: int, steps_per_epoch: int) -> float:
        """Return the fraction of its full weight that the KL has at ``step``, counted from 0."""
        return min(1.0, (step + 1) / (self.kl_warmup_epochs * steps_per_epoch + 1))


def _cosine(epoch: float, epochs: int) -> float:
    return 0.5 * (1 + math.cos(math.pi * min(epoch / max(epochs, 1e-9), 1.0)))
