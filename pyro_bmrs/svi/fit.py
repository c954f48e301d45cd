"""Fitting: stochastic variational inference, pruning, and fine-tuning of what remains."""

import json
import math
import re
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyro
import torch
from lightning_fabric import Fabric
from torch import Tensor

from pyro_bmrs.criteria import BMRS_N, Criterion
from pyro_bmrs.io.files import PathLike
from pyro_bmrs.model.guides.flat import FlatGuide
from pyro_bmrs.model.network import NoisyNetwork
from pyro_bmrs.structures.inputs import to_input
from pyro_bmrs.structures.refusal import Unremovable, removable_structures
from pyro_bmrs.structures.structure_set import StructureSet
from pyro_bmrs.svi.callbacks import Callback, Callbacks, FabricLoggers, JSONLines, ProgressBar
from pyro_bmrs.svi.checkpoint import State, join, part, read_checkpoint, write_checkpoint
from pyro_bmrs.svi.data import Data, check_data, check_observations
from pyro_bmrs.svi.devices import check_precision, make_fabric
from pyro_bmrs.svi.elbo import Granularity, MeanFieldELBO
from pyro_bmrs.svi.history import History
from pyro_bmrs.svi.pruner import Pruner
from pyro_bmrs.svi.schedule import Continuous, PostTraining, Rates, check_numbers
from pyro_bmrs.svi.training import Trainer

__all__ = ["FitResult", "fit"]

DEFAULT_CRITERION = BMRS_N(prior_log_odds=math.log(3))
DEFAULT_PRUNING = Continuous()


@dataclass(frozen=True)
class FitResult:
    """What ``fit`` returns; the model and the guide themselves are fitted in place.

    Attributes:
        masks: For each site a bool tensor of shape ``(size,)``, True = kept, in the numbering of the network that was
            given to ``fit``. Where the fit has shrunk it, ``compact(model, guide, None, ...)`` takes the model's own.
        scores: For each site the criterion's score of each structure when it was last judged, of shape ``(size,)``;
            removed where >= 0. Empty if nothing was judged.
        history: One record an epoch: ``epoch``, ``phase``, ``loss`` (nats an example), ``kl`` (nats), ``kl_weight``,
            ``structures``, ``parameters``, ``compression``, ``seconds``, and with validation data
            ``log_likelihood_validation`` (nats an example) and, for class labels, ``accuracy_validation``.
        seconds: Wall time of the whole fit, all sessions of a resumed one together.
    """

    masks: dict[str, Tensor]
    scores: dict[str, Tensor]
    history: list[dict[str, Any]]
    seconds: float

    @property
    def compression(self) -> float:
        """Fraction of the trainable weights and biases that the masks remove."""
        return self.history[-1]["compression"] if self.history else 0.0


def fit(
    model: NoisyNetwork,
    guide: FlatGuide,
    train: Data,
    validation: Data | None = None,
    *,
    criterion: Criterion | None = DEFAULT_CRITERION,
    pruning: Continuous | PostTraining = DEFAULT_PRUNING,
    epochs: int = 30,
    fine_tune_epochs: int = 10,
    batch_size: int = 128,
    lr: float = 2e-3,
    posterior_lr: float | None = None,
    kl_warmup_epochs: int | None = None,
    decay: bool = True,
    granularity: Granularity = "example",
    device: str | torch.device = "auto",
    precision: str = "32-true",
    fabric: Fabric | None = None,
    compile: bool = False,  # noqa: A002  (torch's name for it)
    structures: StructureSet | None = None,
    unremovable: Unremovable = "refuse",
    seed: int | None = None,
    progress: bool = True,
    callbacks: Sequence[Callback] = (),
    folder: PathLike | None = None,
    checkpoint_every: int = 1,
    resume: bool = False,
) -> FitResult:
    r"""Fit weights and posterior by SVI, remove what the criterion does not support, and fine-tune the rest.

    First ``epochs`` epochs with noise, pruned as ``pruning`` says; then ``fine_tune_epochs`` with every
    :math:`\theta` of the remaining structures at its posterior mean. Adam for both, learning rates decaying along a
    cosine to zero: the weights' over all epochs, the posterior's over those with noise.

    Args:
        model: The model; its ``num_data`` is filled in if None. Fitted in place, and left in eval mode.
        guide: Its guide. Fitted in place.
        train: Inputs ``(n, ...)`` and observations ``(n, ...)``, as a pair of tensors or a ``TensorDataset``. Inputs
            of dtype uint8 are kept as they are until used, and then divided by 255.
        validation: The same, to report on after every epoch; never used to decide anything.
        criterion: What to remove; None removes nothing.
        pruning: When to remove: ``Continuous()`` or ``PostTraining()``.
        epochs: Epochs with noise.
        fine_tune_epochs: Epochs without (of post-training pruning: after the last level).
        batch_size: At most this many examples a step, over all processes.
        lr: Initial learning rate of the weights.
        posterior_lr: Initial learning rate of the posterior's parameters, in units of :math:`\log\theta`;
            by default 50 times ``lr``: locations have to travel, weights do not.
        kl_warmup_epochs: Epochs over which the KL's weight rises linearly to ``model.kl_weight``; by default a
            quarter of ``epochs``. Without, a posterior that moves faster than the weights collapses onto its prior
            before they have learned anything.
        decay: Whether learning rates decay along the cosine; otherwise they stay as they are.
        granularity: How often noise is drawn, see ``MeanFieldELBO``.
        device: ``"auto"`` takes CUDA if there is a device.
        precision: ``"32-true"``, ``"64-true"``, ``"bf16-mixed"`` or ``"16-mixed"``; posterior and KL stay in float32
            or better.
        fabric: A launched ``lightning_fabric.Fabric`` instead of ``device`` and ``precision``: several processes (DDP,
            under torchrun or SLURM too) and loggers (TensorBoard, W&B). Every process calls ``fit`` with the same
            arguments and gets the same result; each draws its own noise.
        compile: Whether to compile steps, which takes its time once (on CUDA to capture them as a graph, which does
            not): for long fits.
        structures: What ``find_structures`` has said of the network; found and proved by default.
        unremovable: What to do with sites whose structures cannot be removed later: ``"refuse"`` them before training,
            or ``"mask"`` them only.
        seed: Seed of data order and noise; the caller's random state is left alone. None draws from it instead.
        progress: Whether to show a progress bar.
        callbacks: Told of every epoch, every pruning and the end.
        folder: Where to keep ``metrics.jsonl``, a line an epoch, and ``checkpoint/fit.safetensors``.
        checkpoint_every: Epochs between checkpoints; there is always one at the end.
        resume: Whether to go on from the checkpoint in ``folder``, if there is one, to the same result, to the bit on
            a CPU, as a fit without interruption. One that is finished is only read.

    Returns:
        Masks, last scores and the history.

    Raises:
        TypeError, ValueError: If the data or an argument does not fit; before training starts.
        FloatingPointError: If the loss, a gradient or a parameter stops being finite; names the step, what is not
            finite, and the last good checkpoint.
        FileExistsError: If there is a checkpoint in ``folder`` already and ``resume`` is False.
        OSError: If a checkpoint cannot be written; the last good one stays.
    """
    plan = _plan(epochs, pruning, fine_tune_epochs)
    levels = len(plan) - epochs - fine_tune_epochs
    rates = Rates.planned(lr, posterior_lr, epochs, fine_tune_epochs, kl_warmup_epochs, levels, decay)
    check_numbers(positive={"checkpoint_every": checkpoint_every}, not_negative={})
    x, y = check_data(train, "train")
    held_out = None if validation is None else check_data(validation, "validation")
    fabric = make_fabric(device, precision) if fabric is None else _check_fabric(fabric)
    if not fabric.world_size <= batch_size <= len(x):
        raise ValueError(
            f"batch_size must lie between {fabric.world_size} and the {len(x)} training examples, but got {batch_size}"
        )
    model.num_data = len(x) if model.num_data is None else model.num_data
    model.to(fabric.device)
    guide.to(fabric.device)
    settings = {
        "criterion": re.sub(" at 0x[0-9a-f]+", "", repr(criterion)),
        "pruning": repr(pruning),
        "rates": repr(rates),
        "batch_size": batch_size,
        "granularity": granularity,
        "kl_weight": {site: model.kl_weight * layer.kl_weight for site, layer in model.noise.items()},
        "num_data": model.num_data,
        "sizes": model.sizes,
        "processes": fabric.world_size,
        "precision": fabric.strategy.precision.precision,
        "seed": seed,
    }
    if resume and folder is None:
        raise ValueError("resume=True needs the folder whose checkpoint to go on from")
    if compile and isinstance(pruning, Continuous) and pruning.shrink:
        raise ValueError("compile and shrink exclude each other: whatever shrinks would have to be compiled anew")
    path = None if folder is None else _checkpoint_path(Path(folder), resume)
    listeners = [FabricLoggers(fabric), *callbacks]
    if folder is not None:
        listeners.append(JSONLines(Path(folder) / "metrics.jsonl"))
    if progress:
        listeners.append(ProgressBar())
    with _local_settings(seed, fabric) as order, closing(Callbacks(listeners if fabric.is_global_zero else [])) as told:
        check_observations(model, x, y, "train")
        if held_out is not None:
            check_observations(model, *held_out, "validation")
            held_out = (held_out[0].to(fabric.device), held_out[1].to(fabric.device))
        first = (to_input(x[:batch_size].to(fabric.device), model.net), y[:batch_size].to(fabric.device))
        known = removable_structures(model.net, first[0][:2], structures, unremovable)
        pruner = Pruner(model, guide, criterion, first, known)
        history = History(model, guide, pruner, held_out)
        trainer = Trainer(fabric, model, guide, MeanFieldELBO(granularity), (x, y), batch_size, rates, order, compile)
        run = _Run(model, guide, trainer, pruner, history, settings, path)
        if path is not None and path.exists():
            run.resume()
        if run.position < len(plan):
            told.on_start(len(plan), history.entries)
            run.go(plan, pruning, rates.kl_warmup_epochs, checkpoint_every, told)
        model.eval()
        result = FitResult(pruner.masks, pruner.scores, history.entries, run.seconds)
        told.on_end(result)
    return result


def _check_fabric(fabric: Fabric) -> Fabric:
    check_precision(fabric.strategy.precision.precision)
    if fabric.world_size > 1 and not torch.distributed.is_initialized():
        raise ValueError(f"the Fabric of {fabric.world_size} processes is not launched: call fabric.launch() first")
    return fabric


def _checkpoint_path(folder: Path, resume: bool) -> Path:
    path = folder / "checkpoint" / "fit.safetensors"
    if path.exists() and not resume:
        raise FileExistsError(
            f"{path} is the checkpoint of an earlier fit: go on from it with resume=True, or choose another folder"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


@contextmanager
def _local_settings(seed: int | None, fabric: Fabric) -> Iterator[torch.Generator]:
    """Seed noise and data order, and switch off validation of what has been validated already, for a fit only.

    Yields the generator of the data order, which all processes share; their noise has a seed each.
    """
    drawn = int(torch.randint(2**31, ())) if seed is None else seed
    shared = fabric.broadcast(drawn)
    devices = [fabric.device] if fabric.device.type == "cuda" else []
    with torch.random.fork_rng(devices), pyro.validation_enabled(False):
        torch.manual_seed(shared + fabric.global_rank)
        yield torch.Generator().manual_seed(shared)


@dataclass(frozen=True)
class _Planned:
    """One epoch to come: its phase, and for post-training pruning the level before it and its own."""

    phase: str
    before: float | None = None
    level: float | None = None


_NOISY = _Planned("noisy")


def _plan(epochs: int, pruning: Continuous | PostTraining, fine_tune_epochs: int) -> list[_Planned]:
    plan = [_NOISY] * epochs
    if isinstance(pruning, PostTraining):
        for before, level in zip((None, *pruning.levels), pruning.levels, strict=False):
            plan += [_Planned("post-training", before, level)] * pruning.epochs_per_level
    return plan + [_Planned("fine-tune")] * fine_tune_epochs


class _Run:
    """A fit under way: what to do next, and the state that a checkpoint keeps."""

    def __init__(
        self,
        model: NoisyNetwork,
        guide: FlatGuide,
        trainer: Trainer,
        pruner: Pruner,
        history: History,
        settings: dict[str, Any],
        path: Path | None,
    ) -> None:
        self.model, self.guide, self.trainer, self.pruner, self.history = model, guide, trainer, pruner, history
        self.settings, self.path = settings, path
        self.position, self._saved_at = 0, 0
        self._started, self._seconds_before = time.perf_counter(), 0.0

    @property
    def seconds(self) -> float:
        return self._seconds_before + time.perf_counter() - self._started

    def go(
        self,
        plan: list[_Planned],
        pruning: Continuous | PostTraining,
        kl_warmup_epochs: int,
        checkpoint_every: int,
        told: Callback,
    ) -> None:
        """Run the epochs of the plan from where we are."""
        noisy = plan.count(_NOISY)
        if self.position == noisy == 0:
            self._end_noise(pruning)
        try:
            while self.position < len(plan):
                record = self._epoch(plan[self.position], pruning, kl_warmup_epochs, told)
                self.position += 1
                if self.position == noisy:
                    self._end_noise(pruning)
                if record is not None:
                    told.on_epoch_end(record)
                if self.position % checkpoint_every == 0 or self.position == len(plan):
                    self._save()
        except FloatingPointError as error:
            raise FloatingPointError(f"{error}. Lower lr or posterior_lr{self._last_good()}") from None

    def _epoch(
        self, planned: _Planned, pruning: Continuous | PostTraining, kl_warmup_epochs: int, told: Callback
    ) -> dict[str, Any] | None:
        epoch = self.position + 1
        if planned == _NOISY:
            loss = self.trainer.noisy_epoch()
            if isinstance(pruning, Continuous) and pruning.is_due(epoch, kl_warmup_epochs):
                told.on_pruning(epoch, self.pruner.remove_supported())
                if pruning.shrink and self.pruner.shrink(self.trainer.optimizer):
                    self.trainer.network_changed()
            return self.history.record("noisy", loss)
        if planned.level is None:
            return self.history.record("fine-tune", self.trainer.fine_tune_epoch())
        if self.pruner.is_exhausted(planned.before):
            return None
        removed = self.pruner.remove_to(planned.level)
        if sum(removed.values()):
            told.on_pruning(epoch - 1, removed)
        loss = self.trainer.fine_tune_epoch()
        return self.history.record("post-training", loss, level=planned.level, removed=self.pruner.count(planned.level))

    def _end_noise(self, pruning: Continuous | PostTraining) -> None:
        self.pruner.restore_removed()
        if isinstance(pruning, PostTraining):
            self.pruner.rank(pruning)

    def _save(self) -> None:
        """Write a checkpoint; a disk that fails us costs the checkpoint, not the run."""
        if self.path is None:
            return
        of_fit = {"position": self.position, "seconds": self.seconds, "settings": self.settings}
        state = join(
            {
                "fit": State(self.pruner.positions, of_fit),
                "model": State(self.model.state_dict()),
                "guide": State(self.guide.state_dict()),
                "trainer": self.trainer.state(),
                "pruner": self.pruner.state(),
                "history": self.history.state(),
            }
        )
        if not self.trainer.fabric.is_global_zero:
            return
        try:
            write_checkpoint(self.path, state)
        except OSError as error:
            warnings.warn(f"{error}; the fit goes on", RuntimeWarning, stacklevel=5)
        else:
            self._saved_at = len(self.history.entries)

    def resume(self) -> None:
        """Take up the state that the checkpoint keeps.

        Raises:
            ValueError: If it is of a fit with other settings.
        """
        assert self.path is not None
        state = read_checkpoint(self.path)
        of_fit = part(state, "fit")
        then, now = of_fit.info["settings"], json.loads(json.dumps(self.settings))
        changed = [f"{name} was {then.get(name)}, is {now[name]}" for name in now if then.get(name) != now[name]]
        if changed:
            raise ValueError(f"{self.path} is of a fit with other settings: {'; '.join(changed)}")
        self.pruner.shrink_to(of_fit.tensors, self.trainer.optimizer)
        self.model.load_state_dict(part(state, "model").tensors)
        self.guide.load_state_dict(part(state, "guide").tensors)
        for each, name in ((self.pruner, "pruner"), (self.history, "history"), (self.trainer, "trainer")):
            each.restore(part(state, name))
        self.position, self._seconds_before = of_fit.info["position"], of_fit.info["seconds"]
        self._saved_at = len(self.history.entries)

    def _last_good(self) -> str:
        if not self._saved_at:
            return ""
        return f"; the last good checkpoint, {self.path}, is of the end of epoch {self._saved_at}"
