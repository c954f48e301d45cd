"""Random numbers that leave the caller's alone."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

__all__ = ["forked_random"]


@contextmanager
def forked_random(seed: int | None = None) -> Iterator[None]:
    """Leave torch's random state as it was, on the CPU and on every GPU in use.

    Args:
        seed: What to seed it with inside; None goes on from the state that there is.
    """
    with torch.random.fork_rng(devices=range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []):
        if seed is not None:
            torch.manual_seed(seed)
        yield
