"""A fit under way: its plan of epochs, the loop over them, and the state that a checkpoint keeps."""

import copy
import math
import time
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from pyro_bmrs.checks import check_integer
from pyro_bmrs.structures.copying import copied
from pyro_bmrs.svi.callbacks import Callback
from pyro_bmrs.svi.checkpoint import State, join, part, read_checkpoint, write_checkpoint
from pyro_bmrs.svi.data.source import Source
from pyro_bmrs.svi.diagnostics import PosteriorWatch
from pyro_bmrs.svi.history import History
from pyro_bmrs.svi.probe import check_probe, probe, probed
from pyro_bmrs.svi.problem import check_settings
from pyro_bmrs.svi.pruner import Pruner
from pyro_bmrs.svi.run_folder import RunFolder
from pyro_bmrs.svi.schedule import MOST_EPOCHS, Continuous, PostTraining, Pruning, ToSize
from pyro_bmrs.svi.steering import FIRST_MULTIPLIER, Steering
from pyro_bmrs.svi.training import Trainer

__all__ = ["Planned", "Run", "make_plan"]


@dataclass(frozen=True)
class Planned:
    """One epoch to come: its phase, and for post-training pruning the level before it and its own."""

    phase: str
    before: float | None = None
    level: float | None = None


_NOISY = Planned("noisy")


def make_plan(epochs: int, pruning: Pruning, fine_tune_epochs: int) -> list[Planned]:
    """Return the epochs of a fit, in order.

    Raises:
        TypeError, ValueError: If a number of epochs is none.
    """
    check_integer("epochs", epochs, high=MOST_EPOCHS)
    check_integer("fine_tune_epochs", fine_tune_epochs, high=MOST_EPOCHS)
    plan = [_NOISY] * epochs
    if isinstance(pruning, PostTraining):
        for before, level in zip((None, *pruning.levels), pruning.levels, strict=False):
            plan += [Planned("post-training", before, level)] * pruning.epochs_per_level
    return plan + [Planned("fine-tune")] * fine_tune_epochs


class Run:
    """A fit under way.

    Args:
        trainer: Runs an epoch.
        pruner: Removes structures.
        validation: What to report on, or None.
        pruning: When to remove.
        settings: What a checkpoint must agree with to be gone on from, by name.
        folder: Where checkpoints go, or None.

    Attributes:
        history: One record per epoch.
        position: Number of epochs of the plan that are behind.
        watch: Has noted where the posterior was.
    """

    def __init__(
        self,
        trainer: Trainer,
        pruner: Pruner,
        validation: Source | None,
        pruning: Pruning,
        settings: dict[str, Any],
        folder: RunFolder | None,
    ) -> None:
        self.trainer, self.pruner, self.validation = trainer, pruner, validation
        self.model, self.guide = trainer.model, trainer.guide
        self.pruning, self.settings, self.folder = pruning, settings, folder
        self.steering: Steering | None = None
        if isinstance(pruning, ToSize) and trainer.rates.noisy_epochs:
            self.steering = Steering(pruner, pruning, trainer.rates.noisy_epochs * trainer.steps_per_epoch)
            trainer.multiplier = FIRST_MULTIPLIER
        self.history = History(self.model, self.guide, pruner, validation)
        self.watch = PosteriorWatch(self.guide, trainer.rates.noisy_epochs)
        self.position, self._saved_at = 0, 0
        self._started, self._seconds_before = time.perf_counter(), 0.0

    @property
    def seconds(self) -> float:
        """Wall time so far, all sessions of a resumed fit together."""
        return self._seconds_before + time.perf_counter() - self._started

    def go(self, plan: list[Planned], checkpoint_every: int, callbacks: Callback) -> None:
        """Run the epochs of the plan from the present position on."""
        noisy = plan.count(_NOISY)
        if self.position == noisy == 0:
            self._end_noise()
        try:
            while self.position < len(plan):
                record = self._epoch(plan[self.position], callbacks)
                self.position += 1
                if self.position == noisy:
                    self._end_noise()
                if record is not None:
                    callbacks.on_epoch_end(record)
                if self.position % checkpoint_every == 0 or self.position == len(plan):
                    self._save()
        except FloatingPointError as error:
            raise FloatingPointError(f"{error}. Lower lr or posterior_lr{self._last_good()}") from None

    def resume(self, plan: list[Planned]) -> None:
        """Go to where the checkpoint in the folder was written.

        Model and guide are changed only once all of it has been tried on copies of them.

        Raises:
            ValueError: If it is damaged, or of another fit.
        """
        assert self.folder is not None
        path = self.folder.checkpoint
        state = read_checkpoint(path)
        try:
            check_settings(part(state, "fit").info["settings"], self.settings)
            self._on_copies()._restore(state, plan)
        except (ValueError, KeyError, RuntimeError, IndexError, TypeError, AttributeError) as error:
            reason = f"it has lost {error}" if isinstance(error, KeyError) else str(error)
            raise ValueError(f"{path} cannot be gone on from: {reason}") from error
        self._restore(state, plan)

    def _epoch(self, planned: Planned, callbacks: Callback) -> dict[str, Any] | None:
        epoch = self.position + 1
        kl_weight = self.trainer.multiplier * self.model.kl_weight
        if planned == _NOISY:
            loss = self.trainer.noisy_epoch(None if self.steering is None else lambda: self._steer(callbacks))
            self._prune(epoch, callbacks)
            self.watch.note(epoch)
            return self.history.record("noisy", loss, kl_weight)
        if planned.level is None:
            return self.history.record("fine-tune", self.trainer.fine_tune_epoch(), kl_weight)
        if self.pruner.is_exhausted(planned.before):
            return None
        removed = self.pruner.remove_to(planned.level)
        if sum(removed.values()):
            callbacks.on_pruning(epoch - 1, removed)
        loss = self.trainer.fine_tune_epoch()
        removed_so_far = self.pruner.count(planned.level)
        return self.history.record("post-training", loss, kl_weight, level=planned.level, removed=removed_so_far)

    def _prune(self, epoch: int, callbacks: Callback) -> None:
        """Remove what is due after an epoch with noise."""
        pruning, rates = self.pruning, self.trainer.rates
        if isinstance(pruning, Continuous) and pruning.is_due(epoch, rates.kl_warmup_epochs):
            callbacks.on_pruning(epoch, self.pruner.remove_supported())
            if pruning.shrink and self.pruner.shrink(self.trainer.optimizer):
                self.trainer.network_changed()
        if self.steering is not None and epoch == rates.noisy_epochs:
            callbacks.on_pruning(epoch, self.steering.complete())

    def _steer(self, callbacks: Callback) -> None:
        """Take a turn at steering to a size, if one is due after the last step."""
        trainer, steering = self.trainer, self.steering
        if steering is not None and steering.is_due(trainer.step):
            removed, trainer.multiplier = steering.turn(trainer.step, trainer.multiplier)
            if any(removed.values()):
                callbacks.on_pruning(self.position + 1, removed)

    def _end_noise(self) -> None:
        self.pruner.restore_removed()
        self.watch.note_end(self.trainer.data)
        if isinstance(self.pruning, PostTraining):
            self.pruner.rank(self.pruning)

    def _save(self) -> None:
        """Write a checkpoint; a full disk costs the checkpoint, not the fit."""
        if self.folder is None:
            return
        rows = {f"rows.{i}": each for i, each in enumerate(tree_leaves(probed(self.trainer.data.first)))}
        of_fit = {"position": self.position, "seconds": self.seconds, "settings": self.settings}
        state = join(
            {
                "fit": State(self.pruner.positions, of_fit),
                "model": State(self.model.state_dict()),
                "guide": State(self.guide.state_dict()),
                "latents": State({} if self.guide.latents is None else self.guide.latents.module.state_dict()),
                "trainer": self.trainer.state(),
                "pruner": self.pruner.state(),
                "history": self.history.state(),
                "watch": self.watch.state(),
                "probe": State({**rows, **probe(self.model, self.guide, probed(self.trainer.data.first))}),
            }
        )
        if not self.trainer.fabric.is_global_zero:
            return
        try:
            write_checkpoint(self.folder.checkpoint, state)
        except OSError as error:
            warnings.warn(f"{error}; the fit goes on", RuntimeWarning, stacklevel=5)
        else:
            self._saved_at = len(self.history.entries)

    def _on_copies(self) -> "Run":
        """Return this fit on copies of model and guide, at its start."""
        trainer, pruner = self.trainer, self.pruner
        model, guide = copied((self.model, self.guide))
        again = Trainer(
            trainer.fabric, model, guide, trainer.elbo, trainer.data, trainer.rates, torch.Generator()
        )  # fmt: skip
        pruner_of_copies = Pruner(model, guide, pruner.criterion, pruner.batch, copy.copy(pruner.structures))
        return Run(again, pruner_of_copies, self.validation, self.pruning, self.settings, self.folder)

    def _restore(self, state: State, plan: list[Planned]) -> None:
        of_fit = part(state, "fit")
        position, step = of_fit.info["position"], part(state, "trainer").info["step"]
        whole = [isinstance(each, int) and not isinstance(each, bool) for each in (position, step)]
        if not (all(whole) and 0 <= position <= len(plan) and 0 <= step <= position * self.trainer.steps_per_epoch):
            raise ValueError(f"its position, epoch {position} and step {step}, is none of this fit")
        self.pruner.shrink_to(of_fit.tensors, self.trainer.optimizer)
        modules: list[tuple[torch.nn.Module, str]] = [(self.model, "model"), (self.guide, "guide")]
        if self.guide.latents is not None:
            modules.append((self.guide.latents.module, "latents"))
        for module, name in modules:
            tensors = part(state, name).tensors
            for key, value in module.state_dict().items():
                if key in tensors and tensors[key].dtype != value.dtype:
                    raise ValueError(f"{key!r} of the {name} was of {tensors[key].dtype}, is of {value.dtype}")
            module.load_state_dict(tensors)
        parts: dict[str, Any] = {
            "pruner": self.pruner,
            "history": self.history,
            "watch": self.watch,
            "trainer": self.trainer,
        }
        for name, each in parts.items():
            each.restore(part(state, name))
        self._check_probe(part(state, "probe").tensors)
        self.position, self._seconds_before = position, float(of_fit.info["seconds"])
        if not (math.isfinite(self._seconds_before) and len(self.history.entries) <= position):
            raise ValueError("its history is none of this fit")
        self._saved_at = len(self.history.entries)

    def _check_probe(self, then: dict[str, Tensor]) -> None:
        """Raise ``ValueError`` unless the network does to a checkpoint's rows what it did when that was written."""
        leaves, structure = tree_flatten(probed(self.trainer.data.first))
        rows = tree_unflatten([then[f"rows.{i}"].to(leaf.dtype) for i, leaf in enumerate(leaves)], structure)
        outputs = {name: tensor for name, tensor in then.items() if not name.startswith("rows.")}
        check_probe(probe(self.model, self.guide, rows), outputs)

    def _last_good(self) -> str:
        if not self._saved_at or self.folder is None:
            return ""
        return f"; the last good checkpoint, {self.folder.checkpoint}, is of the end of epoch {self._saved_at}"
