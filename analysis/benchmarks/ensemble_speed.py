"""How much faster many seeds are at once than one by one: python -m analysis.benchmarks.ensemble_speed."""

import functools
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from torch import Tensor

import pyro_bmrs as bmrs
from analysis.common.command import command
from models import lenet5, mlp
from pyro_bmrs.io.files import write_json
from pyro_bmrs.svi.devices import resolve_device

__all__ = ["EnsembleSpeed", "format_table", "main"]

_SETTINGS: dict[str, Any] = {"fine_tune_epochs": 1, "kl_warmup_epochs": 1, "progress": False}


@dataclass(frozen=True)
class EnsembleSpeed:
    """Time whole fits of all seeds, at once by fit_ensemble and one by one by fit, in interleaved rounds."""

    networks: tuple[Literal["mlp", "lenet5"], ...] = ("mlp",)
    """A tanh MLP of 8 layers of 100, or LeNet-5 for one channel; 32x32 images."""
    batch_sizes: tuple[int, ...] = (32, 128)
    seeds: int = 10
    epochs: int = 2
    """With noise; one without follows."""
    examples: int = 4096
    rounds: int = 3
    device: str = "auto"
    threads: int = 1
    """Of the CPU."""
    output: Path = Path("analysis/results/ensemble_speed")
    """Folder of ensemble_speed.json and ensemble_speed.md, which are replaced."""


def main(config: EnsembleSpeed) -> dict[str, Any]:
    """Measure, print the table, write it and all figures to the output folder, and return the figures."""
    torch.set_num_threads(config.threads)
    device = resolve_device(config.device)
    results = []
    for network in config.networks:
        for batch_size in config.batch_sizes:
            print(f"{network}, {config.seeds} seeds, batches of {batch_size} ...", flush=True)
            seconds = _time(_works(config, network, batch_size, device), config.rounds, device)
            ratios = [
                alone / together for together, alone in zip(seconds["at once"], seconds["one by one"], strict=True)
            ]
            results.append({"network": network, "batch_size": batch_size, "seconds": seconds, "ratios": ratios})
    name = (
        torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()}, {os.cpu_count()} cores"
    )
    report = {
        "command": command("benchmarks.ensemble_speed"),
        "config": {**asdict(config), "output": str(config.output)},
        "device": f"{device.type}: {name}",
        "torch": torch.__version__,
        "results": results,
    }
    report = json.loads(json.dumps(report))  # as whoever reads the file will see it
    config.output.mkdir(parents=True, exist_ok=True)
    write_json(config.output / "ensemble_speed.json", report)
    table = format_table(report)
    (config.output / "ensemble_speed.md").write_text(table + "\n", encoding="utf-8")
    print(f"\n{table}\n\nwritten to {config.output}")
    return report


def _works(
    config: EnsembleSpeed, network: str, batch_size: int, device: torch.device
) -> dict[str, Callable[[], object]]:
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(config.examples, 1, 32, 32, generator=generator).to(device)
    y = torch.randint(10, (config.examples,), generator=generator).to(device)
    make = functools.partial(_make, network)
    settings = {**_SETTINGS, "epochs": config.epochs, "batch_size": batch_size, "device": config.device}
    return {
        "at once": lambda: bmrs.fit_ensemble(make, (x, y), seeds=range(config.seeds), **settings),
        "one by one": lambda: [_fit(make, (x, y), seed, settings) for seed in range(config.seeds)],
    }


def _make(network: str) -> tuple[bmrs.NoisyNetwork, bmrs.FlatGuide]:
    model = bmrs.NoisyNetwork(mlp(in_features=1024) if network == "mlp" else lenet5())
    return model, bmrs.TruncatedLogNormalGuide(model)


def _fit(
    make: Callable[[], tuple[bmrs.NoisyNetwork, bmrs.FlatGuide]],
    train: tuple[Tensor, Tensor],
    seed: int,
    settings: dict[str, Any],
) -> bmrs.FitResult:
    torch.manual_seed(seed)
    return bmrs.fit(*make(), train, seed=seed, **settings)


def _time(works: dict[str, Callable[[], object]], rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Return the seconds of each work in each round, after one to warm up."""
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for i in range(1 + rounds):
        for name, work in works.items():
            start = time.perf_counter()
            work()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if i:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def format_table(report: dict[str, Any]) -> str:
    """Return the medians as a Markdown table."""
    config = report["config"]
    lines = [
        f"{config['seeds']} seeds, {config['examples']} images, {config['epochs'] + 1} epochs, {config['threads']} "
        f"thread(s), {report['device']}, torch {report['torch']}; medians of {config['rounds']} rounds",
        "",
        "| network | batch | at once, s | one by one, s | times faster (lowest to highest) |",
        "|---|---|---|---|---|",
    ]
    for result in report["results"]:
        together, alone = (statistics.median(result["seconds"][name]) for name in ("at once", "one by one"))
        ratios = result["ratios"]
        lines.append(
            f"| {result['network']} | {result['batch_size']} | {together:.2f} | {alone:.2f} | "
            f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}) |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    try:
        main(tyro.cli(EnsembleSpeed))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
