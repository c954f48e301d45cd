"""Warnings that name the caller's line, however deep inside the library they are given."""

import sys
import warnings

__all__ = ["warn"]

_PASSED_THROUGH = ("pyro_bmrs", "torch", "pyro", "contextlib", "functools", "lightning_fabric")


def warn(message: str, category: type[Warning]) -> None:
    """Warn at the innermost line that is neither of this library nor of one that it calls itself through."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and str(frame.f_globals.get("__name__")).partition(".")[0] in _PASSED_THROUGH:
        frame, level = frame.f_back, level + 1
    warnings.warn(message, category, stacklevel=level)
