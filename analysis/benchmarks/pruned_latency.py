"""How much faster large networks run once structures are removed: python -m analysis.benchmarks.pruned_latency."""

import os
import platform
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from torch import Tensor

import pyro_bmrs as bmrs
from analysis.common.command import command
from analysis.data.sets import count_classes
from analysis.runs.config import Pretrained, PretrainedName
from analysis.runs.pretrained import architecture
from analysis.runs.recipes import make_config
from pyro_bmrs.io.files import write_json
from pyro_bmrs.structures.compact import without_noise

__all__ = ["PrunedLatency", "main"]


@dataclass(frozen=True)
class PrunedLatency:
    """Remove random structures of networks with random weights, which changes nothing of their speed."""

    networks: tuple[PretrainedName, ...] = ("resnet50", "vit_b16")
    dataset: str = "cifar10"
    """Whose size of images and number of classes the networks have."""
    remove: tuple[float, ...] = (0.5, 0.75)
    """Fractions of the structures of every group."""
    width: bool = False
    """Whether to remove channels that a layer norm averages over, too."""
    batch: int = 8
    rounds: int = 15
    """Of interleaved timing."""
    seed: int = 0
    threads: int = 1
    output: Path = Path("analysis/results/pruned_latency.json")


def main(config: PrunedLatency) -> list[dict[str, Any]]:
    """Measure, print and write a row for each network and fraction, and return them."""
    torch.set_num_threads(config.threads)
    machine = f"{platform.machine()}, {os.cpu_count()} cores, {config.threads} threads, torch {torch.__version__}"
    rows = []
    for network in config.networks:
        for row in _rows(config, network):
            rows.append(row)
            print(_line(row), flush=True)
            config.output.parent.mkdir(parents=True, exist_ok=True)
            write_json(
                config.output, {"command": command("benchmarks.pruned_latency"), "machine": machine, "rows": rows}
            )
    return rows


def _rows(config: PrunedLatency, network: str) -> Iterator[dict[str, Any]]:
    run = make_config(config.dataset, network, "none", "ours", config.seed)
    assert isinstance(run.net, Pretrained), network
    torch.manual_seed(config.seed)
    net = architecture(run.net, run.image_size, count_classes(config.dataset)).eval()
    x = torch.randn(config.batch, 3, run.image_size, run.image_size)
    started = time.perf_counter()
    structures = bmrs.find_structures(net, x[:2], width=config.width)
    seconds = time.perf_counter() - started
    model = bmrs.NoisyNetwork(bmrs.attach_noise(net, structures), num_data=1)
    guide = bmrs.TruncatedLogNormalGuide(model)
    plain = without_noise(model.net)
    params, flops = bmrs.count_parameters(net), bmrs.count_flops(net, x)
    for fraction in config.remove:
        masks = {site: _mask(size, fraction, config.seed) for site, size in model.sizes.items()}
        small = bmrs.compact(model, guide, masks, x[:2])
        before, after = bmrs.measure_latency([plain, small], x, config.rounds)
        yield {
            "network": network,
            "width": config.width,
            "groups": len(structures),
            "structures": sum(model.sizes.values()),
            "seconds_to_find": seconds,
            "remove": fraction,
            "params": [params, bmrs.count_parameters(small)],
            "flops": [flops, bmrs.count_flops(small, x)],
            "ms": [1e3 * before, 1e3 * after],
            "batch": config.batch,
        }


def _mask(size: int, fraction: float, seed: int) -> Tensor:
    order = torch.randperm(size, generator=torch.Generator().manual_seed(seed + size))
    mask = torch.ones(size, dtype=torch.bool)
    mask[order[: round(fraction * size)]] = False
    return mask


def _line(row: dict[str, Any]) -> str:
    fewer, faster = row["flops"][0] / row["flops"][1], row["ms"][0] / row["ms"][1]
    kept = 100 * row["params"][1] / row["params"][0]
    return (
        f"{row['network']}, {100 * row['remove']:.0f} % of {row['structures']} structures in {row['groups']} groups "
        f"(found in {row['seconds_to_find']:.1f} s): {kept:.0f} % of the parameters left, {fewer:.1f} times fewer "
        f"FLOPs, {faster:.1f} times faster ({row['ms'][0]:.0f} to {row['ms'][1]:.0f} ms per batch of {row['batch']})"
    )


if __name__ == "__main__":
    try:
        main(tyro.cli(PrunedLatency))
    except (ImportError, ValueError, OSError) as error:
        sys.exit(f"error: {error}")
