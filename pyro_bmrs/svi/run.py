"""A fit under way: the loop over its epochs, for one model or for several that are trained together."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from pyro_bmrs.model.guides.flat import FlatGuide
from pyro_bmrs.model.network import NoisyNetwork
from pyro_bmrs.svi.callbacks import Callback
from pyro_bmrs.svi.data.source import Source
from pyro_bmrs.svi.diagnostics import PosteriorWatch
from pyro_bmrs.svi.history import History
from pyro_bmrs.svi.pruner import Pruner
from pyro_bmrs.svi.pruning import NOISY, PlannedEpoch, Pruning
from pyro_bmrs.svi.result import FitResult
from pyro_bmrs.svi.training import Trainer

__all__ = ["Member", "Run"]

_SHOWN = ("loss", "compression", "accuracy_validation", "rmse_validation", "log_likelihood_validation")


@dataclass(frozen=True)
class Member:
    """One of the models that a run trains, with what is kept of each on its own.

    Attributes:
        pruner: Removes its structures.
        history: One record per epoch.
        watch: Has noted where its posterior was.
        callbacks: Called at its events.
    """

    pruner: Pruner
    history: History
    watch: PosteriorWatch
    callbacks: Callback

    @classmethod
    def of(cls, pruner: Pruner, validation: Source | None, noisy_epochs: int, callbacks: Callback) -> "Member":
        """Return a member that begins."""
        history = History(pruner.model, pruner.guide, pruner, validation)
        return cls(pruner, history, PosteriorWatch(pruner.guide, noisy_epochs), callbacks)

    @property
    def model(self) -> NoisyNetwork:
        """The model."""
        return self.pruner.model

    @property
    def guide(self) -> FlatGuide:
        """Its guide."""
        return self.pruner.guide

    def end(self, seconds: float) -> FitResult:
        """Leave the model in eval mode, and return its result."""
        self.model.eval()
        if self.history.entries:
            self.model.note_fit(self.history.ends_fine_tuned)
        entries, diagnostics = self.history.entries, self.watch.diagnostics()
        result = FitResult(self.pruner.masks, self.pruner.scores, entries, seconds, diagnostics)
        self.callbacks.on_end(result)
        return result


class Run:
    """A fit under way.

    Args:
        trainer: Runs an epoch of all members.
        members: What it trains; only one where ``pruning`` steers or visits levels.
        pruning: When to remove.
        plan: The epochs, in order.
        data: What is trained on.

    Attributes:
        position: Number of epochs of the plan that are behind.
    """

    def __init__(
        self, trainer: Trainer, members: Sequence[Member], pruning: Pruning, plan: list[PlannedEpoch], data: Source
    ) -> None:
        self.trainer, self.members, self.pruning, self.plan, self.data = trainer, members, pruning, plan, data
        self.noisy_epochs = plan.count(NOISY)
        self.steering = pruning.steering(members[0].pruner, self.noisy_epochs * trainer.steps_per_epoch)
        if self.steering is not None:
            trainer.multiply_kl(self.steering.first_multiplier)
        self.position, self._seconds_before = 0, 0.0
        self._started = time.perf_counter()

    @property
    def seconds(self) -> float:
        """Wall time so far, all sessions of a resumed fit together."""
        return self._seconds_before + time.perf_counter() - self._started

    def resume_at(self, position: int, seconds: float) -> None:
        """Go on after ``position`` epochs, which took ``seconds`` in the sessions before this one."""
        self.position, self._seconds_before = position, seconds

    def go(self, after_epoch: Callable[[], None] | None = None, summary: Callback | None = None) -> None:
        """Run the epochs of the plan from the present position on, if there are any.

        Args:
            after_epoch: What to call at the end of each.
            summary: Called at its events with the means of the members' records.
        """
        if self.position == len(self.plan):
            return
        summary = Callback() if summary is None else summary
        for each in self.members:
            each.callbacks.on_start(len(self.plan), each.history.entries)
            each.model.note_fit(fine_tuned=False)
        summary.on_start(len(self.plan), [])
        if self.position == self.noisy_epochs == 0:
            self._end_noise()
        while self.position < len(self.plan):
            records = self._epoch(self.plan[self.position])
            self.position += 1
            if self.position == self.noisy_epochs:
                self._end_noise()
            for each, record in zip(self.members, records, strict=False):
                each.callbacks.on_epoch_end(record)
            if records:
                summary.on_epoch_end(_means(records))
            if after_epoch is not None:
                after_epoch()

    def _epoch(self, planned: PlannedEpoch) -> list[dict[str, Any]]:
        """Run an epoch and return the record of each member; none where nothing is left to do in it."""
        multiplier = self.trainer.multiplier
        if planned == NOISY:
            losses = self.trainer.noisy_epoch(None if self.steering is None else self._steer)
            self._prune()
            return self._record(planned.phase, losses, multiplier)
        if planned.level is None:
            return self._record(planned.phase, self.trainer.fine_tune_epoch(), multiplier)
        (member,) = self.members
        if member.pruner.is_exhausted(planned.before):
            return []
        removed = member.pruner.remove_to(planned.level)
        if sum(removed.values()):
            member.callbacks.on_pruning(self.position, removed)
        losses = self.trainer.fine_tune_epoch()
        removed_so_far = member.pruner.count(planned.level)
        return self._record(planned.phase, losses, multiplier, level=planned.level, removed=removed_so_far)

    def _record(self, phase: str, losses: Sequence[float], multiplier: float, **extra: float) -> list[dict[str, Any]]:
        """Append the record of the epoch that has just ended to the history of each member."""
        return [
            each.history.record(phase, loss, multiplier * each.model.kl_weight, **extra)
            for each, loss in zip(self.members, losses, strict=True)
        ]

    def _prune(self) -> None:
        """Remove what is due after an epoch with noise."""
        epoch = self.position + 1
        for each in self.members:
            removed = self.pruning.after_epoch(each.pruner, epoch, self.trainer.rates)
            if removed is not None:
                each.callbacks.on_pruning(epoch, removed)
                if self.pruning.shrinks and each.pruner.shrink(self.trainer.optimizer):
                    self.trainer.network_changed()
            if self.steering is not None and epoch == self.noisy_epochs:
                each.callbacks.on_pruning(epoch, self.steering.complete())
            each.watch.note(epoch)

    def _steer(self) -> None:
        """Take a turn at steering to a size, if one is due after the last step."""
        trainer, steering = self.trainer, self.steering
        if steering is not None and steering.is_due(trainer.step):
            removed, multiplier = steering.turn(trainer.step, trainer.multiplier)
            trainer.multiply_kl(multiplier)
            if any(removed.values()):
                self.members[0].callbacks.on_pruning(self.position + 1, removed)

    def _end_noise(self) -> None:
        for each in self.members:
            each.pruner.restore_removed()
            each.watch.note_end(self.data)
            self.pruning.after_noise(each.pruner)


def _means(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the means of the numbers that a progress bar shows."""
    return {name: statistics.fmean(record[name] for record in records) for name in _SHOWN if name in records[0]}
