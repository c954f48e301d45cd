"""Fitting: stochastic variational inference, the pruning schedule, and fine-tuning of what remains."""

import math
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from pyro.distributions import Categorical
from torch import Tensor
from tqdm.auto import tqdm

from pyro_bmrs.cost import count_parameters
from pyro_bmrs.criteria import BMRS_N, Criterion, PruningContext
from pyro_bmrs.data import Data, check_data, check_observations
from pyro_bmrs.elbo import Granularity, MeanFieldELBO
from pyro_bmrs.guide import FlatGuide
from pyro_bmrs.model import NoisyNetwork
from pyro_bmrs.prediction import predict
from pyro_bmrs.structures import Structures, find_structures
from pyro_bmrs.training import Trainer

__all__ = ["Continuous", "FitResult", "PostTraining", "fit", "resolve_device"]

DEFAULT_CRITERION = BMRS_N(prior_log_odds=math.log(3))


@dataclass(frozen=True)
class Continuous:
    """Prune while training (algorithm 1 of the paper, upper half).

    Args:
        start: Epoch after which to prune first, counted from 1; by default the first one with the KL at its full
            weight, since what has been fitted before is not the model's posterior.
        every: Number of epochs between prunings.
    """

    start: int | None = None
    every: int = 1

    def is_due(self, epoch: int, kl_warmup_epochs: int = 0) -> bool:
        """Return whether to prune after ``epoch``, counted from 1."""
        start = kl_warmup_epochs + 1 if self.start is None else self.start
        return epoch >= start and (epoch - start) % self.every == 0


@dataclass(frozen=True)
class PostTraining:
    """Prune after training (algorithm 1, lower half): rank once, remove progressively, stop where the criterion does.

    Args:
        levels: Increasing fractions of all structures to remove.
        epochs_per_level: Epochs of fine-tuning at each level.
        stop: Whether to stop at the last structure that the criterion supports removing; otherwise all levels are
            visited in the order of the scores.
    """

    levels: tuple[float, ...] = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95)
    epochs_per_level: int = 1
    stop: bool = True


@dataclass(frozen=True)
class FitResult:
    """What ``fit`` returns; the model and the guide themselves are fitted in place.

    Attributes:
        masks: For each site a bool tensor of shape ``(size,)``, True = kept.
        scores: For each site the criterion's score of each structure when it was last judged, of shape ``(size,)``;
            removed where >= 0. Empty if nothing was judged.
        history: One record an epoch: ``epoch``, ``phase``, ``loss`` (nats an example), ``kl`` (nats), ``kl_weight``,
            ``structures``, ``parameters``, ``compression``, ``seconds``, and with validation data
            ``log_likelihood_validation`` (nats an example) and, for class labels, ``accuracy_validation``.
        seconds: Wall time of the whole fit.
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
    pruning: Continuous | PostTraining = Continuous(),
    epochs: int = 30,
    fine_tune_epochs: int = 10,
    batch_size: int = 128,
    lr: float = 2e-3,
    posterior_lr: float | None = None,
    kl_warmup_epochs: int | None = None,
    granularity: Granularity = "example",
    device: str | torch.device = "auto",
    seed: int | None = None,
    progress: bool = True,
    on_epoch: Callable[[dict[str, Any]], None] | None = None,
) -> FitResult:
    r"""Fit weights and posterior by SVI, remove what the criterion does not support, and fine-tune the rest.

    First ``epochs`` epochs with noise, pruned as ``pruning`` says; then ``fine_tune_epochs`` with every
    :math:`\theta` of the remaining structures at its posterior mean. Adam for both, learning rates decaying along a
    cosine to zero: the weights' over all epochs, the posterior's over those with noise.

    Args:
        model: The model; its ``num_data`` is filled in if None. Fitted in place, and left in eval mode.
        guide: Its guide. Fitted in place.
        train: Inputs ``(n, ...)`` and observations ``(n, ...)``, as a pair of tensors or a ``TensorDataset``.
        validation: The same, to report on after every epoch; never used to decide anything.
        criterion: What to remove; None removes nothing.
        pruning: When to remove: ``Continuous()`` or ``PostTraining()``.
        epochs: Epochs with noise.
        fine_tune_epochs: Epochs without (of post-training pruning: after the last level).
        batch_size: At most this many examples a step.
        lr: Initial learning rate of the weights.
        posterior_lr: Initial learning rate of the posterior's parameters, in units of :math:`\log\theta`;
            by default 50 times ``lr``: locations have to travel, weights do not.
        kl_warmup_epochs: Epochs over which the KL's weight rises linearly to ``model.kl_weight``; by default a
            quarter of ``epochs``. Without, a posterior that moves faster than the weights collapses onto its prior
            before they have learned anything.
        granularity: How often noise is drawn, see ``MeanFieldELBO``.
        device: ``"auto"`` takes CUDA if there is a device.
        seed: Seed of data order and noise; the caller's random state is left alone. None draws from it instead.
        progress: Whether to show a progress bar.
        on_epoch: Called with each record of the history as it is made.

    Returns:
        Masks, last scores and the history.

    Raises:
        TypeError, ValueError: If the data or an argument does not fit; before training starts.
        FloatingPointError: If the loss or a parameter stops being finite; names the step and the site.
    """
    started = time.perf_counter()
    posterior_lr = 50 * lr if posterior_lr is None else posterior_lr
    kl_warmup_epochs = epochs // 4 if kl_warmup_epochs is None else kl_warmup_epochs
    _check_numbers(
        positive={"lr": lr, "posterior_lr": posterior_lr},
        not_negative={"epochs": epochs, "fine_tune_epochs": fine_tune_epochs, "kl_warmup_epochs": kl_warmup_epochs},
    )
    x, y = check_data(train, "train")
    if not 1 <= batch_size <= len(x):
        raise ValueError(f"batch_size must lie between 1 and the {len(x)} training examples, but got {batch_size}")
    target = resolve_device(device)
    model.to(target)
    guide.to(target)
    training_data = (x.to(target), y.to(target))
    held_out = None
    if validation is not None:
        x_held_out, y_held_out = check_data(validation, "validation")
        held_out = (x_held_out.to(target), y_held_out.to(target))
    level_epochs = len(pruning.levels) * pruning.epochs_per_level if isinstance(pruning, PostTraining) else 0
    bar = tqdm(
        total=epochs + level_epochs + fine_tune_epochs,
        unit="epoch",
        disable=not progress,
        mininterval=0.1 if sys.stderr.isatty() else 10,
    )
    with bar, _local_settings(seed, target):
        check_observations(model, *training_data, "train")
        if held_out is not None:
            check_observations(model, *held_out, "validation")
        trainer = Trainer(model, guide, MeanFieldELBO(granularity), training_data, batch_size)
        trainer.set_rates(lr, posterior_lr, epochs, epochs + level_epochs + fine_tune_epochs)
        pruner = _Pruner(model, guide, criterion, (x[:batch_size].to(target), y[:batch_size].to(target)))
        history = _History(model, guide, pruner.structures, held_out, bar, on_epoch)
        for epoch in range(1, epochs + 1):
            loss = trainer.noisy_epoch(kl_warmup_epochs)
            if isinstance(pruning, Continuous) and pruning.is_due(epoch, kl_warmup_epochs):
                pruner.remove_supported()
            history.record("noisy", loss)
        pruner.restore_removed()
        if isinstance(pruning, PostTraining):
            for level, removed in pruner.remove_by_levels(pruning):
                for _ in range(pruning.epochs_per_level):
                    history.record("post-training", trainer.fine_tune_epoch(), level=level, removed=removed)
        for _ in range(fine_tune_epochs):
            history.record("fine-tune", trainer.fine_tune_epoch())
    model.eval()
    return FitResult(model.masks, pruner.scores, history.entries, time.perf_counter() - started)


def _check_numbers(positive: Mapping[str, float], not_negative: Mapping[str, float]) -> None:
    for name, value in positive.items():
        if not (value > 0 and math.isfinite(value)):
            raise ValueError(f"{name} must be a positive number, but got {value}")
    for name, value in not_negative.items():
        if value < 0:
            raise ValueError(f"{name} must not be negative, but got {value}")


def resolve_device(device: str | torch.device) -> torch.device:
    """Return the device called ``device``; ``"auto"`` is CUDA where there is one, else the CPU."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(device)


@contextmanager
def _local_settings(seed: int | None, device: torch.device) -> Iterator[None]:
    """Seed, and switch off validation of what has been validated already, for the time of a fit only."""
    devices = [device] if device.type == "cuda" and seed is not None else []
    with torch.random.fork_rng(devices, enabled=seed is not None), pyro.validation_enabled(False):
        if seed is not None:
            torch.manual_seed(seed)
        yield


class _Pruner:
    """Asks the criterion and removes what it says; keeps the posteriors for which structures were removed."""

    def __init__(
        self,
        model: NoisyNetwork,
        guide: FlatGuide,
        criterion: Criterion | None,
        batch: tuple[Tensor, Tensor],
    ) -> None:
        self.model, self.guide, self.criterion, self.batch = model, guide, criterion, batch
        self.structures = find_structures(model.net, batch[0][:2])
        self.scores: dict[str, Tensor] = {}
        self._at_removal = [parameter.detach().clone() for parameter in guide.parameters()]

    def remove_supported(self) -> None:
        """Remove what the criterion supports removing."""
        if self.criterion is not None:
            context = self._context()
            scores = self.criterion.scores(context)
            self._note(scores)
            self._remove(self.criterion.supported(context, scores))

    def remove_by_levels(self, schedule: PostTraining) -> Iterator[tuple[float, int]]:
        """Remove the highest scores first, and yield each level and the number removed once it is reached."""
        if self.criterion is None:
            return
        context = self._context()
        scores = self.criterion.scores(context)
        supported = torch.cat(list(self.criterion.supported(context, scores).values()))
        self._note(scores)
        flat = torch.cat(list(scores.values())).nan_to_num(nan=-math.inf)
        by_score = flat.argsort(descending=True)
        order = by_score[supported[by_score].argsort(descending=True, stable=True)]  # supported ones first
        limit = int(supported.sum()) if schedule.stop else len(order)
        for level in schedule.levels:
            count = min(round(level * len(order)), limit)
            self._remove(self.guide.split(torch.zeros_like(supported).index_fill(0, order[:count], True)))
            yield level, count
            if count == limit:
                return

    def restore_removed(self) -> None:
        """Give removed structures back the posteriors they were removed for; Adam's momentum has moved them on."""
        removed = ~self.guide.keep
        with torch.no_grad():
            for saved, parameter in zip(self._at_removal, self.guide.parameters(), strict=True):
                parameter[removed] = saved[removed]

    def _context(self) -> PruningContext:
        return PruningContext(self.model.eval(), self.guide, self.structures, *self.batch)

    def _note(self, scores: Mapping[str, Tensor]) -> None:
        masks = self.model.masks
        self.scores = {
            site: torch.where(masks[site], score, self.scores.get(site, score)) for site, score in scores.items()
        }

    def _remove(self, removed: Mapping[str, Tensor]) -> None:
        newly = torch.cat([removed[site] for site in self.guide.sizes]) & self.guide.keep
        for saved, parameter in zip(self._at_removal, self.guide.parameters(), strict=True):
            saved[newly] = parameter.detach()[newly]
        for site, layer in self.model.noise.items():
            alive = bool(layer.keep.any())
            layer.remove(removed[site])
            if alive and not bool(layer.keep.any()):
                warnings.warn(
                    f"{site!r} has lost all its structures: the network's output no longer depends on what comes "
                    "before; lower model.kl_weight, or prune later",
                    RuntimeWarning,
                    stacklevel=4,
                )


class _History:
    """Records each epoch, shows it on the bar and passes it on."""

    def __init__(
        self,
        model: NoisyNetwork,
        guide: FlatGuide,
        structures: Mapping[str, Structures],
        validation: tuple[Tensor, Tensor] | None,
        bar: "tqdm[Any]",
        on_epoch: Callable[[dict[str, Any]], None] | None,
    ) -> None:
        self.model, self.guide, self.structures, self.validation = model, guide, structures, validation
        self.bar, self.on_epoch = bar, on_epoch
        self.entries: list[dict[str, Any]] = []
        self._parameters_dense = count_parameters(model.net)
        self._last = time.perf_counter()

    def record(self, phase: str, loss: float, **extra: float) -> None:
        """Append the epoch that has just ended."""
        masks = self.model.masks
        parameters = count_parameters(self.model.net, self.structures, masks)
        metrics = self._validate()
        now = time.perf_counter()
        entry: dict[str, Any] = {
            "epoch": len(self.entries) + 1,
            "phase": phase,
            "loss": loss,
            "kl": self.guide.kl().item(),
            "kl_weight": self.model.kl_weight,
            "structures": sum(int(mask.sum()) for mask in masks.values()),
            "parameters": parameters,
            "compression": 1 - parameters / self._parameters_dense,
            **extra,
            **metrics,
            "seconds": now - self._last,
        }
        self._last = now
        self.entries.append(entry)
        shown = {"loss": f"{loss:.3g}", "removed": f"{100 * entry['compression']:.1f} %"}
        if "accuracy_validation" in entry:
            shown["accuracy"] = f"{100 * entry['accuracy_validation']:.2f} %"
        self.bar.set_postfix(shown, refresh=False)
        self.bar.update()
        if self.on_epoch is not None:
            self.on_epoch(entry)

    def _validate(self) -> dict[str, float]:
        if self.validation is None:
            return {}
        x, y = self.validation
        observed = self.model.likelihood(predict(self.model, self.guide, x))
        metrics = {"log_likelihood_validation": observed.log_prob(y).mean().item()}
        if isinstance(observed, Categorical):
            metrics["accuracy_validation"] = (observed.logits.argmax(-1) == y).double().mean().item()
        return metrics
