"""Where a fit stops and goes on: its checkpoints, written whole, and read only into the fit that they are of."""

import copy
import math
from typing import Any

import torch
from torch import Generator, Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from pyro_bmrs.structures.copying import copied
from pyro_bmrs.svi.checkpoint import State, join, part, read_checkpoint, write_checkpoint
from pyro_bmrs.svi.probe import check_probe, probe, probed
from pyro_bmrs.svi.problem import check_settings
from pyro_bmrs.svi.pruner import Pruner
from pyro_bmrs.svi.run import Member, Run
from pyro_bmrs.svi.run_folder import RunFolder
from pyro_bmrs.svi.trained_model import TrainedModel
from pyro_bmrs.svi.training import Trainer
from pyro_bmrs.warn import warn

__all__ = ["Checkpointing"]


class Checkpointing:
    """Writes the checkpoints of a run of one model, and goes on from them.

    Args:
        run: The run.
        trained: What it trains.
        settings: What a checkpoint must agree with to be resumed from, by name.
        folder: Where checkpoints go.
        every: Epochs between two of them; there is always one at the end.
    """

    def __init__(
        self, run: Run, trained: TrainedModel, settings: dict[str, Any], folder: RunFolder, every: int = 1
    ) -> None:
        self.run, self.trained, self.settings, self.folder, self.every = run, trained, settings, folder, every
        (self.member,) = run.members
        self._saved_at = 0

    def exists(self) -> bool:
        """Return whether there is a checkpoint to go on from."""
        return self.folder.checkpoint.exists()

    def save_if_due(self) -> None:
        """Write a checkpoint if it is time; a full disk costs the checkpoint, not the fit."""
        position = self.run.position
        if position % self.every and position != len(self.run.plan):
            return
        state = self._state()
        if not self.trained.fabric.is_global_zero:
            return
        try:
            write_checkpoint(self.folder.checkpoint, state)
        except OSError as error:
            warn(f"{error}; the fit goes on", RuntimeWarning)
        else:
            self._saved_at = len(self.member.history.entries)

    def resume(self) -> None:
        """Go to where the checkpoint in the folder was written.

        Model and guide are changed only once all of it has been tried on copies of them.

        Raises:
            ValueError: If it is damaged, or of another fit.
        """
        path = self.folder.checkpoint
        state = read_checkpoint(path)
        try:
            check_settings(part(state, "fit").info["settings"], self.settings)
            self._on_copies()._restore(state)
        except (ValueError, KeyError, RuntimeError, IndexError, TypeError, AttributeError) as error:
            reason = f"it has lost {error}" if isinstance(error, KeyError) else str(error)
            raise ValueError(f"{path} cannot be resumed from: {reason}") from error
        self._restore(state)

    def last_good(self) -> str:
        """Return which checkpoint there is to go on from, for a message."""
        if not self._saved_at:
            return ""
        return f"; the last good checkpoint, {self.folder.checkpoint}, is of the end of epoch {self._saved_at}"

    def _modules(self) -> dict[str, torch.nn.Module]:
        latents = self.trained.guide.latents
        others: dict[str, torch.nn.Module] = {} if latents is None else {"latents": latents.module}
        return {"model": self.trained.model, "guide": self.trained.guide, **others}

    def _parts(self) -> dict[str, Any]:
        """Return what has a state of its own, in the order in which it is restored."""
        member = self.member
        return {
            "pruner": member.pruner,
            "history": member.history,
            "watch": member.watch,
            "trainer": self.run.trainer,
        }

    def _state(self) -> State:
        rows = probed(self.trained.data.first)
        tensors = {f"rows.{i}": each for i, each in enumerate(tree_leaves(rows))}
        of_fit = {"position": self.run.position, "seconds": self.run.seconds, "settings": self.settings}
        parts = {
            "fit": State(self.member.pruner.positions, of_fit),
            **{name: State(module.state_dict()) for name, module in self._modules().items()},
            **{name: each.state() for name, each in self._parts().items()},
        }
        parts["probe"] = State({**tensors, **probe(self.trained.model, self.trained.guide, rows)})
        return join(parts)

    def _on_copies(self) -> "Checkpointing":
        """Return this fit on copies of model and guide, at its start."""
        own, run, pruner = self.trained, self.run, self.member.pruner
        model, guide = copied((own.model, own.guide))
        trained = TrainedModel(own.fabric, model, guide, own.elbo, own.data, Generator())
        pruner = Pruner(model, guide, pruner.criterion, pruner.batch, copy.copy(pruner.structures))
        member = Member.of(pruner, self.member.history.validation, run.noisy_epochs, self.member.callbacks)
        trainer = Trainer(trained, run.trainer.rates)
        return Checkpointing(Run(trainer, [member], run.pruning, run.plan, run.data), trained, {}, self.folder)

    def _restore(self, state: State) -> None:
        run, of_fit = self.run, part(state, "fit")
        position, step = of_fit.info["position"], part(state, "trainer").info["step"]
        whole = [isinstance(each, int) and not isinstance(each, bool) for each in (position, step)]
        most = position * self.trained.steps_per_epoch
        if not (all(whole) and 0 <= position <= len(run.plan) and 0 <= step <= most):
            raise ValueError(f"its position, epoch {position} and step {step}, is none of this fit")
        self.member.pruner.shrink_to(of_fit.tensors, run.trainer.optimizer)
        for name, module in self._modules().items():
            tensors = part(state, name).tensors
            for key, value in module.state_dict().items():
                if key in tensors and tensors[key].dtype != value.dtype:
                    raise ValueError(f"{key!r} of the {name} was of {tensors[key].dtype}, is of {value.dtype}")
            module.load_state_dict(tensors)
        for name, each in self._parts().items():
            each.restore(part(state, name))
        self._check_probe(part(state, "probe").tensors)
        entries, seconds = self.member.history.entries, float(of_fit.info["seconds"])
        if not (math.isfinite(seconds) and len(entries) <= position):
            raise ValueError("its history is none of this fit")
        run.resume_at(position, seconds)
        self._saved_at = len(entries)

    def _check_probe(self, then: dict[str, Tensor]) -> None:
        """Raise ``ValueError`` unless the network does to a checkpoint's rows what it did when that was written."""
        leaves, structure = tree_flatten(probed(self.trained.data.first))
        rows = tree_unflatten([then[f"rows.{i}"].to(leaf.dtype) for i, leaf in enumerate(leaves)], structure)
        outputs = {name: tensor for name, tensor in then.items() if not name.startswith("rows.")}
        check_probe(probe(self.trained.model, self.trained.guide, rows), outputs)
