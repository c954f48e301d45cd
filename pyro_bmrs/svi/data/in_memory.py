"""Data that are there as a whole: inputs, of one tensor or several, and observations."""

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Generator, Tensor
from torch.utils._pytree import tree_map

from pyro_bmrs.model.network import NoisyNetwork
from pyro_bmrs.structures.inputs import Inputs
from pyro_bmrs.svi.data.checking import check_observations
from pyro_bmrs.svi.data.source import Batch, Source
from pyro_bmrs.svi.devices import place
from pyro_bmrs.svi.fingerprint import fingerprint

if TYPE_CHECKING:
    from lightning_fabric import Fabric

__all__ = ["InMemory"]

_REPORTED_AT_ONCE = 1024  # examples


class InMemory(Source):
    """Tensors; batches of an epoch differ in size by at most one.

    Args:
        x: Inputs: a tensor of shape ``(n, ...)``, or a tuple or dictionary of such.
        y: Observations, of shape ``(n, ...)``.
        name: What errors call them.
        batch_size: At most this many examples per batch.
    """

    def __init__(self, x: Inputs, y: Tensor, name: str, batch_size: int) -> None:
        self.x, self.y, self.name = x, y, name
        self.size = len(y)
        self.batch_size = min(batch_size, self.size)
        self.steps = math.ceil(self.size / self.batch_size)

    @property
    def first(self) -> Batch:  # type: ignore[override]
        """The first examples, where the data are."""
        return self._rows(slice(0, self.batch_size))

    def check(self, model: NoisyNetwork) -> None:
        check_observations(model, self.x, self.y, self.name)

    def shuffled(self, order: Generator, fabric: "Fabric") -> Iterator[tuple[Batch, float]]:
        permutation = torch.randperm(self.size, generator=order).to(self.y.device)
        for batch in permutation.tensor_split(self.steps):
            mine = batch.tensor_split(fabric.world_size)[fabric.global_rank]
            yield self._rows(mine), len(mine) * fabric.world_size / len(batch)

    def ordered(self) -> Iterator[Batch]:
        for start in range(0, self.size, _REPORTED_AT_ONCE):
            yield self._rows(slice(start, start + _REPORTED_AT_ONCE))

    def fingerprint(self) -> Any:
        return [fingerprint(self.x), fingerprint(self.y)]

    def place(self, device: torch.device) -> None:
        self.x = tree_map(lambda each: place(each, device), self.x)
        self.y = place(self.y, device)

    def _rows(self, rows: Tensor | slice) -> Batch:
        def taken(part: Tensor) -> Tensor:
            return part[rows.to(part.device) if isinstance(rows, Tensor) else rows]

        return tree_map(taken, self.x), taken(self.y)
