"""Criteria without a decision line, which only rank: norms, gradients, chance."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor, nn

from pyro_bmrs.checks import check_seed, described
from pyro_bmrs.criteria.base import Criterion, PruningContext, Scores
from pyro_bmrs.criteria.evidence import BMRS_N, LACKING_EVIDENCE
from pyro_bmrs.structures.cost import count_parameters
from pyro_bmrs.structures.points import Attachment
from pyro_bmrs.structures.record import Record, positions

__all__ = ["GradientWeightNorm", "Random", "RankingCriterion", "WeightNorm"]

_MatchBy = Literal["parameters", "structures"]


@dataclass(frozen=True)
class RankingCriterion(Criterion):
    """A criterion without a decision line: it removes as much as ``match`` would.

    What ``match`` would remove is counted in the whole network: a structure that has been removed although ``match``
    would keep it counts as kept there, so that asking again and again does not add up. That holds for a ``match`` that
    reads posteriors; one that looks at data finds that what has been removed is not needed.

    Args:
        match: The criterion whose compression is matched; by default that of a fit.
        match_by: What is counted. ``"parameters"``: remove the fewest highest-scoring structures that leave no more
            parameters than ``match`` would. ``"structures"``: remove as many as ``match`` would, however small, as the
            paper's reference code does.

    Raises:
        TypeError: If ``match`` is no criterion with a decision line.
        ValueError: If ``match_by`` is neither.
    """

    has_line: ClassVar[bool] = False
    match: Criterion = field(default_factory=lambda: BMRS_N(prior_log_odds=LACKING_EVIDENCE))
    match_by: _MatchBy = field(default="parameters", kw_only=True)

    def __post_init__(self) -> None:
        if not isinstance(self.match, Criterion):
            raise TypeError(f"match must be a Criterion, for instance BMRS_N(), but got {described(self.match)}")
        if not self.match.has_line:
            raise TypeError(f"match must have a decision line of its own, but {type(self.match).__name__} only ranks")
        if self.match_by not in get_args(_MatchBy):
            raise ValueError(f"match_by must be one of {get_args(_MatchBy)}, but got {self.match_by!r}")

    def removable(self, context: PruningContext, scores: Scores | None = None) -> Scores:
        """Return for each site which of the remaining structures go: the highest-scoring, as many as match."""
        matched = self._matched(context)
        flat_keep = context.guide.keep
        scores = self.scores(context) if scores is None else scores
        flat = context.guide.join(scores).masked_fill(~flat_keep, -math.inf)
        order = flat.nan_to_num(nan=-math.inf).argsort(descending=True)

        def first(count: int) -> Scores:
            chosen = torch.zeros_like(flat_keep)
            chosen[order[:count]] = True
            return context.guide.split(chosen)

        if self.match_by == "structures":
            count = sum(int(removed.sum()) for removed in matched.values()) - int((~flat_keep).sum())
            return first(max(count, 0))
        target = _parameters(context, {site: ~removed for site, removed in matched.items()})
        low, high = 0, int(flat_keep.sum())
        while low < high:
            middle = (low + high) // 2
            if _parameters_without(context, first(middle)) <= target:
                high = middle
            else:
                low = middle + 1
        return first(low)

    def _matched(self, context: PruningContext) -> Scores:
        """Return what ``match`` would remove, whether it has been removed or not."""
        scores = self.match.scores(context)
        removable = self.match.removable(context, scores)
        return {
            site: removable[site] | (scores[site].isfinite() & (scores[site] >= 0) & ~keep)
            for site, keep in context.model.masks.items()
        }


def _parameters(context: PruningContext, masks: Scores) -> int:
    return count_parameters(context.model.net, context.structures, masks)


def _parameters_without(context: PruningContext, removed: Scores) -> int:
    return _parameters(context, {site: keep & ~removed[site] for site, keep in context.model.masks.items()})


@dataclass(frozen=True)
class WeightNorm(RankingCriterion):
    """Rank by the L2 norm of a structure's incoming weights, smallest first.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), bmrs.MultiplicativeNoise(8), nn.Linear(8, 3))
        >>> model = bmrs.NoisyNetwork(net)
        >>> guide = bmrs.TruncatedLogNormalGuide(model)
        >>> x = torch.randn(5, 4)
        >>> context = bmrs.PruningContext(model, guide, bmrs.find_structures(net, x), x, torch.arange(5) % 3)
        >>> bmrs.WeightNorm(match=bmrs.SNR(1.0)).scores(context)["2.theta"].shape
        torch.Size([8])
    """

    @torch.no_grad()
    def scores(self, context: PruningContext) -> Scores:
        weights = dict(_own_network(context.model.net).named_parameters())
        record = context.structures.record
        return {site: -_incoming_norm(record, site, weights) for site in context.guide.sizes}


@dataclass(frozen=True)
class GradientWeightNorm(RankingCriterion):
    """Rank by the norm of the loss's gradient in a structure's incoming weights times their norm, smallest first.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), bmrs.MultiplicativeNoise(8), nn.Linear(8, 3))
        >>> model = bmrs.NoisyNetwork(net)
        >>> guide = bmrs.TruncatedLogNormalGuide(model)
        >>> x = torch.randn(5, 4)
        >>> context = bmrs.PruningContext(model, guide, bmrs.find_structures(net, x), x, torch.arange(5) % 3)
        >>> bmrs.GradientWeightNorm(match_by="structures").scores(context)["2.theta"].shape
        torch.Size([8])
    """

    def scores(self, context: PruningContext) -> Scores:
        model = context.model
        weights = {name: p for name, p in _own_network(model.net).named_parameters() if p.requires_grad}
        means = {site: mean.detach() for site, mean in context.guide.points().items()}
        with torch.enable_grad():
            loss = -model.likelihood(model.run(context.x, means)).log_prob(context.y).mean()
        gradients = torch.autograd.grad(loss, list(weights.values()), allow_unused=True, materialize_grads=True)
        by_name = dict(zip(weights, gradients, strict=True))
        with torch.no_grad():
            record = context.structures.record
            return {
                site: -_incoming_norm(record, site, weights) * _incoming_norm(record, site, by_name)
                for site in context.guide.sizes
            }


@dataclass(frozen=True)
class Random(RankingCriterion):
    """Rank by chance, each structure the same at every pruning.

    Args:
        seed: Seed of the ranking.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), bmrs.MultiplicativeNoise(8), nn.Linear(8, 3))
        >>> model = bmrs.NoisyNetwork(net)
        >>> guide = bmrs.TruncatedLogNormalGuide(model)
        >>> x = torch.randn(5, 4)
        >>> context = bmrs.PruningContext(model, guide, bmrs.find_structures(net, x), x, torch.arange(5) % 3)
        >>> first, again = (bmrs.Random(seed=1).scores(context)["2.theta"] for _ in range(2))
        >>> torch.equal(first, again)
        True
    """

    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_seed("seed of Random", self.seed)

    def scores(self, context: PruningContext) -> Scores:
        generator = torch.Generator().manual_seed(self.seed)
        ranks = {
            site: torch.rand(layer.original_size, generator=generator) for site, layer in context.model.noise.items()
        }
        return {
            site: ranks[site][layer.index.cpu()].to(context.guide.device) for site, layer in context.model.noise.items()
        }


def _own_network(net: nn.Module) -> nn.Module:
    """Return the network that a record is of."""
    return net.net if isinstance(net, Attachment) else net


def _incoming_norm(record: Record, site: str, tensors: Mapping[str, Tensor]) -> Tensor:
    """Return the L2 norm of the weights that produce each structure, normalisation layers left out."""
    classes = record.sites[site].before
    device = next(iter(tensors.values())).device
    squares = torch.zeros(len(classes), device=device)
    found = False
    for slot, axis in record.slots.items():
        weight = tensors.get(slot[0])
        if weight is None or weight.dim() < 2 or slot in record.reading:
            continue
        index = positions(classes, axis).to(device)
        if bool((index >= 0).any()):
            found = True
            each = weight.detach().movedim(slot[1], 0).flatten(1).square().sum(1).to(squares)
            squares = squares.index_add(0, index[index >= 0], each[index >= 0])
    if not found:
        raise ValueError(f"the structures of {site!r} have no incoming weights to take a norm of")
    return squares.sqrt()
