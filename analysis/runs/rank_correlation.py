"""How far the orders agree in which criteria would remove structures."""

import torch
from torch import Tensor

__all__ = ["spearman"]


def spearman(scores: Tensor) -> Tensor:
    r"""Return Spearman's rank correlations of the rows of ``scores``, a matrix of shape ``(rows, rows)``.

    Pearson's correlation of the ranks, where equals share their mean rank; with a row that is all the same it is 0.

    Raises:
        FloatingPointError: If a score is NaN.
    """
    if scores.isnan().any():
        raise FloatingPointError(f"row {int(scores.isnan().any(1).nonzero()[0])} has a NaN score, which has no rank")
    return _correlations(torch.stack([_ranks(row) for row in scores]))


def _ranks(values: Tensor) -> Tensor:
    """Return the rank of each value from 1, the smallest; equals share the mean of theirs."""
    _, inverse, counts = values.unique(return_inverse=True, return_counts=True)
    last = counts.cumsum(0)
    return (last - (counts - 1) / 2).double()[inverse]


def _correlations(ranks: Tensor) -> Tensor:
    centred = ranks - ranks.mean(1, keepdim=True)
    norms = centred.norm(dim=1)
    norms = torch.where(norms > 0, norms, 1.0)
    return (centred @ centred.T / norms / norms[:, None]).clamp(-1, 1).fill_diagonal_(1.0)
