"""What runs, what is left, and how long it will take: a line that keeps changing, or in a log file plain ones."""

import shutil
import sys
import threading
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any, Self, TextIO

from analysis.runs.config import NoisyRun, RunConfig
from analysis.runs.execution import Execution, epochs_done, epochs_planned, is_running

__all__ = ["Progress", "seconds_left"]

_Finished = tuple[RunConfig, float]  # a run and the seconds that it took


def seconds_left(left: Mapping[RunConfig, int], finished: Iterable[_Finished], jobs: int) -> float | None:
    """Estimate the seconds until all runs are done, from the seconds per epoch of like runs that have finished.

    Args:
        left: For each run that is not done the number of epochs it still has.
        finished: Runs that are done, with their seconds.
        jobs: Number of runs side by side.

    Returns:
        The estimate, None while nothing has finished.
    """
    rates: dict[tuple[str, ...], list[float]] = defaultdict(list)
    for config, seconds in finished:
        rate = seconds / max(epochs_planned(config), 1)
        for kind in (_kind(config), ()):
            rates[kind].append(rate)
    if not rates:
        return None
    each = [
        epochs * _mean(rates[_kind(config)] if _kind(config) in rates else rates[()]) for config, epochs in left.items()
    ]
    return max(sum(each) / jobs, max(each, default=0.0))


def _kind(config: RunConfig) -> tuple[str, ...]:
    training = "noisy" if isinstance(config, NoisyRun) else config.method
    return (config.dataset, config.network, config.recipe, training)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


class Progress:
    """Displays a study under way while in its ``with`` block.

    Args:
        configs: Runs to come.
        finished: Runs of the same study done before, with their seconds, for the estimate.
        execution: How runs are executed; their folders tell how far they are.
        jobs: Number of runs side by side.
        stream: Where to write; by default standard error.
    """

    def __init__(
        self,
        configs: Sequence[RunConfig],
        finished: Iterable[_Finished],
        execution: Execution,
        jobs: int,
        stream: TextIO | None = None,
    ) -> None:
        self._left = list(configs)
        self._total = len(self._left)
        self._finished = list(finished)
        self._execution, self._jobs = execution, jobs
        self._stream = sys.stderr if stream is None else stream
        self._failures = 0
        self._live = self._stream.isatty()
        self._stop = threading.Event()
        self._writing = threading.Lock()
        self._thread = threading.Thread(target=self._keep_up, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: BaseException | TracebackType | None) -> None:
        self._stop.set()
        self._thread.join()
        self._clear()

    def tell(self, config: RunConfig, results: dict[str, Any] | None, error: str) -> None:
        """Print the result of a run."""
        with self._writing:
            self._left.remove(config)
            if results is None:
                self._failures += 1
                what = f"FAILED, {error.splitlines()[0] if error else 'no reason given'}"
            else:
                self._finished.append((config, results["seconds"]))
                what = f"{100 * results['compression']:.1f} % removed, accuracy {100 * results['accuracy_test']:.2f} %"
                what += f", {format_seconds(results['seconds'])}"
            self._clear()
            print(f"[{self._total - len(self._left)}/{self._total}] {config.label}: {what}", file=self._stream)
            if not self._live:
                print(self.line(), file=self._stream, flush=True)

    def line(self) -> str:
        """Return the state of the study in one line."""
        running = [config for config in self._left if is_running(config, self._execution)]
        done = {config: epochs_done(config, self._execution) for config in self._left}
        remaining = {config: max(epochs_planned(config) - done[config], 0) for config in self._left}
        seconds = seconds_left(remaining, self._finished, self._jobs)
        parts = [f"{self._total - len(self._left) - self._failures} of {self._total} done"]
        parts += [f"{self._failures} failed"] if self._failures else []
        parts += [f"{len(self._left)} left"]
        parts += [f"about {format_seconds(seconds)}"] if seconds is not None and self._left else []
        shown = [f"{config.label} (epoch {done[config]}/{epochs_planned(config)})" for config in running]
        return ", ".join(parts) + (f"; running: {', '.join(shown)}" if shown else "")

    def _keep_up(self) -> None:
        interval = 1.0 if self._live else 60.0
        while not self._stop.wait(interval):
            with self._writing:
                width = shutil.get_terminal_size().columns - 1
                self._clear()
                print(self.line()[:width] if self._live else self.line(), file=self._stream, end=self._end, flush=True)

    @property
    def _end(self) -> str:
        return "" if self._live else "\n"

    def _clear(self) -> None:
        if self._live:
            print("\r\x1b[K", file=self._stream, end="", flush=True)


def format_seconds(seconds: float) -> str:
    """Return a duration as people say it."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
