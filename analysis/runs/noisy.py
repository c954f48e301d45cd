"""Runs with noise: structures removed while training, or afterwards."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import pyro_bmrs as bmrs
from analysis.data.sets import Split
from analysis.runs.best_epoch import BestEpoch
from analysis.runs.config import METHODS, NoisyRun, ToSize, WhileTraining
from analysis.runs.dense import accuracy
from analysis.runs.execution import LEVELS, Execution, run_lock, shared_training, work_folder
from analysis.runs.rank_correlation import spearman
from analysis.runs.recipes import criterion
from analysis.runs.reference import reference_compression, reference_kl_weights
from analysis.runs.results import evaluate, short_history
from pyro_bmrs.model.noise import noise_layers
from pyro_bmrs.structures.compact import structures_of, without_noise
from pyro_bmrs.structures.inputs import to_input
from pyro_bmrs.structures.points import Attachment

__all__ = ["execute_post_training", "execute_while_training"]

_OF_POSTERIORS = ("E[theta]", "SNR", "BMRS_")  # criteria that see nothing else, least of all weights


def execute_while_training(config: NoisyRun, execution: Execution, net: nn.Module, split: Split) -> dict[str, Any]:
    """Carry out a run that removes structures while training, or what is left of it, and return its results."""
    dense = copy.deepcopy(net).to(split.train[0].device)
    model, guide = _program(config, net, split.train[0])
    # Cutting while training is a matter of speed alone unless norms lose the weights of removed structures.
    shrink = config.method.startswith(_OF_POSTERIORS) and not execution.compile
    folder = work_folder(config, execution)
    best = BestEpoch({"model": model, "guide": guide}, config.best_of, folder)
    gradients: Any = None
    if config.method == "free_form":  # several processes each see the gradients of their own draws alone
        gradients = bmrs.TrainingGradients(guide) if execution.fabric is None else split.train
    result = _fit(config, execution, model, guide, split)(
        folder=folder,
        criterion=criterion(config, gradients),
        pruning=_while_training(config, shrink),
        epochs=config.epochs,
        fine_tune_epochs=config.fine_tune_epochs,
        callbacks=[best],
    )
    if not execution.is_first:
        return {}
    best.restore()
    return _results(dense, model, guide, result, split)


def _while_training(config: NoisyRun, shrink: bool) -> bmrs.Continuous | bmrs.ToSize:
    schedule = config.schedule
    if isinstance(schedule, ToSize):
        return bmrs.ToSize(schedule.budget)
    assert isinstance(schedule, WhileTraining), schedule
    return bmrs.Continuous(start=schedule.prune_from, stop=schedule.prune_until, shrink=shrink)


def execute_post_training(config: NoisyRun, execution: Execution, net: nn.Module, split: Split) -> dict[str, Any]:
    """Rank and remove after a training that all criteria share, in a folder that they share too."""
    dense = copy.deepcopy(net).to(split.train[0].device)
    model, guide = _program(config, net, split.train[0])
    fit = _fit(config, execution, model, guide, split)
    with run_lock(shared_training(config), execution) as shared_folder:
        trained = fit(folder=shared_folder, criterion=None, epochs=config.epochs, fine_tune_epochs=0)
    scores = _scores(model, guide, config, split)
    chosen, decision = scores[config.method], criterion(config, split.train)
    line = (chosen >= 0).double().mean().item() if decision.has_line else None
    levels = LEVELS if line is None else tuple(sorted({*LEVELS, line}))
    result = fit(
        folder=work_folder(config, execution),
        criterion=decision,
        pruning=bmrs.PostTraining(levels=tuple(level for level in levels if level > 0), stop=False),
        epochs=0,
        fine_tune_epochs=0,
        callbacks=[_TestAccuracy(model, guide, split.test)],
    )
    if not execution.is_first:
        return {}
    keys = ("level", "removed", "compression", "accuracy_validation", "accuracy_test")
    return {
        **_results(dense, model, guide, result, split),
        "seconds": trained.seconds + result.seconds,
        "history": short_history(trained.history),
        "curve": {key: [_rounded(record[key]) for record in result.history] for key in keys},
        "stop_level": None if line is None else _rounded(line),
        "rank_correlation": {"methods": list(scores), "spearman": _matrix(spearman(torch.stack([*scores.values()])))},
    }


def _program(
    config: NoisyRun, net: nn.Module, images: Tensor
) -> tuple[bmrs.NoisyNetwork, bmrs.TruncatedLogNormalGuide]:
    kl_weight: Any = config.kl_weight
    if isinstance(kl_weight, str):
        kl_weight = reference_kl_weights(net, len(images))
    elif config.kl_by_cost:
        masks = _left(net, config.kl_priced_at) if config.kl_priced_at else None
        kl_weight = bmrs.cost_kl_weights(net, to_input(images[:2]).cpu(), kl_weight, masks=masks)
    model = bmrs.NoisyNetwork(net, num_data=len(images), kl_weight=kl_weight)
    return model, bmrs.TruncatedLogNormalGuide(model)


def _left(net: nn.Module, widths: Sequence[int]) -> dict[str, Tensor]:
    """Return masks that leave so many structures of each noise layer."""
    layers = noise_layers(net)
    if len(widths) != len(layers):
        raise ValueError(f"kl_priced_at must have a number for each of the sites {list(layers)}, but is {widths}")
    return {site: torch.arange(layer.size) < width for (site, layer), width in zip(layers.items(), widths, strict=True)}


def _fit(
    config: NoisyRun, execution: Execution, model: bmrs.NoisyNetwork, guide: bmrs.TruncatedLogNormalGuide, split: Split
) -> Callable[..., bmrs.FitResult]:
    """Return a fit that lacks what one phase of a run has of its own."""
    return partial(
        bmrs.fit,
        model,
        guide,
        split.train,
        split.validation,
        batch_size=config.batch_size,
        lr=config.lr,
        posterior_lr=config.posterior_lr,
        kl_warmup_epochs=config.kl_warmup_epochs,
        decay=config.decay,
        granularity=config.granularity,
        device="auto" if execution.fabric is not None else split.train[0].device,
        fabric=execution.fabric,
        compile=execution.compile,
        seed=config.seed,
        progress=False,
        checkpoint_every=execution.checkpoint_every,
        resume=True,
    )


def _results(
    dense: nn.Module,
    model: bmrs.NoisyNetwork,
    guide: bmrs.TruncatedLogNormalGuide,
    result: bmrs.FitResult,
    split: Split,
) -> dict[str, Any]:
    pruned = bmrs.compact(model, guide, None, to_input(split.validation[0][:8]))
    measured = evaluate(without_noise(dense), model, guide, pruned, result.masks, split)
    return {
        **measured,
        "compression_reference": _rounded(_as_the_paper_counts(dense, measured, result.masks)),
        "seconds": result.seconds,
        "history": short_history(result.history),
    }


def _as_the_paper_counts(dense: nn.Module, measured: dict[str, Any], masks: dict[str, Tensor]) -> float:
    if not isinstance(dense, Attachment):
        return reference_compression(dense, measured["kept"])
    return 1 - bmrs.count_parameters(dense, dense.structures, masks, rows_only=True) / measured["params_dense"]


def _rounded(value: float) -> float:
    return round(value, 5)


class _TestAccuracy(bmrs.Callback):
    """Adds the test accuracy to the record of each level, for the curves to show; nothing is decided by it."""

    def __init__(
        self, model: bmrs.NoisyNetwork, guide: bmrs.TruncatedLogNormalGuide, test: tuple[Tensor, Tensor]
    ) -> None:
        self.model, self.guide, self.test = model, guide, test

    def on_epoch_end(self, record: dict[str, Any]) -> None:
        x, y = self.test
        record["accuracy_test"] = accuracy(bmrs.predict(self.model, self.guide, x), y)


def _scores(
    model: bmrs.NoisyNetwork, guide: bmrs.TruncatedLogNormalGuide, config: NoisyRun, split: Split
) -> dict[str, Tensor]:
    """Return the scores that every method gives the same trained network, flat over all sites."""
    x, y = to_input(split.train[0][: config.batch_size]), split.train[1][: config.batch_size]
    context = bmrs.PruningContext(model.eval(), guide, structures_of(model.net, x[:2]), x, y)
    scores = {}
    for method in dict.fromkeys((*METHODS[1:], config.method)):
        each = criterion(replace(config, method=method), split.train)
        scores[method] = torch.cat([score.detach() for score in each.scores(context).values()])
    return scores


def _matrix(values: Tensor) -> list[list[float]]:
    return [[_rounded(value) for value in row] for row in values.tolist()]
