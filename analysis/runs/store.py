"""Results of the study on disk: one compact JSON file a run, named by its configuration's id."""

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from analysis.runs.config import RunConfig
from pyro_bmrs.io.files import write_json

__all__ = ["Store"]

State = Literal["done", "failed", "pending"]


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

    def read(self, config: RunConfig) -> dict[str, Any]:
        """Return what was written about a run that is done."""
        return _read(self._path(config))

    def read_error(self, config: RunConfig) -> dict[str, Any]:
        """Return what was written about a run that failed."""
        return _read(self._error_path(config))

    def read_all(self) -> list[dict[str, Any]]:
        """Return all results, in the order of their files' names."""
        return [_read(path) for path in sorted(self.folder.glob("*.json")) if not path.name.endswith(".error.json")]

    def _path(self, config: RunConfig) -> Path:
        return self.folder / f"{config.id}.json"

    def _error_path(self, config: RunConfig) -> Path:
        return self.folder / f"{config.id}.error.json"

    def _write(self, path: Path, config: RunConfig, content: dict[str, Any]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        date = datetime.now(UTC).isoformat(timespec="seconds")
        write_json(path, {"id": config.id, "config": config.settings, **content, "date": date}, indent=None)


def _read(path: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is no result of a run ({error}); delete it to run it again") from None
    return content
