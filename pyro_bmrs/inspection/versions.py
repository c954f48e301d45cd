"""What a posterior was computed with."""

import platform
from importlib.metadata import version

from pyro_bmrs._version import __version__

__all__ = ["versions"]


def versions() -> dict[str, str]:
    """Return the versions of Python, the library, Pyro and torch, by name."""
    others = {name: version(name) for name in ("pyro-ppl", "torch")}
    return {"python": platform.python_version(), "pyro-bmrs": __version__, **others}
