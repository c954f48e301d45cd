"""In which order criteria would remove the structures of one fitted network, and how far they agree."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

import pyro_bmrs as bmrs
from pyro_bmrs.data import to_input
from pyro_bmrs.modes import evaluating

__all__ = ["CRITERIA", "rank_correlation", "spearman"]

# The paper's, in the order of its tables; of thresholds and prior odds the order of structures knows nothing.
CRITERIA: dict[str, bmrs.Criterion] = {
    "L2": bmrs.WeightNorm(),
    "gradient": bmrs.GradientWeightNorm(),
    "E[theta]": bmrs.PosteriorMean(0.1),
    "SNR": bmrs.SNR(1.0),
    "BMRS_N": bmrs.BMRS_N(),
    "BMRS_U-8": bmrs.BMRS_U(8, 23),
    "BMRS_U-4": bmrs.BMRS_U(4, 23),
}


def rank_correlation(
    model: bmrs.NoisyNetwork,
    guide: bmrs.FlatGuide,
    x: Tensor,
    y: Tensor,
    criteria: Mapping[str, bmrs.Criterion] = CRITERIA,
) -> dict[str, Any]:
    """Return, ready for JSON, every criterion's ranks of the remaining structures and Spearman's correlations of them.

    Args:
        model: The fitted model.
        guide: Its guide.
        x: A batch of training inputs, for criteria that look at gradients.
        y: Their observations.
        criteria: By name; at least two.

    Returns:
        ``methods``: their names. ``structures``: how many are ranked, of all layers together. ``ranks``: for each
        criterion and layer the ranks of the structures from 1, the first to remove; equals share their mean rank.
        ``spearman``: the matrix of correlations, in that order.

    Raises:
        FloatingPointError: If a score is NaN.
        ValueError: If fewer than two criteria or two structures are left to compare.
    """
    x, y = to_input(x.to(guide.device)), y.to(guide.device)
    masks = {site: mask.cpu() for site, mask in model.masks.items()}
    sizes = [int(mask.sum()) for mask in masks.values()]
    if len(criteria) < 2 or sum(sizes) < 2:
        raise ValueError(f"{len(criteria)} criteria and {sum(sizes)} structures: there is nothing to correlate")
    ranks = []
    with evaluating(model):
        context = bmrs.PruningContext(model, guide, bmrs.find_structures(model.net, x[:2]), x, y)
        for name, criterion in criteria.items():
            scores = {site: score.detach().double().cpu() for site, score in criterion.scores(context).items()}
            flat = torch.cat([scores[site][mask] for site, mask in masks.items()])
            if flat.isnan().any():
                raise FloatingPointError(f"criterion {name!r} has a NaN score, which has no rank")
            ranks.append(_ranks(-flat))
    layers = [site.removesuffix(".theta") for site in masks]
    return {
        "methods": list(criteria),
        "structures": sum(sizes),
        "ranks": {
            name: dict(zip(layers, (part.tolist() for part in each.split(sizes)), strict=True))
            for name, each in zip(criteria, ranks, strict=True)
        },
        "spearman": _correlations(torch.stack(ranks)).tolist(),
    }


def spearman(scores: Tensor) -> Tensor:
    r"""Return Spearman's rank correlations of the rows of ``scores``, a matrix of shape ``(rows, rows)``.

    Pearson's correlation of the ranks, where equals share their mean rank; with a row that is all the same it is 0.
    """
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
