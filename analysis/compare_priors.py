"""The same network under several priors on its noise: python -m analysis.compare_priors [--data mnist]."""

import json
import os
import platform
import re
import statistics
import sys
import warnings
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import torch
import tyro

import pyro_bmrs as bmrs
from analysis.common.command import command
from analysis.comparisons.priors import PRIORS, Noise
from analysis.data.sets import Split, digits, load
from analysis.drawing.prior_figures import draw_figures
from models import mlp
from pyro_bmrs.io.files import write_json

__all__ = ["ComparePriors", "format_table", "main"]


@dataclass(frozen=True)
class _Task:
    """A network, and how it is trained."""

    layers: int
    epochs: int
    batch_size: int
    lr: float
    posterior_lr: float


_TASKS = {"digits": _Task(2, 60, 64, 2e-3, 0.1), "mnist": _Task(8, 20, 128, 8.5e-4, 50 * 8.5e-4)}
_LOOKED_AT = 2000  # training examples, at most, by which ArviZ compares the priors


@dataclass(frozen=True)
class ComparePriors:
    """Fit an MLP under each prior and weight of the KL, and judge it on validation data.

    What has been fitted with the same settings before is read from the folder, so an interrupted run goes on.
    """

    data: Literal["digits", "mnist"] = "digits"
    data_dir: Path | None = None
    """Folder of data sets; by default BMRS_DATA, or else the hub."""
    priors: tuple[str, ...] = tuple(PRIORS)
    kl_weights: tuple[float, ...] = (1.0, 3.0, 10.0, 30.0)
    """At the first of these ArviZ compares the priors."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Fitted at once."""
    epochs: int | None = None
    """With noise, by default 60 (digits) or 20 (MNIST); a third or half as many follow without."""
    draws: int = 100
    """Of the noise, for what is averaged over it."""
    threads: int = 1
    output: Path | None = None
    """Folder of priors.json, priors.md and the figures; by default analysis/results/compare_priors/<data>."""


def main(config: ComparePriors) -> dict[str, Any]:
    """Fit all, print and write table and pictures, and return the figures."""
    torch.set_num_threads(config.threads)
    for name in config.priors:
        if name not in PRIORS:
            raise ValueError(f"there is no prior {name!r}; there are {', '.join(PRIORS)}")
    output = config.output or Path("analysis/results/compare_priors") / config.data
    output.mkdir(parents=True, exist_ok=True)
    report = _begun(config, output)
    split = digits() if config.data == "digits" else load(config.data, config.data_dir, size=32)
    for name in config.priors:
        for kl_weight in config.kl_weights:
            if any((row["prior"], row["kl_weight"]) == (name, kl_weight) for row in report["rows"]):
                continue
            print(f"{name}, kl_weight {kl_weight:g} ...", flush=True)
            replicas = _fitted(report["config"], PRIORS[name], kl_weight, split)
            row = {"prior": name, "kl_weight": kl_weight, **_judged(replicas, split, config.draws)}
            report["rows"].append(json.loads(json.dumps(row)))
            if kl_weight == config.kl_weights[0]:
                _keep_posterior(replicas[0], split, config.draws, _posterior_file(output, name))
            write_json(output / "priors.json", report)
    known = list(PRIORS)
    report["rows"].sort(key=lambda row: (known.index(row["prior"]), row["kl_weight"]))
    write_json(output / "priors.json", report)
    table = format_table(report)
    (output / "priors.md").write_text(table + "\n", encoding="utf-8")
    draw_figures(report, {name: _posterior_file(output, name) for name in config.priors}, output)
    print(f"\n{table}\n\nwritten to {output}")
    return report


def _begun(config: ComparePriors, output: Path) -> dict[str, Any]:
    """Return the report so far: what an earlier run with the same settings has left, or one without rows."""
    settings = {**asdict(_TASKS[config.data]), "data": config.data, "seeds": list(config.seeds), "draws": config.draws}
    settings["epochs"] = config.epochs or settings["epochs"]
    path, rows = output / "priors.json", []
    if path.exists():
        before = json.loads(path.read_text(encoding="utf-8"))
        if before.get("config") != settings:
            raise ValueError(
                f"{path} is of other settings, {before.get('config')}: delete it, or choose another --output"
            )
        rows = before["rows"]
    return {
        "command": command("compare_priors"),
        "config": settings,
        "device": f"cpu: {platform.machine()}, {os.cpu_count()} cores, {config.threads} threads used",
        "torch": torch.__version__,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "rows": rows,
    }


def _fitted(settings: dict[str, Any], noise: Noise, kl_weight: float, split: Split) -> list[bmrs.EnsembleMember]:
    """Return the fits of all seeds: at once, but one by one where there is more than noise."""
    shared: dict[str, Any] = {
        **{name: settings[name] for name in ("epochs", "batch_size", "lr", "posterior_lr")},
        "fine_tune_epochs": _fine_tune_epochs(settings),
        "device": "cpu",
        "progress": False,
    }

    def make() -> tuple[bmrs.NoisyNetwork, bmrs.FlatGuide]:
        return noise.model(mlp(1024, hidden=100, layers=settings["layers"]), kl_weight)

    if not noise.layer_scales:
        return bmrs.fit_ensemble(make, split.train, seeds=settings["seeds"], **shared)
    replicas = []
    for seed in settings["seeds"]:
        torch.manual_seed(seed)
        model, guide = make()
        replicas.append(
            bmrs.EnsembleMember(seed, model, guide, bmrs.fit(model, guide, split.train, seed=seed, **shared))
        )
    return replicas


def _fine_tune_epochs(settings: dict[str, Any]) -> int:
    return int(settings["epochs"]) // (3 if settings["data"] == "digits" else 2)


def _judged(replicas: list[bmrs.EnsembleMember], split: Split, draws: int) -> dict[str, list[Any]]:
    """Return the scores of each seed, by name."""
    found: dict[str, list[Any]] = {}
    for replica in replicas:
        scores = bmrs.evaluate(replica.model, replica.guide, split.validation, draws=draws)
        curve = scores.at_mean.reliability
        assert curve is not None
        values = {
            "removed": replica.result.compression,
            "accuracy": scores.at_mean.accuracy,
            "log_likelihood": scores.at_mean.log_likelihood,
            "log_likelihood_over_draws": scores.over_draws.log_likelihood,
            "ece": scores.at_mean.ece,
            "brier": scores.at_mean.brier,
            "confidence": curve.confidence.nan_to_num(-1.0).tolist(),  # -1 in empty bins
            "right": curve.accuracy.nan_to_num(-1.0).tolist(),
        }
        for key, value in values.items():
            found.setdefault(key, []).append(value)
    return found


def _posterior_file(output: Path, prior: str) -> Path:
    return output / "posteriors" / f"{re.sub(r'[^a-z0-9]+', '_', prior.lower()).strip('_')}.nc"


def _keep_posterior(replica: bmrs.EnsembleMember, split: Split, draws: int, path: Path) -> None:
    """Write what ArviZ compares: draws of the posterior, and what they say of training examples."""
    x, y = split.train
    data = bmrs.to_arviz(replica.model, replica.guide, (x[:_LOOKED_AT], y[:_LOOKED_AT]), draws=draws)
    path.parent.mkdir(exist_ok=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of names of coordinates that are the same as a variable's
        data.to_netcdf(str(path), engine="h5netcdf")


def format_table(report: dict[str, Any]) -> str:
    """Return the means over seeds, with the spread of the first two, as a Markdown table."""
    config = report["config"]
    lines = [
        f"{config['data']}, MLP of {config['layers']} layers of 100, {config['epochs']} + {_fine_tune_epochs(config)} "
        f"epochs, validation data, means of {len(config['seeds'])} seeds ± standard deviation; {report['device']}, "
        f"torch {report['torch']}",
        "",
        "| prior | kl_weight | removed % | accuracy % | log likelihood | over draws | ECE % | Brier |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in report["rows"]:
        removed, accuracy = (_spread([100 * each for each in row[key]]) for key in ("removed", "accuracy"))
        keys = ("log_likelihood", "log_likelihood_over_draws", "ece", "brier")
        mean = {key: statistics.fmean(row[key]) for key in keys}
        lines.append(
            f"| {row['prior']} | {row['kl_weight']:g} | {removed} | {accuracy} | {mean['log_likelihood']:.4f} | "
            f"{mean['log_likelihood_over_draws']:.4f} | {100 * mean['ece']:.2f} | {mean['brier']:.4f} |"
        )
    return "\n".join(lines)


def _spread(values: list[float]) -> str:
    return f"{statistics.fmean(values):.1f} ± {statistics.stdev(values) if len(values) > 1 else 0.0:.1f}"


if __name__ == "__main__":
    try:
        main(tyro.cli(ComparePriors))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
