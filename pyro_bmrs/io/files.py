"""Files that are complete or not there at all, and the folder of a run."""

import json
import os
import tempfile
from pathlib import Path
from typing import Any

__all__ = ["AtomicFile", "PathLike", "prepare_run_folder", "write_json"]

PathLike = str | os.PathLike[str]


class AtomicFile:
    """Give a path beside ``path`` to write to, and move it there if all went well.

    The name is fixed, so that a process killed while it writes leaves one such file at most, which the next one reuses.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.partial = path.with_name(f".{path.name}.partial")

    def __enter__(self) -> Path:
        self.partial.touch()
        return self.partial

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        if kind is None:
            self.partial.replace(self.path)
        else:
            self.partial.unlink(missing_ok=True)


def write_json(path: PathLike, content: Any, indent: int | None = 2) -> None:
    """Write ``content`` as JSON, complete or not at all; ``indent=None`` writes it on one line."""
    with AtomicFile(Path(path)) as temporary:
        temporary.write_text(json.dumps(content, indent=indent) + "\n", encoding="utf-8")


def prepare_run_folder(path: PathLike, overwrite: bool = False, resume: bool = False) -> Path:
    """Return ``path`` as an existing, writable folder without results in it, before any work is done for it.

    Args:
        path: Folder of the run; it and its parents are made if missing.
        overwrite: Whether to delete what an earlier run has left there.
        resume: Whether to leave it there, to go on from.

    Raises:
        FileExistsError: If it holds what an earlier run has left, and neither is asked for.
        OSError: If it cannot be made or written to.
    """
    path = Path(path)
    files = [path / name for name in ("results.json", "metrics.jsonl", "checkpoint/fit.safetensors")]
    if not (overwrite or resume) and any(file.is_file() and file.stat().st_size > 0 for file in files):
        raise FileExistsError(
            f"{path} already holds what an earlier run has left; it is kept: choose another folder, resume or overwrite"
        )
    try:
        for folder in (path, path / "figures", path / "checkpoint"):
            folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
        if overwrite and not resume:
            for file in files:
                file.unlink(missing_ok=True)
    except OSError as error:
        raise OSError(f"cannot write to the run folder {path} ({error.strerror}); choose another one") from error
    return path
