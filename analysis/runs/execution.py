"""How runs are executed, and what the folder of their checkpoints tells: who is at work, and how far it is."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeGuard

from filelock import FileLock, Timeout

from analysis.runs.config import AfterTraining, NoisyRun, RunConfig
from pyro_bmrs import PostTraining

if TYPE_CHECKING:
    from lightning_fabric import Fabric

__all__ = [
    "LEVELS",
    "Execution",
    "epochs_done",
    "epochs_planned",
    "is_running",
    "note_session",
    "run_lock",
    "shared_training",
    "work_folder",
]

LEVELS = PostTraining().levels
_LOCK = "lock"


@dataclass(frozen=True)
class Execution:
    """How a run is executed, none of which changes its results by more than rounding, several processes apart.

    Attributes:
        work: Folder of checkpoints, one folder per run; workers on several machines share it.
        data_dir: See ``analysis.data.sets.load``.
        device: ``"auto"`` takes CUDA if there is a device.
        threads: Of the CPU, for one run.
        compile: Whether to compile training steps (on CUDA: to capture them), instead of shrinking while training.
        checkpoint_every: Epochs between checkpoints.
        weights: Folder of pretrained weights, each in a folder of the network's name.
        fabric: Launched, of several processes that train one run together, each with its own noise and its part of a
            batch; the first writes what is kept, and a run goes on with as many processes as it began with. None for
            one process.
    """

    work: Path
    data_dir: Path | None = None
    device: str = "auto"
    threads: int = 1
    compile: bool = False
    checkpoint_every: int = 1
    weights: Path | None = None
    fabric: "Fabric | None" = None

    @property
    def is_first(self) -> bool:
        """Whether this process is the only one, or the first of several."""
        return self.fabric is None or self.fabric.is_global_zero

    @contextmanager
    def first_alone(self) -> Iterator[None]:
        """Have the first process go through this block alone, and the others after it."""
        with nullcontext() if self.fabric is None else self.fabric.rank_zero_first():
            yield


def work_folder(config: RunConfig, execution: Execution) -> Path:
    """Return the folder of one run's checkpoints, which need not exist."""
    return execution.work / config.id


@contextmanager
def run_lock(config: RunConfig, execution: Execution) -> Iterator[Path]:
    """Hold a lock on the folder of a run's checkpoints, so that no two commands write the same; return the folder.

    It goes with the process. Of several processes that train together, the first holds it.
    """
    folder = work_folder(config, execution)
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / _LOCK) if execution.is_first else nullcontext():
        yield folder


def note_session(config: RunConfig, execution: Execution) -> list[int]:
    """Return how many epochs had been done at the start of each session of a run, this one the last."""
    path = work_folder(config, execution) / "sessions"
    with path.open("a", encoding="utf-8") as file:
        file.write(f"{epochs_done(config, execution)}\n")
    return [int(line) for line in path.read_text(encoding="utf-8").split()]


def shared_training(config: NoisyRun) -> NoisyRun:
    """Return what names the training that all criteria share."""
    return replace(config, method="shared", prior_log_odds=0.0, p2=None)


def epochs_planned(config: RunConfig) -> int:
    """Return how many epochs a run has, of post-training pruning about, since it may have a level of its own."""
    return config.total_epochs + (len(LEVELS) if _is_pruned_after(config) else 0)


def epochs_done(config: RunConfig, execution: Execution) -> int:
    """Return how many of them its folder of checkpoints has a record of."""
    folders = [work_folder(config, execution)]
    if _is_pruned_after(config):
        folders.append(work_folder(shared_training(config), execution))
    return sum(_count_lines(folder / "metrics.jsonl") for folder in folders)


def is_running(config: RunConfig, execution: Execution) -> bool:
    """Return whether some process is at work on a run; one that was killed no longer holds the lock."""
    path = work_folder(config, execution) / _LOCK
    if not path.exists():
        return False
    try:
        with FileLock(path, timeout=0):
            return False
    except Timeout:
        return True


def _is_pruned_after(config: RunConfig) -> TypeGuard[NoisyRun]:
    return isinstance(config, NoisyRun) and isinstance(config.schedule, AfterTraining)


def _count_lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0
