"""The same network under several priors on its noise: python -m analysis.compare_priors [--kl-weights 1 3 10]."""

import json
import os
import platform
import statistics
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import torch
import tyro
from pyro.distributions import Beta, Gamma, TorchDistribution

import pyro_bmrs as bmrs
from analysis.data import Split, digits
from analysis.examples.your_own import GammaGuide
from models import mlp
from pyro_bmrs.io.files import write_json

__all__ = ["PRIORS", "ComparePriors", "format_table", "main"]

Guide = Callable[[bmrs.NoisyNetwork], bmrs.FlatGuide]

PRIORS: dict[str, tuple[TorchDistribution, Guide]] = {
    "log-uniform, up to 1": (bmrs.LogUniform(-20.0, 0.0), bmrs.TruncatedLogNormalGuide),
    "log-uniform, up to e": (bmrs.LogUniform(-20.0, 1.0), bmrs.TruncatedLogNormalGuide),
    "log-uniform, up to e^2": (bmrs.LogUniform(-20.0, 2.0), bmrs.TruncatedLogNormalGuide),
    "truncated log-normal, -10 and 10, up to 1": (
        bmrs.TruncatedLogNormal(-10.0, 10.0, -20.0, 0.0),
        bmrs.TruncatedLogNormalGuide,
    ),
    "Beta(0.2, 0.2)": (Beta(0.2, 0.2), bmrs.BetaGuide),
    "Gamma(0.2, 0.2)": (Gamma(0.2, 0.2), GammaGuide),
}


@dataclass(frozen=True)
class ComparePriors:
    """Fit an MLP to the digits under each prior and weight of the KL, and judge it on validation data."""

    kl_weights: tuple[float, ...] = (1.0, 3.0, 10.0)
    seeds: tuple[int, ...] = (0, 1, 2)
    """Fitted at once."""
    epochs: int = 60
    """With noise; a third as many follow without."""
    draws: int = 100
    """Of the noise, for what is averaged over it."""
    threads: int = 1
    output: Path = Path("analysis/results/compare_priors")
    """Folder of priors.json, priors.md and priors.png, which are replaced."""


def main(config: ComparePriors) -> dict[str, Any]:
    """Fit all, print and write table and picture, and return the figures."""
    torch.set_num_threads(config.threads)
    split = digits()
    rows = []
    for name, (prior, guide) in PRIORS.items():
        for kl_weight in config.kl_weights:
            print(f"{name}, kl_weight {kl_weight:g} ...", flush=True)
            rows.append({"prior": name, "kl_weight": kl_weight, **_judged(config, prior, guide, kl_weight, split)})
    report = {
        "command": f"python -m analysis.compare_priors {' '.join(sys.argv[1:])}".strip(),
        "config": {**asdict(config), "output": str(config.output)},
        "device": f"cpu: {platform.machine()}, {os.cpu_count()} cores",
        "torch": torch.__version__,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "rows": rows,
    }
    report = json.loads(json.dumps(report))  # as whoever reads the file will see it
    config.output.mkdir(parents=True, exist_ok=True)
    write_json(config.output / "priors.json", report)
    table = format_table(report)
    (config.output / "priors.md").write_text(table + "\n", encoding="utf-8")
    _draw(report, config.output / "priors.png")
    print(f"\n{table}\n\nwritten to {config.output}")
    return report


def _judged(
    config: ComparePriors, prior: TorchDistribution, guide: Guide, kl_weight: float, split: Split
) -> dict[str, list[float]]:
    """Return the scores of each seed, by name."""

    def make() -> tuple[bmrs.NoisyNetwork, bmrs.FlatGuide]:
        net = mlp(1024, hidden=100, layers=2)
        for name, module in list(net.named_modules()):
            if isinstance(module, bmrs.MultiplicativeNoise):
                net.set_submodule(name, bmrs.MultiplicativeNoise(module.size, prior))
        model = bmrs.NoisyNetwork(net, kl_weight=kl_weight)
        return model, guide(model)

    replicas = bmrs.fit_ensemble(
        make, split.train, seeds=config.seeds, epochs=config.epochs, fine_tune_epochs=config.epochs // 3,
        batch_size=64, lr=2e-3, posterior_lr=0.1, device="cpu", progress=False,
    )  # fmt: skip
    found: dict[str, list[float]] = {}
    for replica in replicas:
        scores = bmrs.evaluate(replica.model, replica.guide, split.validation, draws=config.draws)
        values = {
            "removed": replica.result.compression,
            "accuracy": scores.at_mean.accuracy,
            "log_likelihood": scores.at_mean.log_likelihood,
            "log_likelihood_over_draws": scores.over_draws.log_likelihood,
            "ece": scores.at_mean.ece,
            "brier": scores.at_mean.brier,
        }
        for key, value in values.items():
            found.setdefault(key, []).append(float(value or 0.0))
    return found


def format_table(report: dict[str, Any]) -> str:
    """Return the means over seeds, with the spread of the first two, as a Markdown table."""
    config = report["config"]
    lines = [
        f"digits, MLP of two layers of 100, {config['epochs']} + {config['epochs'] // 3} epochs, validation data, "
        f"means of {len(config['seeds'])} seeds ± standard deviation; {report['device']}, torch {report['torch']}",
        "",
        "| prior | kl_weight | removed % | accuracy % | log likelihood | over draws | ECE % | Brier |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in report["rows"]:
        removed, accuracy = (_spread([100 * each for each in row[key]]) for key in ("removed", "accuracy"))
        mean = {key: statistics.fmean(values) for key, values in row.items() if isinstance(values, list)}
        lines.append(
            f"| {row['prior']} | {row['kl_weight']:g} | {removed} | {accuracy} | {mean['log_likelihood']:.4f} | "
            f"{mean['log_likelihood_over_draws']:.4f} | {100 * mean['ece']:.2f} | {mean['brier']:.4f} |"
        )
    return "\n".join(lines)


def _spread(values: list[float]) -> str:
    return f"{statistics.fmean(values):.1f} ± {statistics.stdev(values) if len(values) > 1 else 0.0:.1f}"


def _draw(report: dict[str, Any], path: Path) -> None:
    """Draw error and negative log likelihood against size: a line per prior along the weight of the KL."""
    mpl.use("Agg")
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    for name in dict.fromkeys(row["prior"] for row in report["rows"]):
        rows = [row for row in report["rows"] if row["prior"] == name]
        left = [100 * (1 - statistics.fmean(row["removed"])) for row in rows]
        errors = [100 * (1 - statistics.fmean(row["accuracy"])) for row in rows]
        for ax, values in ((axes[0], errors), (axes[1], [-statistics.fmean(row["log_likelihood"]) for row in rows])):
            ax.plot(left, values, marker="o", label=name)
    for ax, label in zip(axes, ("validation error (%)", "negative log likelihood (nats per example)"), strict=True):
        ax.set_xscale("log")
        ax.set_yscale("log")
        ax.invert_xaxis()
        ax.set_xlabel("parameters left (%, log scale)")
        ax.set_ylabel(label)
    axes[1].legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)
    plt.close(figure)


if __name__ == "__main__":
    try:
        main(tyro.cli(ComparePriors))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
