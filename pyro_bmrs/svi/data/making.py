"""From what a caller calls data to a source of batches."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from pyro_bmrs.checks import check_function, check_integer, described
from pyro_bmrs.model.network import NoisyNetwork
from pyro_bmrs.randomness import local_seed
from pyro_bmrs.svi.data.checking import as_tensors
from pyro_bmrs.svi.data.in_memory import InMemory
from pyro_bmrs.svi.data.source import Source
from pyro_bmrs.svi.data.stream import DatasetStream, LoaderStream
from pyro_bmrs.svi.data.unpacking import Unpack, unpacked

__all__ = ["Data", "make_source", "source_of"]

Data = Any
"""A pair of tensors or arrays, or a mapping of them; a ``Dataset``; a ``DataLoader``; a sized iterable of batches."""


@local_seed(devices=[])  # the caller's code may draw while it is tried
def make_source(
    data: Any, name: str, dtype: torch.dtype, unpack: Unpack | None = None, batch_size: int | None = None
) -> Source:
    """Return the source that ``data`` are, or ``data`` if they are one already.

    Args:
        data: A pair of tensors or arrays, or a mapping of them; a ``Dataset``; a ``DataLoader``; or any iterable of
            batches that has a length.
        name: What to call them.
        dtype: The network's.
        unpack: From a batch to inputs and observations.
        batch_size: At most this many examples per batch, where the data do not come in batches already; by default a
            sixteenth of them, but 16 to 64.

    Raises:
        TypeError: If they are something else.
        ValueError: If they are empty, or there is something wrong with them.
    """
    if isinstance(data, Source):
        return data
    if batch_size is not None:
        check_integer("batch_size", batch_size, low=1)
    if unpack is not None:
        check_function("unpack", unpack, "from a batch to inputs and observations")
    if isinstance(data, TensorDataset) and (unpack is not None or len(data.tensors) == 2):
        data = data.tensors
    if isinstance(data, list | tuple | Mapping) and not data:
        raise ValueError(f"{name} is empty: {described(data)} of length 0")
    if isinstance(data, tuple | Mapping) or (isinstance(data, list) and not _is_list_of_batches(data)):
        x, y = as_tensors(*unpacked(data, unpack, name), name, dtype)
        return InMemory(x, y, name, batch_size or _default_batch_size(len(y)))
    if _comes_in_batches(data) and not isinstance(data, torch.nn.Module):
        if batch_size is not None and name == "train":
            raise ValueError(
                f"batch_size={batch_size} has no meaning for {described(data)}, whose batches are made already: leave "
                "it out"
            )
        return LoaderStream(data, name, dtype, unpack)
    if _is_indexed(data):
        return DatasetStream(data, name, dtype, unpack, batch_size or _default_batch_size(len(data)))
    raise TypeError(
        f"{name} must be a pair of tensors (inputs, observations), a Dataset, a DataLoader or an iterable of batches "
        f"with a length, but got {described(data)}{_remedy(data)}"
    )


def source_of(data: Any, model: NoisyNetwork, unpack: Unpack | None = None) -> Source:
    """Return the source that ``data`` are, once it is known that the model takes them.

    Raises:
        TypeError, ValueError: As ``make_source``, or if it does not.
    """
    dtypes = (each.dtype for each in model.net.parameters() if each.is_floating_point())
    source = make_source(data, "data", next(dtypes, torch.get_default_dtype()), unpack)
    source.check(model)
    return source


def _default_batch_size(examples: int) -> int:
    return min(max(examples // 16, 16), 64)


def _is_list_of_batches(data: list[Any]) -> bool:
    return all(isinstance(each, tuple | list | Mapping) for each in data)


def _comes_in_batches(data: Any) -> bool:
    if isinstance(data, list):
        return True
    if isinstance(data, Dataset) or not _has_length(data):
        return False
    return isinstance(data, DataLoader) or (hasattr(data, "__iter__") and not hasattr(data, "__getitem__"))


def _is_indexed(data: Any) -> bool:
    values = isinstance(data, str | bytes | torch.Tensor | np.ndarray | torch.nn.Module)
    return hasattr(data, "__getitem__") and hasattr(data, "__len__") and not values


def _has_length(data: Any) -> bool:
    try:
        len(data)
    except TypeError:
        return False
    return True


def _remedy(data: Any) -> str:
    if isinstance(data, IterableDataset):
        return ", whose examples come one by one: put it into a DataLoader, and give it a __len__"
    if hasattr(data, "__iter__") and not _has_length(data):
        return ", which has no len(): define __len__, the number of batches, in a class around it"
    return ""
