"""What importing the library takes beside torch and Pyro: python -m analysis.benchmarks.import_time."""

import statistics
import subprocess
import sys
import time
from dataclasses import dataclass

import tyro

__all__ = ["ImportTime", "main"]


@dataclass(frozen=True)
class ImportTime:
    """Time both imports in fresh interpreters, in interleaved rounds after one to warm the disk cache."""

    rounds: int = 11


def main(config: ImportTime) -> dict[str, float]:
    """Print and return the median seconds of both, and the median of their ratios."""
    times: dict[str, list[float]] = {"torch, pyro": [], "pyro_bmrs": []}
    for _ in range(config.rounds + 1):
        for modules, seconds in times.items():
            started = time.perf_counter()
            subprocess.run([sys.executable, "-c", f"import {modules}"], check=True)
            seconds.append(time.perf_counter() - started)
    plain, ours = (seconds[1:] for seconds in times.values())
    ratio = statistics.median(b / a for a, b in zip(plain, ours, strict=True))
    results = {"torch, pyro": statistics.median(plain), "pyro_bmrs": statistics.median(ours), "ratio": ratio}
    for name, value in results.items():
        print(f"{name:<14}{value:>8.2f}{'' if name == 'ratio' else ' s'}")
    return results


if __name__ == "__main__":
    main(tyro.cli(ImportTime))
