"""Whether the defaults of a fit get where the evidence is, at any size of data: python -m analysis.defaults.

Each data set is fitted with nothing set, and with a grid of settings made by hand. The best of these is the one that
predicts validation data best; what is shown is of test data.
"""

import json
import math
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, Literal, get_args

import pyro.distributions as dist
import sklearn.datasets
import torch
import tyro
from torch import Tensor, nn

import pyro_bmrs as bmrs
from analysis.data.sets import digits, load
from pyro_bmrs.io.files import write_json
from pyro_bmrs.svi.evaluation import evaluate

__all__ = ["Defaults", "load_problem", "main"]

Name = Literal[
    "wine", "diabetes", "breast_cancer", "digits", "synthetic_200", "synthetic_10000", "synthetic_1000000", "mnist"
]


@dataclass(frozen=True)
class Defaults:
    """Fit a ReLU network of two hidden layers to each data set, with the defaults and by hand."""

    data: tuple[Name, ...] = get_args(Name)
    seeds: tuple[int, ...] = (0, 1, 2)
    by_hand: bool = True
    """Whether to try the grid of settings as well."""
    data_dir: Path | None = None
    """Folder with mnist/; without it that data set is left out."""
    output: Path = Path("analysis/results/defaults.json")


@dataclass(frozen=True)
class Problem:
    """Three parts of one data set, standardised, and how many outputs a network needs."""

    train: tuple[Tensor, Tensor]
    validation: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    outputs: int
    likelihood: Callable[[Any], Any] | None = None


def main(config: Defaults) -> dict[str, Any]:
    """Run what is not in the output file yet; print and return all."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", bmrs.FitWarning)
    results: dict[str, Any] = json.loads(config.output.read_text()) if config.output.exists() else {}
    for name in config.data:
        if name == "mnist" and config.data_dir is None:
            continue
        problem = load_problem(name, config.data_dir)
        grid = {str(setting): setting for setting in _grid(len(problem.train[0]))} if config.by_hand else {}
        entry = results.setdefault(name, {"examples": len(problem.train[0]), "runs": {}})
        for key, setting in {"defaults": {}, **grid}.items():
            if key not in entry["runs"]:
                entry["runs"][key] = _runs(problem, setting, config.seeds if key == "defaults" else config.seeds[:1])
                write_json(config.output, results)
        if grid and "by hand" not in entry["runs"]:
            best = max(grid, key=lambda key: entry["runs"][key]["validation"])
            entry["runs"]["by hand"] = {**_runs(problem, grid[best], config.seeds), "setting": best}
            write_json(config.output, results)
        for key in ("defaults", "by hand"):
            if key in entry["runs"]:
                print(name, entry["examples"], key, entry["runs"][key], flush=True)
    return results


def _grid(examples: int) -> list[dict[str, Any]]:
    """Return settings that a user would try: how many steps, how fast, in which batches."""
    sizes: tuple[int, ...]
    steps: tuple[int, ...]
    if examples > 100_000:
        sizes, steps = (128, 512), (9_000,)
    else:
        sizes, steps = (32, 128), (1_000, 3_000, 9_000)
    settings: list[dict[str, Any]] = []
    for batch_size, number, posterior_lr in product(sizes, steps, (0.03, 0.1, 0.3)):
        epochs = max(round(number * batch_size / examples), 2)
        settings.append(
            {"epochs": epochs, "fine_tune_epochs": max(epochs // 3, 1), "batch_size": min(batch_size, examples),
             "posterior_lr": posterior_lr}
        )  # fmt: skip
    return settings


def _runs(problem: Problem, setting: dict[str, Any], seeds: tuple[int, ...]) -> dict[str, Any]:
    """Return the medians over seeds of the figures of fits."""
    found = [_run(problem, setting, seed) for seed in seeds]
    return {key: round(statistics.median(run[key] for run in found), 4) for key in found[0]}


def _run(problem: Problem, setting: dict[str, Any], seed: int) -> dict[str, float]:
    torch.manual_seed(seed)
    width = problem.train[0][0].numel()
    net = nn.Sequential(
        nn.Flatten(),
        nn.Linear(width, 64), nn.ReLU(), bmrs.MultiplicativeNoise(64),
        nn.Linear(64, 64), nn.ReLU(), bmrs.MultiplicativeNoise(64),
        nn.Linear(64, problem.outputs),
    )  # fmt: skip
    model = bmrs.NoisyNetwork(net, likelihood=problem.likelihood)
    guide = bmrs.TruncatedLogNormalGuide(model)
    started = time.perf_counter()
    result = bmrs.fit(
        model, guide, problem.train, problem.validation, seed=seed, device="cpu", progress=False, **setting
    )
    seconds = time.perf_counter() - started
    found = evaluate(lambda x: bmrs.predict(model, guide, x), model.likelihood, [problem.test])
    error = found.squared_error
    return {
        "removed": 100 * result.compression,
        "structures": result.history[-1]["structures"],
        "validation": result.history[-1]["log_likelihood_validation"],
        "log_likelihood": float(found.log_likelihood.mean()),
        "quality": (100 * float(found.accuracy or 0)) if error is None else math.sqrt(float(error.mean())),
        "epochs": len(result.history),
        "seconds": seconds,
    }


def load_problem(name: Name, data_dir: Path | None) -> Problem:
    """Return a data set, standardised and divided."""
    if name == "digits":
        split = digits()
        return Problem(split.train, split.validation, split.test, 10)
    if name == "mnist":
        split = load("mnist", data_dir)
        return Problem(split.train, split.validation, split.test, 10)
    if name.startswith("synthetic"):
        x, y = _synthetic(int(name.split("_")[1]))
    else:
        x, y = (torch.as_tensor(each) for each in getattr(sklearn.datasets, f"load_{name}")(return_X_y=True))
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    x, y = x[order].float(), y[order]
    held_out = min(len(x) // 5, 20_000)
    training = slice(2 * held_out, None)
    x = (x - x[training].mean(0)) / x[training].std(0).clamp(min=1e-6)
    regression = name == "diabetes"
    y = ((y - y[training].mean()) / y[training].std()).float() if regression else y.long()
    train, validation, test = (
        (x[part], y[part]) for part in (training, slice(held_out), slice(held_out, 2 * held_out))
    )
    if regression:
        return Problem(train, validation, test, 1, _normal)
    return Problem(train, validation, test, int(y.max()) + 1)


def _normal(output: Tensor) -> dist.TorchDistribution:
    return dist.Normal(output.squeeze(-1), 0.7)


def _synthetic(size: int) -> tuple[Tensor, Tensor]:
    """Return inputs of 20 features, two of which say the class by their product, with a tenth of the labels wrong."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(size * 5 // 3 if size < 100_000 else size + 40_000, 20, generator=generator)
    y = (x[:, 0] * x[:, 1] > 0).long()
    wrong = torch.rand(len(y), generator=generator) < 0.1
    return x, torch.where(wrong, 1 - y, y)


if __name__ == "__main__":
    main(tyro.cli(Defaults))
