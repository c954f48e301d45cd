"""Fitting one model from many seeds at once: deep ensembles, and error bars, for less than the sum of their parts."""

import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from typing import Any

import pyro
import torch

from pyro_bmrs.criteria import Criterion
from pyro_bmrs.model.guides.flat import FlatGuide
from pyro_bmrs.model.network import NoisyNetwork
from pyro_bmrs.structures.inputs import to_input
from pyro_bmrs.structures.refusal import Unremovable, removable_structures
from pyro_bmrs.svi.callbacks import Callback, Callbacks, ProgressBar
from pyro_bmrs.svi.data import Data, check_data, check_observations
from pyro_bmrs.svi.devices import resolve_device
from pyro_bmrs.svi.elbo import Granularity, MeanFieldELBO
from pyro_bmrs.svi.fit import DEFAULT_CRITERION, DEFAULT_PRUNING
from pyro_bmrs.svi.history import History
from pyro_bmrs.svi.pruner import Pruner
from pyro_bmrs.svi.replicas import ReplicaTrainer
from pyro_bmrs.svi.result import FitResult
from pyro_bmrs.svi.schedule import Continuous, Rates

__all__ = ["Replica", "fit_ensemble"]

Make = Callable[[], tuple[NoisyNetwork, FlatGuide]]


@dataclass(frozen=True)
class Replica:
    """One of the fits of an ensemble.

    Attributes:
        seed: Its seed.
        model: Its model, fitted.
        guide: Its guide, fitted.
        result: What ``fit`` would have returned, but ``seconds``, there and in the history, are all replicas' together.
    """

    seed: int
    model: NoisyNetwork
    guide: FlatGuide
    result: FitResult


def fit_ensemble(
    make: Make,
    train: Data,
    validation: Data | None = None,
    *,
    seeds: Sequence[int],
    criterion: Criterion | None = DEFAULT_CRITERION,
    pruning: Continuous = DEFAULT_PRUNING,
    epochs: int = 30,
    fine_tune_epochs: int = 10,
    batch_size: int = 128,
    lr: float = 2e-3,
    posterior_lr: float | None = None,
    decay: bool = True,
    kl_warmup_epochs: int | None = None,
    granularity: Granularity = "example",
    device: str | torch.device = "auto",
    unremovable: Unremovable = "refuse",
    progress: bool = True,
    callbacks: Callable[[int], Sequence[Callback]] | None = None,
) -> list[Replica]:
    """Fit a model once for each seed, all at once: what small networks leave idle, their replicas use.

    Each replica is fitted as ``fit(*make(), train, validation, seed=seed, ...)`` would, ``make`` having been called
    under ``torch.manual_seed(seed)``: the same initial weights, order of the data, schedule and decisions, but other
    draws of the noise. One step trains all of them, by ``torch.func.vmap``.

    Args:
        make: Makes a model and its guide, all alike but for their numbers.
        train: As for ``fit``, and so are all the others but these.
        validation: Likewise.
        seeds: One for each replica.
        criterion: Likewise.
        pruning: ``Continuous()``; replicas stay of one shape, so it cannot shrink them.
        epochs: Likewise.
        fine_tune_epochs: Likewise.
        batch_size: At most this many examples a step and replica.
        lr: Likewise.
        posterior_lr: Likewise.
        decay: Likewise.
        kl_warmup_epochs: Likewise.
        granularity: Likewise.
        device: Likewise.
        unremovable: As for ``fit``.
        progress: Whether to show a progress bar, with means over the replicas.
        callbacks: From a seed to what is told of its replica.

    Returns:
        One replica a seed, in their order.

    Raises:
        TypeError, ValueError: If the data or an argument does not fit, or the replicas are not alike; before training
            starts.
        FloatingPointError: If a loss, gradient or parameter of a replica stops being finite; names seed and step.

    Example:
        >>> def make():
        ...     net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), bmrs.MultiplicativeNoise(8), nn.Linear(8, 2))
        ...     model = bmrs.NoisyNetwork(net)
        ...     return model, bmrs.TruncatedLogNormalGuide(model)
        >>> x = torch.randn(20, 4)
        >>> data = (x, (x[:, 0] > 0).long())
        >>> replicas = bmrs.fit_ensemble(make, data, seeds=range(3), epochs=2, batch_size=5, progress=False)
        >>> torch.stack([bmrs.predict(each.model, each.guide, x).softmax(-1) for each in replicas]).mean(0).shape
        torch.Size([20, 2])
    """
    _check_pruning(pruning)
    if not seeds or len(set(seeds)) < len(seeds):
        raise ValueError(f"seeds must be one or more different integers, but got {list(seeds)}")
    rates = Rates.planned(lr, posterior_lr, epochs, fine_tune_epochs, kl_warmup_epochs, decay=decay)
    x, y = check_data(train, "train")
    held_out = None if validation is None else check_data(validation, "validation")
    if not 1 <= batch_size <= len(x):
        raise ValueError(f"batch_size must lie between 1 and the {len(x)} training examples, but got {batch_size}")
    target = resolve_device(device)
    started = time.perf_counter()
    with torch.random.fork_rng([target] if target.type == "cuda" else []), pyro.validation_enabled(False):
        pairs = _make_all(make, seeds, target, len(x))
        for model, _ in pairs:
            check_observations(model, x, y, "train")
            if held_out is not None:
                check_observations(model, *held_out, "validation")
        held_out = None if held_out is None else (held_out[0].to(target), held_out[1].to(target))
        models, guides = zip(*pairs, strict=True)
        trainer = ReplicaTrainer(models, guides, seeds, MeanFieldELBO(granularity), (x, y), batch_size, rates)
        first = (to_input(x[:batch_size].to(target), models[0].net), y[:batch_size].to(target))
        structures = removable_structures(models[0].net, first[0][:2], None, unremovable)  # of replicas alike
        with ExitStack() as open_callbacks:
            fits = []
            for seed, (model, guide) in zip(seeds, pairs, strict=True):
                told = open_callbacks.enter_context(closing(Callbacks(callbacks(seed) if callbacks else [])))
                pruner = Pruner(model, guide, criterion, first, structures)
                fits.append(_Fit(pruner, History(model, guide, pruner, held_out), told))
            bar = open_callbacks.enter_context(closing(Callbacks([ProgressBar()] if progress else [])))
            _run(trainer, fits, pruning, bar)
            trainer.stack.release()
            replicas = []
            for seed, (model, guide), each in zip(seeds, pairs, fits, strict=True):
                model.eval()
                seconds = time.perf_counter() - started
                result = FitResult(each.pruner.masks, each.pruner.scores, each.history.entries, seconds)
                each.told.on_end(result)
                replicas.append(Replica(seed, model, guide, result))
    return replicas


def _check_pruning(pruning: Any) -> None:
    if not isinstance(pruning, Continuous):
        raise TypeError(
            f"pruning must be Continuous() for an ensemble, but got {pruning!r}: replicas would stop at different "
            "levels, with different epochs; fit them one by one"
        )
    if pruning.shrink:
        raise ValueError(
            "pruning=Continuous(shrink=True) would give the replicas of an ensemble different shapes: leave shrink "
            "out, and compact them at the end"
        )


def _make_all(
    make: Make, seeds: Sequence[int], device: torch.device, num_data: int
) -> list[tuple[NoisyNetwork, FlatGuide]]:
    pairs = []
    for seed in seeds:
        torch.manual_seed(seed)
        model, guide = make()
        model.num_data = num_data if model.num_data is None else model.num_data
        pairs.append((model.to(device), guide.to(device)))
    settings = {(model.num_data, model.kl_weight) for model, _ in pairs}
    if len(settings) > 1:
        raise ValueError(f"replicas must have one num_data and one kl_weight, but got the pairs {sorted(settings)}")
    return pairs


@dataclass(frozen=True)
class _Fit:
    """What is kept for each replica on its own."""

    pruner: Pruner
    history: History
    told: Callback


def _run(trainer: ReplicaTrainer, fits: Sequence[_Fit], pruning: Continuous, bar: Callback) -> None:
    """Run all epochs."""
    noisy_epochs, epochs = trainer.rates.noisy_epochs, trainer.rates.epochs
    for told in (*(each.told for each in fits), bar):
        told.on_start(epochs, [])
    for epoch in range(1, epochs + 1):
        noisy = epoch <= noisy_epochs
        try:
            losses = trainer.noisy_epoch() if noisy else trainer.fine_tune_epoch()
        except FloatingPointError as error:
            raise FloatingPointError(f"{error}. Lower lr or posterior_lr") from None
        records = []
        for each, loss in zip(fits, losses, strict=True):
            if noisy and pruning.is_due(epoch, trainer.rates.kl_warmup_epochs):
                each.told.on_pruning(epoch, each.pruner.remove_supported())
            records.append(each.history.record("noisy" if noisy else "fine-tune", loss))
            if epoch == noisy_epochs:
                each.pruner.restore_removed()
            each.told.on_epoch_end(records[-1])
        bar.on_epoch_end(_means(records))


def _means(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the means of the numbers that the progress bar shows."""
    shown = ("loss", "compression", "accuracy_validation")
    return {name: statistics.fmean(record[name] for record in records) for name in shown if name in records[0]}
