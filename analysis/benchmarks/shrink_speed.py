"""The time that shrinking while training saves: python -m analysis.benchmarks.shrink_speed --data-dir FOLDER."""

import os
import platform
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro

import pyro_bmrs as bmrs
from analysis.common.command import command
from analysis.data.sets import load
from models import lenet5
from pyro_bmrs.io.files import write_json

__all__ = ["ShrinkSpeed", "main"]


@dataclass(frozen=True)
class ShrinkSpeed:
    """Fit LeNet-5 twice with the same settings, once masking what is removed and once cutting it out."""

    dataset: str = "cifar10"
    data_dir: Path | None = None
    """Folder of the data set; by default the environment variable BMRS_DATA, or a download."""
    images: int | None = None
    """Of the training set, the first so many; by default all."""
    kl_weight: float = 15.0
    epochs: int = 12
    fine_tune_epochs: int = 6
    batch_size: int = 64
    lr: float = 1e-3
    seed: int = 0
    threads: int = 1
    device: str = "auto"
    output: Path = Path("analysis/results/shrink_speed.json")


def main(config: ShrinkSpeed) -> dict[str, Any]:
    """Fit, print the table, write it, and return it."""
    torch.set_num_threads(config.threads)
    split = load(config.dataset, config.data_dir, size=32)
    train = tuple(part[: config.images] for part in split.train)
    runs = {name: _run(config, train, split.validation, name == "shrinking") for name in ("masking", "shrinking")}
    seconds = {name: sum(run["seconds"]) for name, run in runs.items()}
    report = {
        "command": command("benchmarks.shrink_speed"),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {config.threads} threads, torch {torch.__version__}",
        "images": len(train[0]),
        "runs": runs,
        "saved": 1 - seconds["shrinking"] / seconds["masking"],
    }
    config.output.parent.mkdir(parents=True, exist_ok=True)
    write_json(config.output, report)
    print(f"{'epoch':>5}{'parameters':>12}{'masking s':>12}{'parameters':>12}{'shrinking s':>12}")
    masking, shrinking = runs["masking"], runs["shrinking"]
    for i in range(len(masking["seconds"])):
        row = [f"{run['parameters'][i]:>12,}{run['seconds'][i]:>12.1f}" for run in (masking, shrinking)]
        print(f"{i + 1:>5}{row[0]}{row[1]}")
    for name, run in runs.items():
        print(f"{name}: {seconds[name]:.0f} s, {100 * run['accuracy_validation']:.2f} % on the validation set")
    print(f"time saved: {100 * report['saved']:.0f} %")
    return report


def _run(config: ShrinkSpeed, train: Any, validation: Any, shrink: bool) -> dict[str, Any]:
    torch.manual_seed(config.seed)
    model = bmrs.NoisyNetwork(lenet5(train[0].shape[1]), num_data=len(train[0]), kl_weight=config.kl_weight)
    result = bmrs.fit(
        model,
        bmrs.TruncatedLogNormalGuide(model),
        train,
        validation,
        pruning=bmrs.Continuous(shrink=shrink),
        epochs=config.epochs,
        fine_tune_epochs=config.fine_tune_epochs,
        batch_size=config.batch_size,
        lr=config.lr,
        device=config.device,
        seed=config.seed,
    )
    return {
        "seconds": [entry["seconds"] for entry in result.history],
        "parameters": [entry["parameters"] for entry in result.history],
        "accuracy_validation": result.history[-1]["accuracy_validation"],
    }


if __name__ == "__main__":
    try:
        main(tyro.cli(ShrinkSpeed))
    except (ValueError, OSError, FloatingPointError) as error:
        sys.exit(f"error: {error}")
