"""When to prune: while training, after it, or until a size is reached."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar, Literal

from pyro_bmrs.checks import check_flag, check_integer, check_number, described
from pyro_bmrs.svi.pruner import Pruner
from pyro_bmrs.svi.schedule import MOST_EPOCHS, Rates
from pyro_bmrs.svi.steering import Gradual, Steering, Target

__all__ = ["NOISY", "Continuous", "PlannedEpoch", "PostTraining", "Pruning", "ToSize"]


@dataclass(frozen=True)
class PlannedEpoch:
    """One epoch to come: its phase, and for post-training pruning the level before it and its own."""

    phase: str
    before: float | None = None
    level: float | None = None


NOISY = PlannedEpoch("noisy")


class Pruning:
    """When to prune: what a fit asks, epoch by epoch. By itself it never removes anything.

    Attributes:
        warms_up: Whether the weight of the KL rises over the first epochs, unless the caller says otherwise.
        takes_several: Whether several models can be trained together: epochs and weight of the KL depend on none.
    """

    warms_up: ClassVar[bool] = True
    takes_several: ClassVar[bool] = False

    @property
    def shrinks(self) -> bool:
        """Whether what is removed is cut out while training."""
        return False

    def phases(self, noisy_epochs: int, fine_tune_epochs: int) -> list[PlannedEpoch]:
        """Return the epochs of a fit, in order."""
        return [*[NOISY] * noisy_epochs, *self.levels_to_visit(), *[PlannedEpoch("fine-tune")] * fine_tune_epochs]

    def levels_to_visit(self) -> list[PlannedEpoch]:
        """Return the epochs between those with noise and the fine-tuning."""
        return []

    def steering(self, pruner: Pruner, steps: int) -> Target | None:
        """Return what to ask after each of the ``steps`` steps with noise, or None."""
        return None

    def after_epoch(self, pruner: Pruner, epoch: int, rates: Rates) -> dict[str, int] | None:
        """Remove what is due after an epoch with noise, counted from 1.

        Returns:
            How many structures of each site were removed; None where the criterion was not asked.
        """
        return None

    def after_noise(self, pruner: Pruner) -> None:
        """Do what is due once the epochs with noise have ended."""


@dataclass(frozen=True)
class Continuous(Pruning):
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

    Example:
        >>> bmrs.Continuous(start=4, every=2).is_due(6)
        True
    """

    start: int | None = None
    every: int = 1
    stop: int | None = None
    shrink: bool = False
    takes_several: ClassVar[bool] = True

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

    @property
    def shrinks(self) -> bool:
        return self.shrink

    def after_epoch(self, pruner: Pruner, epoch: int, rates: Rates) -> dict[str, int] | None:
        return pruner.remove_by_criterion() if self.is_due(epoch, rates.kl_warmup_epochs) else None


@dataclass(frozen=True)
class PostTraining(Pruning):
    """Prune after training (algorithm 1, lower half): rank once, remove progressively, stop where the criterion does.

    Args:
        levels: Increasing fractions of all structures to remove.
        epochs_per_level: Epochs of fine-tuning at each level.
        stop: Whether to stop at the last structure that the criterion supports removing; otherwise all levels are
            visited in the order of the scores.

    Raises:
        TypeError: If an argument is of another type.
        ValueError: If ``levels`` do not increase within (0, 1], or ``epochs_per_level`` is not positive.

    Example:
        >>> [each.level for each in bmrs.PostTraining(levels=(0.5, 0.9)).phases(noisy_epochs=1, fine_tune_epochs=1)]
        [None, 0.5, 0.9, None]
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

    def levels_to_visit(self) -> list[PlannedEpoch]:
        visited = zip((None, *self.levels), self.levels, strict=False)
        return [
            PlannedEpoch("post-training", before, level)
            for before, level in visited
            for _ in range(self.epochs_per_level)
        ]

    def after_noise(self, pruner: Pruner) -> None:
        pruner.rank(self.stop)


@dataclass(frozen=True)
class ToSize(Pruning):
    """Prune while training, to a size: the weight of the KL is steered until the evidence supports that size.

    The weight of the KL is multiplied every now and then by more or less than 1, as the size that the criterion
    supports is too large or too small: a Lagrange multiplier on the expected cost. It begins small, so that there is no
    warm-up. What is removable is removed, never beyond the size; what is then still missing goes by score. The last
    structure of a site stays. By a criterion that only ranks, structures go by score, more and more of them between a
    third and 70 % of the steps, once the weight of the KL has warmed up.

    Args:
        remove: Fraction of the cost to remove, inside (0, 1).
        cost: ``"parameters"``, or ``"flops"`` of a forward pass.

    Raises:
        TypeError: If ``remove`` is no number.
        ValueError: If ``remove`` is not inside (0, 1), or ``cost`` neither.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 2))
        >>> x = torch.randn(64, 4)
        >>> data = (x, (x[:, 0] > 0).long())
        >>> pruned = bmrs.prune(net, data, data, pruning=bmrs.ToSize(0.5), epochs=60, seed=0, progress=False)
        >>> 0.4 < bmrs.count_parameters(pruned.network) / bmrs.count_parameters(net) < 0.6
        True
    """

    remove: float
    cost: Literal["parameters", "flops"] = "parameters"
    warms_up: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not 0 < check_number("remove", self.remove, positive=False) < 1:
            raise ValueError(f"remove must be a fraction inside (0, 1), but got {self.remove}")
        if self.cost not in ("parameters", "flops"):
            raise ValueError(f'cost must be "parameters" or "flops", but got {self.cost!r}')

    def steering(self, pruner: Pruner, steps: int) -> Target | None:
        kind = Gradual if pruner.criterion is not None and not pruner.criterion.has_line else Steering
        return kind(pruner, self.remove, self.cost, steps) if steps else None
