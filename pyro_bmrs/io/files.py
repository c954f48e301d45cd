"""Files that are complete or not there at all, and the folder of a run."""

import json
import os
import secrets
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from pyro_bmrs.checks import check_flag, described

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]

__all__ = ["AtomicFile", "PathLike", "folder_lock", "prepare_run_folder", "write_json", "write_together"]

PathLike = str | os.PathLike[str]


class AtomicFile:
    """Give a new file beside ``path`` to write to, and move it there if all went well.

    Its name is random, so that several processes may write at once, and no link that somebody has laid is followed. A
    process killed while it writes leaves it behind, as ``.NAME.*.partial``.

    Args:
        path: The file to write.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.partial = path.with_name(f".{path.name}.{secrets.token_hex(8)}.partial")

    def __enter__(self) -> Path:
        os.close(os.open(self.partial, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))  # less the umask
        return self.partial

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        try:
            if kind is None:
                self.partial.replace(self.path)
        finally:
            self.partial.unlink(missing_ok=True)


def write_json(path: PathLike, content: Any, indent: int | None = 2) -> None:
    """Write ``content`` as JSON, complete or not at all; ``indent=None`` writes it on one line."""
    with AtomicFile(Path(path)) as temporary:
        temporary.write_text(json.dumps(content, indent=indent) + "\n", encoding="utf-8")


def write_together(contents: Mapping[Path, bytes]) -> None:
    """Write several files of one folder: all are complete, and others that do so too never leave a mixture.

    Raises:
        OSError: If they cannot be written; those of before are left then.
    """
    files = [AtomicFile(path) for path in contents]
    try:
        for file, content in zip(files, contents.values(), strict=True):
            with file.__enter__().open("wb") as handle:
                handle.write(content)
                handle.flush()
                os.fsync(handle.fileno())
        with folder_lock(files[0].path.parent):
            for file in files:
                file.partial.replace(file.path)
    except OSError as error:
        names = " and ".join(str(file.path) for file in files)
        raise OSError(f"{names} cannot be written ({error}); what was there before is left") from error
    finally:
        for file in files:
            file.partial.unlink(missing_ok=True)


@contextmanager
def folder_lock(folder: Path, shared: bool = False) -> Iterator[None]:
    """Hold the system's advisory lock on a folder, where there is one; ``shared`` with others that only read."""
    handle = None
    if fcntl is not None:
        with suppress(OSError):  # some file systems have no locks
            handle = os.open(folder, os.O_RDONLY)
            fcntl.flock(handle, fcntl.LOCK_SH if shared else fcntl.LOCK_EX)
    try:
        yield
    finally:
        if handle is not None:
            os.close(handle)


def prepare_run_folder(path: PathLike, overwrite: bool = False, resume: bool = False) -> Path:
    """Return ``path`` as an existing, writable folder without results in it, before any work is done for it.

    Args:
        path: Folder of the run; it and its parents are made if missing.
        overwrite: Whether to delete what an earlier run has left there.
        resume: Whether to leave it there, to go on from.

    Raises:
        TypeError: If ``path`` is no path, or another argument neither True nor False.
        FileExistsError: If it holds what an earlier run has left, and neither is asked for.
        OSError: If it cannot be made or written to.
    """
    if not isinstance(path, str | os.PathLike):
        raise TypeError(f"path must be the path of a folder, but got {described(path)}")
    check_flag("overwrite", overwrite)
    check_flag("resume", resume)
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
