"""How long the evidence of a million structures takes on one core: python -m analysis.benchmarks.evidence_speed."""

import resource
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import tyro

import pyro_bmrs as bmrs

__all__ = ["EvidenceSpeed", "main"]


@dataclass(frozen=True)
class EvidenceSpeed:
    """Time BMRS_N and BMRS_U-8 over random posteriors in float64, on one thread, in interleaved rounds."""

    structures: int = 1_000_000
    rounds: int = 7
    seed: int = 0


def main(config: EvidenceSpeed) -> dict[str, float]:
    """Print and return the median seconds of each criterion and of both, and the peak memory in MiB."""
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(config.seed)

    def uniform(low: float, high: float) -> torch.Tensor:
        return low + (high - low) * torch.rand(config.structures, generator=generator, dtype=torch.float64)

    posterior = bmrs.TruncatedLogNormal(uniform(-25, 5), uniform(-12, 5).exp())
    prior = bmrs.LogUniform(torch.tensor(-20.0, dtype=torch.float64), torch.tensor(0.0, dtype=torch.float64))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    works: dict[str, Callable[[], torch.Tensor]] = {
        "BMRS_N": lambda: bmrs.evidence_change(posterior, prior, bmrs.spike(prior)),
        "BMRS_U-8": lambda: bmrs.evidence_change(posterior, prior, bmrs.precision_window(prior)),
    }
    times: dict[str, list[float]] = {name: [] for name in works}
    with torch.no_grad():
        for _ in range(config.rounds):
            for name, work in works.items():
                start = time.perf_counter()
                work()
                times[name].append(time.perf_counter() - start)
    results = {name: statistics.median(values) for name, values in times.items()}
    results["both"] = statistics.median(sum(pair) for pair in zip(*times.values(), strict=True))
    results["MiB"] = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    for name, value in results.items():
        print(f"{name:<10}{value:>10.3f}{' s' if name != 'MiB' else '  above the inputs, at the peak'}")
    return results


if __name__ == "__main__":
    main(tyro.cli(EvidenceSpeed))
