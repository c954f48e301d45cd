"""Fitting one model from many seeds at once: deep ensembles, and error bars, for less than the sum of their parts."""

import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyro_bmrs.checks import check_flag, check_function, check_list, check_seed, described
from pyro_bmrs.criteria import Criterion
from pyro_bmrs.model.guides.flat import FlatGuide
from pyro_bmrs.model.network import NoisyNetwork
from pyro_bmrs.structures.inputs import first_examples, on_device
from pyro_bmrs.structures.refusal import Unremovable, removable_structures
from pyro_bmrs.svi.advice import Advice
from pyro_bmrs.svi.callbacks import Callback, Callbacks, ProgressBar
from pyro_bmrs.svi.data.in_memory import InMemory
from pyro_bmrs.svi.data.making import Data
from pyro_bmrs.svi.data.source import Source
from pyro_bmrs.svi.devices import check_dtypes, resolve_device
from pyro_bmrs.svi.diagnostics import PosteriorWatch
from pyro_bmrs.svi.elbo import Granularity, MeanFieldELBO
from pyro_bmrs.svi.fit import DEFAULT_CRITERION, DEFAULT_PRUNING
from pyro_bmrs.svi.history import History
from pyro_bmrs.svi.isolation import isolated, local_seed
from pyro_bmrs.svi.pruner import Pruner
from pyro_bmrs.svi.replicas import ReplicaTrainer
from pyro_bmrs.svi.result import FitResult, FitWarning
from pyro_bmrs.svi.schedule import Continuous, Rates
from pyro_bmrs.svi.settings import (
    check_callbacks,
    check_choices,
    check_data_sets,
    check_model_and_guide,
    check_trained,
    counting_examples,
)

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
    epochs: int | None = None,
    fine_tune_epochs: int | None = None,
    batch_size: int | None = None,
    lr: float = 2e-3,
    posterior_lr: float | None = None,
    decay: bool = True,
    kl_warmup_epochs: int | None = None,
    granularity: Granularity = "shared",
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
        train: As for ``fit``, but tensors: one of inputs, one of observations. All the others are as for ``fit`` too.
        validation: Likewise.
        seeds: One for each replica.
        criterion: Likewise.
        pruning: ``Continuous()``; replicas stay of one shape, so it cannot shrink them.
        epochs: Likewise.
        fine_tune_epochs: Likewise.
        batch_size: At most this many examples per step and replica.
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
        One replica per seed, in their order.

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
    check_choices(criterion, pruning)
    _check_pruning(pruning)
    seeds = _checked_seeds(seeds)
    check_flag("progress", progress)
    check_function("make", make, "that returns a model and its guide")
    if callbacks is not None:
        check_function("callbacks", callbacks, "from a seed to a sequence of Callback")
    elbo, target = MeanFieldELBO(granularity), resolve_device(device)
    started = time.perf_counter()
    with isolated([]), local_seed(seeds[0], [target]), ExitStack() as open_now:
        pairs = _make_all(make, seeds)
        open_now.enter_context(isolated([each for pair in pairs for each in pair]))
        source, held_out = check_data_sets([model for model, _ in pairs], train, validation, None, batch_size)
        data = _tensors(source)
        rates = Rates.planned(lr, posterior_lr, epochs, fine_tune_epochs, kl_warmup_epochs, source.steps, decay=decay)
        for seed, pair in zip(seeds, pairs, strict=True):
            with _of_seed(seed):
                check_trained(*pair, rates.epochs - rates.noisy_epochs)
        listeners = [_listeners(seed, callbacks) for seed in seeds]
        model, guide = pairs[0]
        x, y = on_device(source.first[0], guide.device, model.net), source.first[1].to(guide.device)
        structures = removable_structures(model.net, first_examples(x, 2), None, unremovable)  # of replicas alike
        Pruner(model, guide, criterion, (x, y), structures).check_criterion()
        for model, guide in pairs:
            open_now.enter_context(counting_examples(model, source.size))
            model.to(target)
            guide.to(target)
        _check_settings(pairs)
        first = on_device(source.first[0], target, pairs[0][0].net), source.first[1].to(target)
        for each in (source, *([] if held_out is None else [held_out])):
            each.place(target)
        models, guides = zip(*pairs, strict=True)
        trainer = ReplicaTrainer(models, guides, seeds, elbo, data, source.batch_size, rates)
        fits = []
        for (model, guide), own in zip(pairs, listeners, strict=True):
            listener = open_now.enter_context(closing(Callbacks(own)))
            pruner = Pruner(model, guide, criterion, first, structures)
            history = History(model, guide, pruner, held_out)
            advice = Advice(history, pruner, rates, source)
            fits.append(_Fit(pruner, history, listener, advice, PosteriorWatch(guide, rates.noisy_epochs)))
            model.fitted = True
        bar = open_now.enter_context(closing(Callbacks([ProgressBar()] if progress else [])))
        try:
            _run(trainer, fits, pruning, source, bar)
        finally:
            trainer.stack.release()
        replicas = [_ended(seed, each, started) for seed, each in zip(seeds, fits, strict=True)]
        _advise(seeds, fits)
    return replicas


def _ended(seed: int, fit: "_Fit", started: float) -> Replica:
    """Return what has become of one replica, and tell its callbacks."""
    model, guide = fit.history.model.eval(), fit.history.guide
    model.fine_tuned = fit.history.ends_fine_tuned
    seconds, diagnostics = time.perf_counter() - started, fit.watch.diagnostics()
    result = FitResult(fit.pruner.masks, fit.pruner.scores, fit.history.entries, seconds, diagnostics)
    fit.listener.on_end(result)
    return Replica(seed, model, guide, result)


def _listeners(seed: int, callbacks: Callable[[int], Sequence[Callback]] | None) -> list[Callback]:
    """Return what listens to the fit of one seed."""
    return [] if callbacks is None else check_callbacks(callbacks(seed))


def _checked_seeds(seeds: Any) -> list[int]:
    given = check_list("seeds", seeds, "integers")
    checked = [check_seed("each of the seeds", seed) for seed in given]
    if not checked or len(set(checked)) < len(checked):
        raise ValueError(f"seeds must be one or more different integers, but got {checked}")
    return checked


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


def _tensors(source: Source) -> tuple[Tensor, Tensor]:
    """Return inputs and observations of data that replicas can share a step on."""
    if not (isinstance(source, InMemory) and isinstance(source.x, Tensor)):
        raise TypeError(
            "train of an ensemble must be a pair of tensors, one of inputs and one of observations: fit the replicas "
            "one by one, or load the data first"
        )
    return source.x, source.y


@contextmanager
def _of_seed(seed: int) -> Iterator[None]:
    """Have errors name the seed of the replica that they are of."""
    try:
        yield
    except (TypeError, ValueError) as error:
        raise type(error)(f"the replica of seed {seed}: {error}") from None


def _make_all(make: Make, seeds: Sequence[int]) -> list[tuple[NoisyNetwork, FlatGuide]]:
    """Return a model and a guide for each seed, no two of which share anything that is trained."""
    pairs: list[tuple[NoisyNetwork, FlatGuide]] = []
    known: dict[int, int] = {}
    for seed in seeds:
        torch.manual_seed(seed)
        try:
            made: Any = make()
        except TypeError as error:
            raise TypeError(f"make() does not return a model and its guide for seed {seed}: {error}") from error
        if not (isinstance(made, tuple | list) and len(made) == 2):
            raise TypeError(f"make must return a model and its guide, but returned {described(made)}")
        model, guide = made
        with _of_seed(seed):
            check_model_and_guide(model, guide)
            if guide.latents is not None or guide.listeners:
                raise ValueError(
                    "fit_ensemble is for noise alone, but the guide has other latent sites, or its gradients are "
                    "listened to: fit one by one"
                )
            check_dtypes(model, guide, "32-true")
        for parameter in (*model.parameters(), *guide.parameters()):
            if known.setdefault(id(parameter), seed) != seed:
                raise ValueError(
                    f"make must return a new model and guide at each call, but those for seed {seed} share parameters "
                    f"with those for seed {known[id(parameter)]}: make the network inside it"
                )
        pairs.append((model, guide))
    return pairs


def _check_settings(pairs: Sequence[tuple[NoisyNetwork, FlatGuide]]) -> None:
    settings = [(model.num_data, model.kl_weight, model.kl_weights) for model, _ in pairs]
    if any(each != settings[0] for each in settings):
        shown = [each[:2] for each in settings] if settings[0][2] == settings[1][2] else settings
        raise ValueError(f"replicas must have one num_data and one kl_weight, but got the pairs {shown}")


def _advise(seeds: Sequence[int], fits: Sequence["_Fit"]) -> None:
    """Warn once of the replicas that have little to show."""
    texts = {seed: text for seed, each in zip(seeds, fits, strict=True) if (text := each.advice.text())}
    if texts:
        seed, text = next(iter(texts.items()))
        warnings.warn(
            f"the fit has ended, but of {len(texts)} of {len(fits)} replicas ({', '.join(map(str, texts))}) there is "
            f"little to show, for instance of seed {seed}: {text}",
            FitWarning,
            stacklevel=3,
        )


@dataclass(frozen=True)
class _Fit:
    """What is kept for each replica on its own."""

    pruner: Pruner
    history: History
    listener: Callback
    advice: Advice
    watch: PosteriorWatch


def _run(trainer: ReplicaTrainer, fits: Sequence[_Fit], pruning: Continuous, source: Source, bar: Callback) -> None:
    """Run all epochs."""
    noisy_epochs, epochs = trainer.rates.noisy_epochs, trainer.rates.epochs
    for listener in (*(each.listener for each in fits), bar):
        listener.on_start(epochs, [])
    for epoch in range(1, epochs + 1):
        noisy = epoch <= noisy_epochs
        try:
            losses = trainer.noisy_epoch() if noisy else trainer.fine_tune_epoch()
        except FloatingPointError as error:
            raise FloatingPointError(f"{error}. Lower lr or posterior_lr") from None
        records = []
        for each, loss in zip(fits, losses, strict=True):
            if noisy:
                each.watch.note(epoch)
            if noisy and pruning.is_due(epoch, trainer.rates.kl_warmup_epochs):
                each.listener.on_pruning(epoch, each.pruner.remove_supported())
            records.append(each.history.record("noisy" if noisy else "fine-tune", loss, each.history.model.kl_weight))
            if epoch == noisy_epochs:
                each.pruner.restore_removed()
                each.watch.note_end(source)
            each.listener.on_epoch_end(records[-1])
        bar.on_epoch_end(_means(records))


def _means(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the means of the numbers that the progress bar shows."""
    shown = ("loss", "compression", "accuracy_validation", "rmse_validation", "log_likelihood_validation")
    return {name: statistics.fmean(record[name] for record in records) for name in shown if name in records[0]}
