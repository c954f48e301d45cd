"""Integer labels for the positions of tensors, and which of them are removed together.

A tensor carries a list of label tensors. Each is broadcastable to the tensor's shape, has extent 1 along every
dimension that its labels do not vary along, and varies along dimensions (its *support*) along which no other one does.
An element disappears with any of its labels. Joining two labels is always safe: it only makes removal coarser.
"""

from collections.abc import Collection

import numpy as np
import torch
from torch import Tensor

__all__ = ["FIXED", "Classes", "Labels", "squeeze", "support"]

FIXED = -1
"""The label of a position that cannot be removed."""


def support(labels: Tensor) -> frozenset[int]:
    """Return the dimensions along which labels vary."""
    return frozenset(d for d in range(labels.dim()) if labels.shape[d] > 1)


def squeeze(labels: Tensor) -> Tensor:
    """Return labels with extent 1 along every dimension that they do not vary along."""
    for d in range(labels.dim()):
        if labels.shape[d] > 1 and (labels.stride(d) == 0 or bool((labels == labels.narrow(d, 0, 1)).all())):
            labels = labels.narrow(d, 0, 1)
    return labels


class Classes:
    """The classes of labels once all are joined, numbered from 0.

    Attributes:
        of: Class of each label, of shape ``(labels,)``.
        count: Number of classes.
        reasons: Why a class cannot be removed, for those that cannot.
    """

    def __init__(self, of: Tensor, count: int, reasons: dict[int, str]) -> None:
        self.of, self.count, self.reasons = of, count, reasons

    def __call__(self, labels: Tensor) -> Tensor:
        """Return the classes of labels, ``FIXED`` where they are that."""
        return torch.where(labels >= 0, self.of[labels.clamp_min(0)], FIXED)

    def refuse(self, classes: Tensor, reason: str) -> None:
        """Declare that classes cannot be removed, and why."""
        for each in classes.tolist():
            self.reasons.setdefault(each, reason)

    def marked(self, marks: list[Tensor]) -> Tensor:
        """Return which classes contain one of the marked labels: bool, of shape ``(count,)``."""
        result = torch.zeros(self.count, dtype=torch.bool)
        for labels in marks:
            result[self.of[labels[labels >= 0]]] = True
        return result


class Labels:
    """A growing set of labels, the pairs that have been joined, and the labels that cannot be removed."""

    def __init__(self) -> None:
        self.count = 0
        self._pairs: list[Tensor] = []
        self._frozen: list[tuple[Tensor, str]] = []

    def new(self, count: int) -> Tensor:
        """Return ``count`` new labels."""
        self.count += count
        return torch.arange(self.count - count, self.count)

    def freeze(self, labels: Tensor, reason: str) -> None:
        """Declare that labels cannot be removed, and why."""
        self._frozen.append((labels.reshape(-1), reason))

    def join(self, a: Tensor, b: Tensor, reason: str) -> None:
        """Join labels element by element, after broadcasting; what meets a fixed position is frozen."""
        a, b = (each.reshape(-1) for each in torch.broadcast_tensors(a, b))
        both = (a >= 0) & (b >= 0)
        if not bool(both.all()):
            self.freeze(torch.where(a >= 0, a, b)[~both], reason)
        self._pairs.append(torch.stack([a[both], b[both]]).unique(dim=1))

    def tie(self, labels: Tensor, dims: Collection[int], reason: str) -> Tensor | None:
        """Have positions along ``dims`` share their fate; return labels without these dimensions in their support.

        Where labels vary along nothing else they are frozen, since all positions would go at once: then return None.
        """
        within = support(labels) & frozenset(dims)
        if not within:
            return labels
        if support(labels) == within:
            self.freeze(labels, reason)
            return None
        first = labels
        for d in within:
            first = first.narrow(d, 0, 1)
        self.join(first, labels, reason)
        return first

    def resolve(self) -> Classes:
        """Return the classes of all labels."""
        from scipy.sparse import coo_matrix  # noqa: PLC0415  (not for those who never look for structures)
        from scipy.sparse.csgraph import connected_components  # noqa: PLC0415

        pairs = torch.cat(self._pairs, dim=1).numpy() if self._pairs else np.zeros((2, 0), dtype=np.int64)
        graph = coo_matrix((np.ones(pairs.shape[1], dtype=np.int8), (pairs[0], pairs[1])), (self.count, self.count))
        count, of = connected_components(graph, directed=False)
        classes = torch.from_numpy(of.astype(np.int64))
        reasons: dict[int, str] = {}
        for labels, reason in self._frozen:
            for each in classes[labels[labels >= 0]].unique().tolist():
                reasons.setdefault(each, reason)
        return Classes(classes, int(count), reasons)
