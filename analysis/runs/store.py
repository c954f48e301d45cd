"""Results of the study: what they hold, and where: one compact JSON file per run, named by its configuration's id."""

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, TypedDict, cast

from analysis.runs.config import RunConfig
from pyro_bmrs.io.files import write_json

__all__ = ["RunResult", "Store", "read_results"]

State = Literal["done", "failed", "pending"]


class _OfEveryRun(TypedDict):
    id: str
    config: dict[str, Any]
    dataset: str
    network: str
    method: str
    seed: int
    epochs: int
    params_dense: int
    params_pruned: int
    compression: float
    flops_dense: int
    flops_pruned: int
    accuracy_validation: float
    accuracy_test: float
    latency_dense_ms: float
    latency_pruned_ms: float
    latency_batch: int
    device: str
    threads: int
    versions: dict[str, str]
    seconds: float
    history: dict[str, list[float]]
    sessions: list[int]
    command: str
    date: str


class RunResult(_OfEveryRun, total=False):
    """What is kept of a run; accuracies and compressions are fractions.

    Attributes:
        config: The settings of its ``RunConfig``, those that have a default and still its value left out.
        compression: Fraction of the trainable parameters that is removed.
        sessions: Epochs done at the start of each session.
        processes: That have trained it together, where they were several.
        accuracy_test_masked: Of runs with noise: before surgery.
        surgery_max_abs_error: Largest difference that surgery has made to a logit.
        structures: Structures of each noise layer at first.
        kept: And in the end.
        compression_reference: Compression as the paper counts it.
        curve: Of pruning after training: a value per level.
        stop_level: Level at which the criterion stops, None where it has no line.
        rank_correlation: Spearman's, between the scores of all methods.
        change: Points of test accuracy beside the dense network of the same seed, where tables have filled it in.
    """

    processes: int
    accuracy_test_masked: float
    surgery_max_abs_error: float
    structures: dict[str, int]
    kept: dict[str, int]
    compression_reference: float
    curve: dict[str, list[float]]
    stop_level: float | None
    rank_correlation: dict[str, Any]
    change: float


class Store:
    """The folder of result files ``ID.json`` and, of runs that failed, ``ID.error.json``.

    Args:
        folder: Made when the first file is written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def state(self, config: RunConfig) -> State:
        """Return how far a run has got; files of runs under way are elsewhere."""
        if self._path(config).exists():
            return "done"
        return "failed" if self._error_path(config).exists() else "pending"

    def write(self, config: RunConfig, results: dict[str, Any], **about: Any) -> None:
        """Keep a run's results, with what they are of, and forget earlier failures."""
        self._write(self._path(config), config, {**results, **about})
        self._error_path(config).unlink(missing_ok=True)

    def write_error(self, config: RunConfig, error: str, traceback: str, **about: Any) -> None:
        """Keep why a run failed."""
        self._write(self._error_path(config), config, {"error": error, "traceback": traceback, **about})

    def read(self, config: RunConfig) -> RunResult:
        """Return what was written about a run that is done."""
        return cast(RunResult, _read(self._path(config)))

    def read_error(self, config: RunConfig) -> dict[str, Any]:
        """Return what was written about a run that failed."""
        return _read(self._error_path(config))

    def read_all(self) -> list[RunResult]:
        """Return all results, in the order of their files' names."""
        return read_results(self.folder)

    def _path(self, config: RunConfig) -> Path:
        return self.folder / f"{config.id}.json"

    def _error_path(self, config: RunConfig) -> Path:
        return self.folder / f"{config.id}.error.json"

    def _write(self, path: Path, config: RunConfig, content: dict[str, Any]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        date = datetime.now(UTC).isoformat(timespec="seconds")
        write_json(path, {"id": config.id, "config": config.settings, **content, "date": date}, indent=None)


def read_results(folder: Path) -> list[RunResult]:
    """Return the results of all runs in a folder and those below, in the order of their paths.

    A result is a JSON file with the test accuracy and the configuration of a run; other files are left out.

    Raises:
        ValueError: If a file is not JSON.
    """
    found = (_read(path) for path in sorted(folder.rglob("*.json")) if not path.name.endswith(".error.json"))
    return [cast(RunResult, each) for each in found if _is_result(each)]


def _is_result(content: Any) -> bool:
    if not (isinstance(content, dict) and isinstance(content.get("config"), dict)):
        return False
    named = {"dataset", "network", "method", "seed"}
    return {"compression", "accuracy_test"} <= content.keys() and named <= content["config"].keys()


def _read(path: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is no result of a run ({error}); delete it to run it again") from None
    return content
