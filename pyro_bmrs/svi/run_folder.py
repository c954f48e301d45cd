"""The folder of a fit: one fit at a time writes there."""

import os
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from filelock import FileLock, Timeout

from pyro_bmrs.checks import described
from pyro_bmrs.io.files import PathLike

if TYPE_CHECKING:
    from lightning_fabric import Fabric

__all__ = ["RunFolder"]


class RunFolder:
    """A folder that holds the checkpoint and the metrics of one fit, locked while it runs.

    The lock is the operating system's and ends with the process, however that ends. In a fit of several processes the
    first one takes it.

    Args:
        path: The folder; made, with its parents, when the fit begins.
        fabric: The processes.
        resume: Whether a checkpoint that is there may be resumed from.

    Attributes:
        checkpoint: File of the checkpoint.
        metrics: File of the metrics.

    Raises:
        TypeError: If ``path`` is no path.
        FileExistsError: If there is a checkpoint that may not be gone on from.
    """

    def __init__(self, path: PathLike, fabric: "Fabric", resume: bool) -> None:
        if not isinstance(path, str | os.PathLike):
            raise TypeError(f"folder must be a path, but got {described(path)}")
        self.path, self.fabric, self.resume = Path(path), fabric, resume
        self.checkpoint = self.path / "checkpoint" / "fit.safetensors"
        self.metrics = self.path / "metrics.jsonl"
        self._lock = FileLock(self.path / "checkpoint" / "fit.lock")
        self._check()

    def __enter__(self) -> "RunFolder":
        error: Exception | None = None
        if self.fabric.is_global_zero:
            try:
                self._take()
            except (FileExistsError, RuntimeError) as raised:
                error = raised
            except OSError as raised:
                error = OSError(f"folder {self.path} cannot be written to ({raised}); choose another one")
        error = self.fabric.broadcast(error)
        if error is not None:
            raise error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._lock.release()

    def _take(self) -> None:
        self.checkpoint.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            raise RuntimeError(
                f"another fit is running in {self.path}: wait until it has ended, or choose another folder"
            ) from None
        try:
            self._check()
            for file in (self.checkpoint, self.metrics):  # what a killed process was writing
                for stale in file.parent.glob(f".{file.name}*.partial"):
                    stale.unlink(missing_ok=True)
        except BaseException:
            self._lock.release()
            raise

    def _check(self) -> None:
        if self.checkpoint.exists() and not self.resume:
            raise FileExistsError(
                f"{self.checkpoint} is the checkpoint of an earlier fit: go on from it with resume=True, or choose "
                "another folder"
            )
