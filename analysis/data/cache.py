"""Tensors that are slow to make, kept in a file between runs."""

import os
import warnings
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from pyro_bmrs.io.files import AtomicFile

__all__ = ["cache_folder", "cached"]


def cache_folder() -> Path:
    """Return the user's folder for what pyro-bmrs can make again, which need not exist."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pyro-bmrs"


def cached(file: Path, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """Return the tensors in ``file``, or those of ``make()`` after writing them there.

    Tensors from the file are mapped into memory, so that processes side by side share them. Of several processes that
    lack the file, one makes it while the others wait. A file that cannot be read is made again, and where it cannot be
    written the tensors are returned all the same, both with a warning.
    """
    if (found := _read(file)) is not None:
        return found
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(file.with_suffix(".lock"))
        lock.acquire()
    except OSError as error:
        _warn_unwritable(file, error)
        return make()
    try:
        if (found := _read(file)) is not None:  # made by another process while this one waited
            return found
        if file.exists():
            warnings.warn(f"the cached file {file} is corrupt and made again", stacklevel=2)
        made = make()
        try:
            with AtomicFile(file) as temporary:
                save_file(made, temporary)
        except (OSError, SafetensorError) as error:
            _warn_unwritable(file, error)
        return made
    finally:
        lock.release()


def _read(file: Path) -> dict[str, Tensor] | None:
    try:
        return load_file(file)
    except (OSError, SafetensorError, ValueError):
        return None


def _warn_unwritable(file: Path, error: Exception) -> None:
    warnings.warn(
        f"cannot write to the cache folder {file.parent}, so the work is done again in each run; choose another one "
        f"with cache or XDG_CACHE_HOME. The reason: {error}",
        stacklevel=3,
    )
