"""Random numbers that leave the caller's random state as it was."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pyro
import torch

__all__ = ["local_seed"]


@contextmanager
def local_seed(
    seed: int | None = None, devices: Iterable[torch.device] | None = None, *, validate: bool = True
) -> Iterator[None]:
    """Leave torch's random state as it was, on the CPU and on GPUs.

    Args:
        seed: What to seed it with inside; None goes on from the state that there is.
        devices: Which GPUs' states to restore, CPUs among them have no effect; by default those of every GPU in use.
        validate: False turns Pyro's validation off inside.
    """
    if devices is None:
        gpus: list[Any] = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    else:
        gpus = [each for each in devices if each.type == "cuda"]
    with torch.random.fork_rng(gpus), nullcontext() if validate else pyro.validation_enabled(False):
        if seed is not None:
            torch.manual_seed(seed)
        yield
