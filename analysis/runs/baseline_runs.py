"""Baselines as runs of the study: which there are beside our runs, and how one is carried out."""

import statistics
import time
from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

from analysis.data.sets import Split
from analysis.runs.baselines import Importance, narrowed, train_baseline, train_from_scratch
from analysis.runs.config import (
    BASELINES,
    NoisyRun,
    Pretrained,
    Ranking,
    RunConfig,
    ScratchRun,
    TorchPruningRun,
    WhileTraining,
    read_config,
)
from analysis.runs.recipes import make_config
from analysis.runs.results import compare, short_history
from analysis.runs.store import RunResult
from pyro_bmrs.model.noise import noise_layers
from pyro_bmrs.structures.compact import without_noise

__all__ = ["baselines_beside", "execute_baseline"]

_IMPORTANCES: dict[str, Importance] = {
    "tp_magnitude": "magnitude",
    "tp_taylor": "taylor",
    "tp_group_norm": "group_norm",
}

Cell = tuple[str, str, float | str]  # data set, network and the KL's weight


def baselines_beside(
    results: Iterable[RunResult],
    datasets: Sequence[str],
    networks: Sequence[str],
    methods: Sequence[str],
    seeds: Sequence[int],
    kl_weights: Sequence[float],
    ranking: Ranking,
    **settings: Any,
) -> list[RunConfig]:
    """Return the runs of baselines at the sizes that BMRS_N has reached by our recipe, seed by seed.

    The budget is the mean compression over the seeds; the widths, of ``"scratch"``, are those of the same seed's run.

    Args:
        results: Of any runs.
        datasets: Which to take.
        networks: Which to take.
        methods: Of ``BASELINES``, or of ``METHODS`` and ``OTHERS``, which then prune to that size.
        seeds: Of the baselines. Where one of them is not among our runs, those of its data set, network and weight of
            the KL do not count.
        kl_weights: Of our runs; none for all that there are.
        ranking: Of torch-pruning.
        settings: Of our runs and of the baselines, other than the recipe's; arguments of ``make_config``.

    Raises:
        ValueError: If none of our runs count.
    """
    cells: dict[Cell, dict[int, RunResult]] = {}
    for result in results:
        config = read_config(result["config"])
        if not (isinstance(config, NoisyRun) and isinstance(config.schedule, WhileTraining)):
            continue
        if (config.recipe, config.method) != ("ours", "BMRS_N"):
            continue
        if config.dataset not in datasets or config.network not in networks or config.seed not in seeds:
            continue
        weight = config.kl_weight
        if kl_weights and weight not in kl_weights:
            continue
        cell = config.dataset, config.network, weight
        if config == make_config(*cell[:2], "BMRS_N", "ours", config.seed, **settings, kl_weight=weight):
            cells.setdefault(cell, {})[config.seed] = result
    complete = {cell: runs for cell, runs in sorted(cells.items(), key=str) if set(seeds) <= set(runs)}
    if not complete:
        asked = " ".join(map(str, seeds))
        raise ValueError(
            "baselines prune to the size that BMRS_N reaches by our recipe, but there are no such results of all seeds "
            f"{asked} with these settings: first run python -m analysis.study --grid table1 --recipe ours "
            f"--methods BMRS_N --seeds {asked}"
        )
    found = []
    for seed in seeds:
        for method in methods:
            for (dataset, network, weight), runs in complete.items():
                budget = round(statistics.fmean(runs[each]["compression"] for each in seeds), 4)
                recipe, own = "baselines", dict[str, Any](ranking=ranking)
                if method == "scratch":
                    own = {"widths": tuple(runs[seed]["kept"].values())}
                if method not in BASELINES:  # in a fit like that of BMRS_N
                    own, recipe = {"pruning": "to-size", "kl_weight": weight}, "ours"
                changes = {**settings, **own}
                found.append(make_config(dataset, network, method, recipe, seed, budget=budget, **changes))
    return list(dict.fromkeys(found))


def execute_baseline(config: TorchPruningRun | ScratchRun, net: nn.Module, split: Split) -> dict[str, Any]:
    """Carry out a run of a baseline, which has no checkpoints, and return its results.

    Args:
        config: Of the run.
        net: The dense network at its initial weights, on the CPU.
        split: Data, on the device to train on.
    """
    device, started = split.train[0].device, time.perf_counter()
    before = config.net.pretrain_epochs if isinstance(config, ScratchRun) and isinstance(config.net, Pretrained) else 0
    settings = (config.epochs + before, config.batch_size, config.lr, config.seed)
    if isinstance(config, ScratchRun):
        kept = dict(zip((site.removesuffix(".theta") for site in noise_layers(net)), config.widths, strict=True))
        small = narrowed(net, kept, split.train[0][:2].cpu())
        baseline = train_from_scratch(small.to(device), split.train, *settings)
        net.to(device)
    else:
        importance = _IMPORTANCES[config.method]
        baseline = train_baseline(
            net.to(device), split.train, importance, config.budget, *settings, ranking=config.ranking
        )
    seconds = time.perf_counter() - started
    results = compare(without_noise(net), baseline, split)
    return {**results, "seconds": seconds, "history": short_history([results])}
