"""Operations that count positions: whether what is left of an axis is still cut where it was.

A view that splits an axis, a slice, a chunk: each is right for a smaller axis only if removal takes whole slabs of a
block, leaves the positions in front of a cut alone, or takes as many from each part. That depends on which labels share
a class in the end, so the tracer notes such operations, and they are looked at once classes are known.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_bmrs.structures.labels import Classes, squeeze, support

__all__ = ["Block", "Cuts"]


@dataclass
class Block:
    """An axis that has been split into several.

    Attributes:
        labels: Labels of the block.
        reason: What to say of those that cannot be removed.
    """

    labels: Tensor
    reason: str

    def offenders(self, classes: Classes) -> Tensor:
        """Return the classes that are not whole slabs of the block, and whose removal would leave no block."""
        block = squeeze(classes(self.labels))
        if len(support(block)) < 2:
            return block.new_empty(0)
        slabs = []
        for d in support(block):
            first = block.movedim(d, 0).flatten(1)
            whole = first[(first == first[:, :1]).all(1), 0]  # positions along d that are of one class throughout
            count = torch.bincount(whole[whole >= 0], minlength=classes.count) * first.shape[1]
            slabs.append(count)
        total = torch.bincount(block[block >= 0], minlength=classes.count)
        good = torch.stack([each == total for each in slabs]).any(0)
        every = block.unique()
        every = every[every >= 0]
        return every[~good[every]]


@dataclass
class Cuts:
    """An axis of which parts are taken.

    Attributes:
        labels: Labels of the tensor.
        dim: The dimension that is cut.
        starts: Cuts counted from the start: how many positions lie in front of each.
        ends: Cuts counted from the end: how many positions lie behind each.
        whole: Whether the parts are all of the axis, so that their sizes are all that there is.
        reason: What to say of those that cannot be removed.
    """

    labels: Tensor
    dim: int
    starts: tuple[int, ...]
    ends: tuple[int, ...]
    whole: bool
    reason: str

    def offenders(self, classes: Classes) -> Tensor:
        """Return the classes whose removal would move a cut."""
        found = squeeze(classes(self.labels))
        if self.dim not in support(found):
            return found.new_empty(0)
        rows = found.movedim(self.dim, -1).reshape(-1, found.shape[self.dim])
        size = rows.shape[1]
        cuts = {*self.starts, *(size - each for each in self.ends)}
        if all(self._balanced(row, cut, classes.count) for row in rows for cut in cuts):
            return found.new_empty(0)
        if self.whole:
            removed = rows
        else:
            front, back = max(self.starts, default=0), max(self.ends, default=0)
            removed = torch.cat([rows[:, :front], rows[:, size - back :]], 1)
        every = removed.unique()
        return every[every >= 0]

    @staticmethod
    def _balanced(row: Tensor, cut: int, count: int) -> bool:
        """Return whether each class has its share in front of the cut, so that both parts shrink alike."""
        total = torch.bincount(row[row >= 0], minlength=count)
        front = torch.bincount(row[:cut][row[:cut] >= 0], minlength=count)
        return torch.equal(front * len(row), total * cut)
