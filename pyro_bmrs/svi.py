"""Fitting: stochastic variational inference, the pruning schedule, and fine-tuning of what remains."""

import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from pyro.distributions import Categorical
from torch import Tensor, nn
from tqdm.auto import tqdm

from pyro_bmrs.cost import count_parameters
from pyro_bmrs.criteria import BMRS_N, Criterion, PruningContext
from pyro_bmrs.data import Data, check_data, check_observations
from pyro_bmrs.elbo import Granularity, MeanFieldELBO
from pyro_bmrs.guide import TruncatedLogNormalGuide
from pyro_bmrs.model import NoisyNetwork
from pyro_bmrs.noise import fix_noise
from pyro_bmrs.prediction import predict
from pyro_bmrs.structures import find_structures

__all__ = ["Continuous", "FitResult", "PostTraining", "fit", "resolve_device"]


@dataclass(frozen=True)
class Continuous:
    """Prune while training (algorithm 1 of the paper, upper half).

    Args:
        start: Number of epochs before the first pruning.
        every: Number of epochs between prunings.
    """

    start: int = 4
    every: int = 1


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
    guide: TruncatedLogNormalGuide,
    train: Data,
    validation: Data | None = None,
    *,
    criterion: Criterion | None = BMRS_N(prior_log_odds=math.log(3)),  # noqa: B008  (frozen)
    pruning: Continuous | PostTraining = Continuous(),  # noqa: B008  (frozen)
    epochs: int = 30,
    fine_tune_epochs: int = 10,
    batch_size: int = 128,
    lr: float = 1e-3,
    posterior_lr: float | None = None,
    kl_warmup_epochs: int = 0,
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
        model: The model; its ``num_data`` is filled in if None. Fitted in place.
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
        kl_warmup_epochs: Epochs over which the KL's weight rises linearly to ``model.kl_weight``.
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
    posterior_lr = 50 * lr if posterior_lr is None else posterior_lr
    x, y = check_data(train, "train")
    if not 1 <= batch_size <= len(x):
        raise ValueError(f"batch_size must lie between 1 and the {len(x)} training examples, but got {batch_size}")
    for name, value in {"epochs": epochs, "fine_tune_epochs": fine_tune_epochs, "kl_warmup_epochs": kl_warmup_epochs}.items():
        if value < 0:
            raise ValueError(f"{name} must not be negative, but got {value}")
    for name, rate in {"lr": lr, "posterior_lr": posterior_lr}.items():
        if not (rate > 0 and math.isfinite(rate)):
            raise ValueError(f"{name} must be a positive number, but got {rate}")
    target = resolve_device(device)
    model.to(target)
    guide.to(target)
    held_out = None if validation is None else _on_device(check_data(validation, "validation"), target)
    run = _Run(
        model=model,
        guide=guide,
        train=_on_device((x, y), target),
        validation=held_out,
        criterion=criterion,
        elbo=MeanFieldELBO(granularity),
        batch_size=batch_size,
        bar=tqdm(total=epochs + fine_tune_epochs, unit="epoch", disable=not progress),
        on_epoch=on_epoch,
    )
    with run.bar, _local_settings(seed, target):
        check_observations(model, *run.train, "train")
        if run.validation is not None:
            check_observations(model, *run.validation, "validation")
        levels = pruning.levels if isinstance(pruning, PostTraining) else ()
        level_epochs = len(levels) * pruning.epochs_per_level if isinstance(pruning, PostTraining) else 0
        run.bar.total += level_epochs
        run.prepare(lr, posterior_lr, epochs, epochs + level_epochs + fine_tune_epochs)
        for epoch in range(epochs):
            run.noisy_epoch(kl_warmup_epochs)
            if isinstance(pruning, Continuous) and epoch + 1 >= pruning.start:
                if (epoch + 1 - pruning.start) % pruning.every == 0:
                    run.prune()
            run.record("noisy")
        run.freeze()
        if isinstance(pruning, PostTraining) and criterion is not None:
            run.prune_progressively(pruning)
        for _ in range(fine_tune_epochs):
            run.fine_tune_epoch()
            run.record("fine-tune")
    return FitResult(model.masks, run.scores, run.history, time.perf_counter() - run.started)


def resolve_device(device: str | torch.device) -> torch.device:
    """Return the device called ``device``; ``"auto"`` is CUDA where there is one, else the CPU."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(device)


def _on_device(pair: tuple[Tensor, Tensor], device: torch.device) -> tuple[Tensor, Tensor]:
    return pair[0].to(device), pair[1].to(device)


@contextmanager
def _local_settings(seed: int | None, device: torch.device) -> Iterator[None]:
    """Seed, and switch off validation of what has been validated already, for the time of a fit only."""
    devices = [device] if device.type == "cuda" and seed is not None else []
    with torch.random.fork_rng(devices, enabled=seed is not None), pyro.validation_enabled(False):
        if seed is not None:
            torch.manual_seed(seed)
        yield


class _Run:
    """One fit: the state that its epochs share."""

    def __init__(
        self,
        model: NoisyNetwork,
        guide: TruncatedLogNormalGuide,
        train: tuple[Tensor, Tensor],
        validation: tuple[Tensor, Tensor] | None,
        criterion: Criterion | None,
        elbo: MeanFieldELBO,
        batch_size: int,
        bar: "tqdm[Any]",
        on_epoch: Callable[[dict[str, Any]], None] | None,
    ) -> None:
        self.model, self.guide, self.train, self.validation = model, guide, train, validation
        self.criterion, self.elbo, self.bar, self.on_epoch = criterion, elbo, bar, on_epoch
        self.steps_per_epoch = math.ceil(len(train[0]) / batch_size)
        self.batch_size = batch_size
        self.history: list[dict[str, Any]] = []
        self.scores: dict[str, Tensor] = {}
        self.started = self.epoch_started = time.perf_counter()
        self.step = 0
        self.loss = math.nan

    def prepare(self, lr: float, posterior_lr: float, noisy_epochs: int, epochs: int) -> None:
        """Trace the network's structures and set up the optimiser."""
        model = self.model
        if model.num_data is None:
            model.num_data = len(self.train[0])
        self.kl_weight = model.kl_weight
        self.structures = find_structures(model.net, self.train[0][:2])
        self.parameters_dense = count_parameters(model.net)
        self.frozen = (self.guide.loc.detach().clone(), self.guide.log_scale.detach().clone())
        weights = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.Adam(
            [{"params": weights, "lr": lr}, {"params": list(self.guide.parameters()), "lr": posterior_lr}], fused=True
        )
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, [_cosine(n * self.steps_per_epoch) for n in (epochs, noisy_epochs)]
        )

    def noisy_epoch(self, kl_warmup_epochs: int) -> None:
        """One epoch of SVI."""
        model, guide = self.model, self.guide
        warmup = kl_warmup_epochs * self.steps_per_epoch

        def loss(x: Tensor, y: Tensor) -> Tensor:
            model.kl_weight = self.kl_weight * min(1.0, (self.step + 1) / (warmup + 1))
            return self.elbo.differentiable_loss(model, guide, x, y) / model.num_data

        try:
            self._epoch(loss)
        finally:
            model.kl_weight = self.kl_weight

    def fine_tune_epoch(self) -> None:
        """One epoch of the weights alone, every noise at its posterior mean."""
        model = self.model
        means = {site: mean.detach() for site, mean in self.guide.mean().items()}

        def loss(x: Tensor, y: Tensor) -> Tensor:
            with fix_noise(means):
                return -model.likelihood(model.net(x)).log_prob(y).mean()

        self._epoch(loss)

    def _epoch(self, loss_of_batch: Callable[[Tensor, Tensor], Tensor]) -> None:
        self.model.train()
        x, y = self.train
        losses = []
        for batch in torch.randperm(len(x), device=x.device).tensor_split(self.steps_per_epoch):
            self.optimizer.zero_grad()
            loss = loss_of_batch(x[batch], y[batch])
            if not loss.is_cuda and not math.isfinite(loss.item()):
                raise self._not_finite(f"the loss became {loss.item()} at step {self.step}")
            loss.backward()
            self.optimizer.step()
            self.schedule.step()
            losses.append(loss.detach())
            self.step += 1
        record = torch.stack(losses)
        if not bool(torch.isfinite(record).all()):
            first = self.step - len(losses) + int((~torch.isfinite(record)).nonzero()[0])
            raise self._not_finite(f"the loss became {record[~torch.isfinite(record)][0].item()} at step {first}")
        if self._non_finite_tensors():
            raise self._not_finite(f"a parameter stopped being finite by step {self.step}")
        self.loss = record.mean().item()

    def _non_finite_tensors(self) -> list[str]:
        named = {**{f"weight {name!r}": p for name, p in self.model.net.named_parameters()}}
        for what, flat in (("location", self.guide.loc), ("log scale", self.guide.log_scale)):
            named.update({f"posterior {what} of site {site!r}": part for site, part in self.guide.split(flat).items()})
        return [name for name, tensor in named.items() if not bool(torch.isfinite(tensor).all())]

    def _not_finite(self, what: str) -> FloatingPointError:
        culprits = self._non_finite_tensors() or [self._first_non_finite_activation()]
        return FloatingPointError(f"{what}; not finite: {', '.join(culprits[:3])}. Lower lr or posterior_lr")

    @torch.no_grad()
    def _first_non_finite_activation(self) -> str:
        """Return the noise site at whose input the network's activations first overflow."""
        found: list[str] = []
        handles = [
            layer.register_forward_pre_hook(
                lambda _, inputs, site=site: found.append(site) if not bool(torch.isfinite(inputs[0]).all()) else None
            )
            for site, layer in self.model.noise.items()
        ]
        with fix_noise(self.guide.mean()):
            self.model.net(self.train[0][: self.batch_size])
        for handle in handles:
            handle.remove()
        return f"the input of site {found[0]!r}" if found else "the likelihood of the network's output"

    def prune(self) -> None:
        """Remove what the criterion supports removing."""
        if self.criterion is None:
            return
        context = self._context()
        supported = self.criterion.supported(context)
        self._note_scores(self.criterion.scores(context))
        self._remove(supported)

    def _context(self) -> PruningContext:
        x, y = self.train
        return PruningContext(self.model.eval(), self.guide, self.structures, x[: self.batch_size], y[: self.batch_size])

    def _note_scores(self, scores: Mapping[str, Tensor]) -> None:
        masks = self.model.masks
        self.scores = {
            site: torch.where(masks[site], score, self.scores.get(site, score)) for site, score in scores.items()
        }

    def _remove(self, removed: Mapping[str, Tensor]) -> None:
        flat = torch.cat([removed[site] for site in self.guide.sizes])
        still = flat & self.guide.keep
        for frozen, parameter in zip(self.frozen, (self.guide.loc, self.guide.log_scale), strict=True):
            frozen[still] = parameter.detach()[still]
        for site, layer in self.model.noise.items():
            alive = bool(layer.keep.any())
            layer.remove(removed[site])
            if alive and not bool(layer.keep.any()):
                warnings.warn(
                    f"{site!r} has lost all its structures: the network's output no longer depends on what comes before; "
                    "lower model.kl_weight, or prune later",
                    RuntimeWarning,
                    stacklevel=4,
                )

    def freeze(self) -> None:
        """Put the posteriors of removed structures back to what they were on removal; Adam's momentum moved them on."""
        gone = ~self.guide.keep
        with torch.no_grad():
            for frozen, parameter in zip(self.frozen, (self.guide.loc, self.guide.log_scale), strict=True):
                parameter[gone] = frozen[gone]

    def prune_progressively(self, schedule: PostTraining) -> None:
        """Remove the highest scores first, level by level, fine-tuning at each."""
        assert self.criterion is not None
        context = self._context()
        supported = torch.cat(list(self.criterion.supported(context).values()))
        scores = self.criterion.scores(context)
        self._note_scores(scores)
        flat = torch.cat(list(scores.values())).nan_to_num(nan=-math.inf)
        order = torch.where(supported, flat, flat.nan_to_num(posinf=0) - 1e30).argsort(descending=True)
        limit = int(supported.sum()) if schedule.stop else len(order)
        for level in schedule.levels:
            count = min(round(level * len(order)), limit)
            removed = torch.zeros_like(supported)
            removed[order[:count]] = True
            self._remove(self.guide.split(removed))
            for _ in range(schedule.epochs_per_level):
                self.fine_tune_epoch()
                self.record("post-training", level=level, removed=count)
            if count == limit:
                break

    def record(self, phase: str, **extra: float) -> None:
        """Append the epoch to the history and show it."""
        masks = self.model.masks
        parameters = count_parameters(self.model.net, self.structures, masks)
        now = time.perf_counter()
        entry: dict[str, Any] = {
            "epoch": len(self.history) + 1,
            "phase": phase,
            "loss": self.loss,
            "kl": self.guide.kl().item(),
            "kl_weight": self.kl_weight,
            "structures": sum(int(mask.sum()) for mask in masks.values()),
            "parameters": parameters,
            "compression": 1 - parameters / self.parameters_dense,
            **extra,
            **self._validate(),
            "seconds": now - self.epoch_started,
        }
        self.epoch_started = now
        self.history.append(entry)
        shown = {"loss": entry["loss"], "removed": f"{100 * entry['compression']:.1f} %"}
        if "accuracy_validation" in entry:
            shown["accuracy"] = f"{100 * entry['accuracy_validation']:.2f} %"
        self.bar.set_postfix(shown)
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


def _cosine(steps: int) -> Callable[[int], float]:
    return lambda step: 0.5 * (1 + math.cos(math.pi * min(step / max(steps, 1), 1.0)))
