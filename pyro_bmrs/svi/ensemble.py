"""Fitting one model from many seeds at once: deep ensembles, and error bars, for less than the sum of their parts."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from typing import Any, Unpack

import torch
from torch import Tensor

from pyro_bmrs.checks import check_function, check_list, check_seed, described
from pyro_bmrs.model.guides.flat import FlatGuide
from pyro_bmrs.model.network import NoisyNetwork
from pyro_bmrs.randomness import local_seed
from pyro_bmrs.structures.inputs import first_examples, on_device
from pyro_bmrs.structures.refusal import removable_structures
from pyro_bmrs.svi.advice import Advice
from pyro_bmrs.svi.callbacks import Callback, Callbacks, ProgressBar
from pyro_bmrs.svi.data.in_memory import InMemory
from pyro_bmrs.svi.data.making import Data
from pyro_bmrs.svi.data.source import Source
from pyro_bmrs.svi.devices import check_dtypes, keep_freed_memory, make_fabric
from pyro_bmrs.svi.elbo import MeanFieldELBO
from pyro_bmrs.svi.isolation import isolated
from pyro_bmrs.svi.pruner import Pruner
from pyro_bmrs.svi.pruning import Pruning
from pyro_bmrs.svi.replicas import TrainedReplicas
from pyro_bmrs.svi.result import FitResult, FitWarning
from pyro_bmrs.svi.run import Member, Run
from pyro_bmrs.svi.settings import (
    FitSettings,
    check_callbacks,
    check_model_and_guide,
    checked_settings,
    counting_examples,
    prepare,
)
from pyro_bmrs.svi.training import Trainer
from pyro_bmrs.warn import warn

__all__ = ["EnsembleMember", "fit_ensemble"]

Make = Callable[[], tuple[NoisyNetwork, FlatGuide]]


@dataclass(frozen=True)
class EnsembleMember:
    """One of the fits of an ensemble.

    Attributes:
        seed: Its seed.
        model: Its model, fitted.
        guide: Its guide, fitted.
        result: What ``fit`` would have returned, but ``seconds``, there and in the history, are all replicas' together.

    Example:
        >>> def make():
        ...     net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), bmrs.MultiplicativeNoise(8), nn.Linear(8, 2))
        ...     model = bmrs.NoisyNetwork(net)
        ...     return model, bmrs.TruncatedLogNormalGuide(model)
        >>> data = torch.randn(20, 4), torch.arange(20) % 2
        >>> few = {"epochs": 2, "criterion": None, "progress": False}
        >>> [(each.seed, len(each.result.history)) for each in bmrs.fit_ensemble(make, data, seeds=(3, 5), **few)]
        [(3, 3), (5, 3)]
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
    callbacks: Callable[[int], Sequence[Callback]] | None = None,
    **settings: Unpack[FitSettings],
) -> list[EnsembleMember]:
    """Fit a model once for each seed, all at once: what small networks leave idle, their replicas use.

    Each replica is fitted as ``fit(*make(), train, validation, seed=seed, ...)`` would, ``make`` having been called
    under ``torch.manual_seed(seed)``: the same initial weights, order of the data, schedule and decisions, but other
    draws of the noise. One step trains all of them, by ``torch.func.vmap``.

    Args:
        make: Makes a model and its guide, all alike but for their numbers.
        train: As for ``fit``, but tensors: one of inputs, one of observations.
        validation: The same, to report on after every epoch.
        seeds: One for each replica.
        callbacks: From a seed to the callbacks of its replica.
        settings: See ``FitSettings``.

    Returns:
        One member per seed, in their order.

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
        >>> members = bmrs.fit_ensemble(make, data, seeds=range(3), epochs=2, batch_size=5, progress=False)
        >>> torch.stack([bmrs.predict(each.model, each.guide, x).softmax(-1) for each in members]).mean(0).shape
        torch.Size([20, 2])
    """
    chosen = checked_settings(fit_ensemble, settings)
    criterion, pruning = chosen["criterion"], chosen["pruning"]
    _check_pruning(pruning)
    seeds = _checked_seeds(seeds)
    check_function("make", make, "that returns a model and its guide")
    if callbacks is not None:
        check_function("callbacks", callbacks, "from a seed to a sequence of Callback")
    elbo, fabric = MeanFieldELBO(chosen["granularity"]), make_fabric(chosen["device"], "32-true")
    with isolated([]), local_seed(seeds[0], [fabric.device], validate=False), ExitStack() as open_now:
        pairs = _make_all(make, seeds)
        open_now.enter_context(isolated([each for pair in pairs for each in pair]))
        ready = prepare(pairs, train, validation, chosen)
        _tensors(ready.data)  # refused before anything moves
        first = ready.data.first
        listed = [[] if callbacks is None else check_callbacks(callbacks(seed)) for seed in seeds]
        model, guide = pairs[0]
        x, y = on_device(first[0], guide.device, model.net), first[1].to(guide.device)
        structures = removable_structures(model.net, first_examples(x, 2), None, chosen["unremovable"])  # alike in all
        Pruner(model, guide, criterion, (x, y), structures).check_criterion()
        for model, guide in pairs:
            open_now.enter_context(counting_examples(model, ready.data.size))
            model.to(fabric.device)
            guide.to(fabric.device)
        _check_alike(pairs)
        ready.place(fabric.device)
        keep_freed_memory(fabric.device)
        batch = on_device(first[0], fabric.device, pairs[0][0].net), first[1].to(fabric.device)
        models, guides = zip(*pairs, strict=True)
        trained = TrainedReplicas(fabric, models, guides, seeds, elbo, _tensors(ready.data), ready.data.batch_size)
        members, advice = [], {}
        for seed, (model, guide), own in zip(seeds, pairs, listed, strict=True):
            pruner = Pruner(model, guide, criterion, batch, structures)
            all_callbacks = open_now.enter_context(closing(Callbacks(own)))
            members.append(Member.of(pruner, ready.validation, ready.rates.noisy_epochs, all_callbacks))
            advice[seed] = Advice(members[-1].history, pruner, ready.rates, ready.data)
        run = Run(Trainer(trained, ready.rates), members, pruning, ready.plan, ready.data)
        bar = open_now.enter_context(closing(Callbacks([ProgressBar()] if chosen["progress"] else [])))
        try:
            run.go(summary=bar)
        finally:
            trained.stack.release()
        results = [each.end(run.seconds) for each in members]
        _advise(advice)
    return [
        EnsembleMember(seed, each.model, each.guide, result)
        for seed, each, result in zip(seeds, members, results, strict=True)
    ]


def _checked_seeds(seeds: Any) -> list[int]:
    given = check_list("seeds", seeds, "integers")
    checked = [check_seed("each of the seeds", seed) for seed in given]
    if not checked or len(set(checked)) < len(checked):
        raise ValueError(f"seeds must be one or more different integers, but got {checked}")
    return checked


def _check_pruning(pruning: Pruning) -> None:
    if not pruning.takes_several:
        raise TypeError(
            f"pruning must be Continuous() for an ensemble, but got {pruning!r}: replicas would stop at different "
            "levels, with different epochs; fit them one by one"
        )
    if pruning.shrinks:
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


def _check_alike(pairs: Sequence[tuple[NoisyNetwork, FlatGuide]]) -> None:
    settings = [(model.num_data, model.kl_weight, model.kl_weights) for model, _ in pairs]
    if any(each != settings[0] for each in settings):
        shown = [each[:2] for each in settings] if settings[0][2] == settings[1][2] else settings
        raise ValueError(f"replicas must have one num_data and one kl_weight, but got the pairs {shown}")


def _advise(advice: Mapping[int, Advice]) -> None:
    """Warn once of the replicas that have little to show."""
    texts = {seed: text for seed, each in advice.items() if (text := each.text())}
    if texts:
        seed, text = next(iter(texts.items()))
        warn(
            f"the fit has ended, but of {len(texts)} of {len(advice)} replicas ({', '.join(map(str, texts))}) there is "
            f"little to show, for instance of seed {seed}: {text}",
            FitWarning,
        )
