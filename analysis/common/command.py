"""The command that a program was run by, as its results note it."""

import sys
from collections.abc import Sequence

__all__ = ["command"]


def command(program: str, arguments: Sequence[str] | None = None) -> str:
    """Return the command line of ``program`` under ``analysis``, without where its data and output were.

    Args:
        program: Name of the module.
        arguments: Those that it was given; by default this process's.
    """
    kept, skip = [], False
    for each in sys.argv[1:] if arguments is None else arguments:
        if skip or each.startswith(("--data-dir", "--output")):
            skip = not skip and "=" not in each
            continue
        kept.append(f'"{each}"' if " " in each else each)
    return " ".join(["python -m", f"analysis.{program}", *kept])
