"""What a program needs beyond the library."""

from importlib.util import find_spec

__all__ = ["require"]


def require(extra: str, *modules: str) -> None:
    """Raise ``ImportError``, saying what to install, unless all ``modules`` of an extra are there."""
    if missing := [name for name in modules if find_spec(name) is None]:
        raise ImportError(
            f"this needs {', '.join(missing)}: pip install 'pyro-bmrs[{extra}]', or make .venv/.installed"
        )
