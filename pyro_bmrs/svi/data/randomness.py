"""A stream of random numbers of its own, for what loads data: of torch, NumPy and Python alike."""

import random
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

import numpy as np
import torch

__all__ = ["drawing_apart"]

T = TypeVar("T")


def drawing_apart(batches: Iterable[T], seed: int) -> Iterator[T]:
    """Iterate over ``batches``, whose random numbers come from ``seed``; those of the caller's are left alone.

    So the order and the augmentation of data are the same whatever else is drawn between two batches, and the same in
    every process.
    """
    outside = _states()
    _seed(seed)
    try:
        iterator = iter(batches)  # which may draw as well, and more where a loader takes up a state that it was given
        _seed(seed)
    finally:
        inside = _states()
        _set(outside)
    while True:
        outside = _states()
        _set(inside)
        try:
            batch = next(iterator)
        except StopIteration:
            return
        finally:
            inside = _states()
            _set(outside)
        yield batch


def _seed(seed: int) -> None:
    torch.default_generator.manual_seed(seed)
    np.random.seed(seed)  # noqa: NPY002  (what the data of others draw from)
    random.seed(seed)


def _states() -> tuple[Any, ...]:
    return torch.get_rng_state(), np.random.get_state(), random.getstate()  # noqa: NPY002


def _set(states: tuple[Any, ...]) -> None:
    torch.set_rng_state(states[0])
    np.random.set_state(states[1])  # noqa: NPY002
    random.setstate(states[2])
