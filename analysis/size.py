"""Steering to a size against the same size by a fixed weight of the KL: python -m analysis.size."""

import json
import statistics
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import tyro

import pyro_bmrs as bmrs
from analysis.data.sets import digits
from analysis.runs.dense import accuracy, outputs
from models import lenet5, mlp
from pyro_bmrs.io.files import write_json

__all__ = ["Size", "main"]


@dataclass(frozen=True)
class Size:
    """Prune networks on the digits to a size, by ``ToSize`` and by bisection over the weight of the KL."""

    networks: tuple[Literal["lenet5", "mlp"], ...] = ("mlp", "lenet5")
    remove: tuple[float, ...] = (0.7, 0.9, 0.95)
    seeds: tuple[int, ...] = (5, 6, 7)
    """Others than the rates of steering were chosen with."""
    fits: int = 6
    """Of the bisection, from a weight of 0.01 to 100."""
    epochs: int = 60
    fine_tune_epochs: int = 20
    output: Path = Path("analysis/results/size.json")


def main(config: Size) -> list[dict[str, Any]]:
    """Run what is not in the output file yet; print and return all."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    rows: list[dict[str, Any]] = json.loads(config.output.read_text()) if config.output.exists() else []
    known = {(row["network"], row["remove"], row["seed"]) for row in rows}
    for network in config.networks:
        for remove in config.remove:
            for seed in config.seeds:
                if (network, remove, seed) in known:
                    continue
                steered = _fit(config, network, seed, bmrs.ToSize(remove))
                row = {"network": network, "remove": remove, "seed": seed, "steered": steered}
                rows.append({**row, "fixed": _bisected(config, network, seed, remove)})
                write_json(config.output, rows)
                print(rows[-1], flush=True)
    for network in config.networks:
        for remove in config.remove:
            of_size = [row for row in rows if (row["network"], row["remove"]) == (network, remove)]
            shown = (
                f"{how}: removed {100 * _mean(of_size, how, 'removed'):.1f} %, test accuracy "
                f"{100 * _mean(of_size, how, 'accuracy'):.2f} %"
                for how in ("steered", "fixed")
            )
            print(f"{network}, remove={remove}: {'; '.join(shown)}")
    return rows


def _mean(rows: list[dict[str, Any]], how: str, key: str) -> float:
    return statistics.fmean(row[how][key] for row in rows)


def _bisected(config: Size, network: str, seed: int, remove: float) -> dict[str, float]:
    """Return the figures of the fit, of all those tried, whose size is the closest."""
    low, high = 0.01, 100.0
    found = []
    for _ in range(config.fits):
        weight = (low * high) ** 0.5
        found.append(_fit(config, network, seed, bmrs.Continuous(), weight))
        low, high = (weight, high) if found[-1]["removed"] < remove else (low, weight)
    return min(found, key=lambda each: abs(each["removed"] - remove))


def _fit(config: Size, network: str, seed: int, pruning: Any, kl_weight: float = 1.0) -> dict[str, float]:
    split = digits()
    torch.manual_seed(seed)
    net = lenet5(in_channels=1) if network == "lenet5" else mlp(1024, hidden=100, layers=3)
    model = bmrs.NoisyNetwork(net, kl_weight=kl_weight)
    guide = bmrs.TruncatedLogNormalGuide(model)
    result = bmrs.fit(
        model, guide, split.train, pruning=pruning, epochs=config.epochs, fine_tune_epochs=config.fine_tune_epochs,
        batch_size=64, lr=4e-3, seed=seed, progress=False, device="cpu",
    )  # fmt: skip
    small = bmrs.compact(model, guide, None, split.test[0][:8])
    removed = 1 - bmrs.count_parameters(small) / bmrs.count_parameters(net)
    right = accuracy(outputs(small, split.test[0]), split.test[1])
    return {"removed": removed, "accuracy": right, "kl_weight": result.kl_weight}


if __name__ == "__main__":
    main(tyro.cli(Size))
