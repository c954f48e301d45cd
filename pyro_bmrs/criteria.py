"""What to remove first: one protocol for evidence, signal-to-noise, norms, gradients and chance.

Every criterion gives each structure a score, **higher = remove first**. Most have a decision line of their own and
shift the score so that it lies at 0: remove where ``score >= 0``. The others only rank, and remove as much as another
criterion would.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from pyro_bmrs.bmr import evidence_change, precision_window, spike
from pyro_bmrs.distributions import signal_to_noise
from pyro_bmrs.model.guides.flat import FlatGuide
from pyro_bmrs.model.network import NoisyNetwork
from pyro_bmrs.structures.cost import count_parameters
from pyro_bmrs.structures.points import Attachment
from pyro_bmrs.structures.record import Record, positions
from pyro_bmrs.structures.structure_set import StructureSet

__all__ = [
    "BMRS_N",
    "BMRS_U",
    "SNR",
    "Criterion",
    "EvidenceCriterion",
    "GradientWeightNorm",
    "PosteriorMean",
    "PruningContext",
    "Random",
    "RankingCriterion",
    "WeightNorm",
]

Scores = dict[str, Tensor]
_MatchBy = Literal["parameters", "structures"]


@dataclass(frozen=True)
class PruningContext:
    """What a criterion may look at.

    Attributes:
        model: The model, whose masks say what has been removed already.
        guide: Its guide.
        structures: What ``find_structures`` has said of the network, or the noise was attached to.
        x: A batch of training inputs, of shape ``(batch, ...)``.
        y: Their observations.
    """

    model: NoisyNetwork
    guide: FlatGuide
    structures: StructureSet
    x: Tensor
    y: Tensor


class Criterion:
    """A rule for what to remove."""

    def scores(self, context: PruningContext) -> Scores:
        """Return a tensor of shape ``(size,)`` for each site; higher = remove first."""
        raise NotImplementedError

    def supported(self, context: PruningContext, scores: Scores | None = None) -> Scores:
        """Return for each site which of the remaining structures the criterion would remove, as bool tensors.

        A score that is not finite never removes anything.

        Args:
            context: What to judge.
            scores: The criterion's scores of it, if they are known already.
        """
        scores = self.scores(context) if scores is None else scores
        masks = context.model.masks
        return {site: (score >= 0) & score.isfinite() & masks[site] for site, score in scores.items()}


@dataclass(frozen=True)
class EvidenceCriterion(Criterion):
    """Remove where the evidence, with the prior odds, favours a reduced prior; subclasses say which.

    Args:
        prior_log_odds: Log-odds, before seeing data, of a structure being absent: one number, or for each site a number
            or a tensor of shape ``(size,)``, as from ``cost_log_odds``. A decision needs them: evidence compares two
            hypotheses as if they were equally likely.
    """

    prior_log_odds: float | Mapping[str, Tensor | float] = field(default=0.0, kw_only=True)

    def log_odds(self, site: str) -> Tensor | float:
        """Return the prior log-odds of one site's structures."""
        if not isinstance(self.prior_log_odds, Mapping):
            return self.prior_log_odds
        if site not in self.prior_log_odds:
            raise ValueError(f"prior_log_odds has no entry for site {site!r}; it has {list(self.prior_log_odds)}")
        return self.prior_log_odds[site]

    def reduced_prior(self, prior: Any) -> Distribution:
        """Return the prior that would remove structures whose prior is ``prior``."""
        raise NotImplementedError

    @torch.no_grad()
    def scores(self, context: PruningContext) -> Scores:
        priors, scores = context.guide.prior(), {}
        for site, posterior in context.guide.posterior().items():
            delta_f = evidence_change(posterior, priors[site], self.reduced_prior(priors[site]))
            log_odds = torch.as_tensor(self.log_odds(site)).to(delta_f)
            if log_odds.dim() and log_odds.shape != delta_f.shape:
                raise ValueError(
                    f"prior_log_odds of site {site!r} must be a number or of shape {tuple(delta_f.shape)}, but has "
                    f"shape {tuple(log_odds.shape)}"
                )
            scores[site] = delta_f + log_odds
        return scores


@dataclass(frozen=True)
class BMRS_N(EvidenceCriterion):  # noqa: N801  (the paper's name)
    r"""Remove where the evidence favours a spike at the lower bound: :math:`\Delta F` + prior log-odds >= 0 (eq. 8).

    Args:
        scale: Width of the spike, in units of :math:`\log\theta`.
        prior_log_odds: Log-odds, before seeing data, of a structure being absent. 0 is the paper's rule as printed.
            With the exact ELBO a structure that the data does not need returns to its prior, where
            :math:`\Delta F` is about -0.04 to -0.7 and never positive by much: ``math.log(3)`` removes whatever lacks
            positive evidence on Kass and Raftery's scale. ``0.5 * math.log(2 * math.pi)`` is what the paper's
            reference code computes.
    """

    scale: float = 1e-6

    def reduced_prior(self, prior: Any) -> Distribution:
        return spike(prior, self.scale)


@dataclass(frozen=True)
class BMRS_U(EvidenceCriterion):  # noqa: N801  (the paper's name)
    r"""Remove where the evidence favours noise too small for the arithmetic: :math:`[2^{-p_2}, 2^{-p_1}]` (eq. 10).

    Args:
        p1: Bits that the noise must reach to matter; the paper uses 8 and 4.
        p2: Bits below which nothing is representable. None reaches down to the prior's own bound; the paper's 23 (the
            mantissa of float32) keeps structures that collapsed below it, whose mass counts as outside the window.
        prior_log_odds: As for ``BMRS_N``.
    """

    p1: float = 8
    p2: float | None = None

    def reduced_prior(self, prior: Any) -> Distribution:
        return precision_window(prior, self.p1, self.p2)


@dataclass(frozen=True)
class _ThresholdCriterion(Criterion):
    """Remove where a positive statistic of the posterior is at most ``threshold``."""

    threshold: float

    def statistic(self, posterior: Any) -> Tensor:
        raise NotImplementedError

    @torch.no_grad()
    def scores(self, context: PruningContext) -> Scores:
        return {
            site: math.log(self.threshold) - torch.log(self.statistic(posterior))
            for site, posterior in context.guide.posterior().items()
        }


@dataclass(frozen=True)
class SNR(_ThresholdCriterion):
    """Remove where the posterior's mean over standard deviation is at most ``threshold`` (Neklyudov et al., 2017)."""

    threshold: float = 1.0

    def statistic(self, posterior: Any) -> Tensor:
        return signal_to_noise(posterior)


@dataclass(frozen=True)
class PosteriorMean(_ThresholdCriterion):
    """Remove where the posterior mean of the noise is at most ``threshold``."""

    threshold: float = 0.1

    def statistic(self, posterior: Any) -> Tensor:
        return posterior.mean


@dataclass(frozen=True)
class RankingCriterion(Criterion):
    """A criterion without a decision line: it removes as much as ``match`` would.

    Args:
        match: The criterion whose compression is matched.
        match_by: What is counted. ``"parameters"``: remove the fewest highest-scoring structures that leave no more
            parameters than ``match`` would. ``"structures"``: remove as many as ``match`` would, however small, as the
            paper's reference code does.

    Raises:
        ValueError: If ``match_by`` is neither.
    """

    match: Criterion = BMRS_N()
    match_by: _MatchBy = field(default="parameters", kw_only=True)

    def __post_init__(self) -> None:
        if self.match_by not in get_args(_MatchBy):
            raise ValueError(f"match_by must be one of {get_args(_MatchBy)}, but got {self.match_by!r}")

    def supported(self, context: PruningContext, scores: Scores | None = None) -> Scores:
        """Return for each site which of the remaining structures go: the highest-scoring, as many as match."""
        matched = self.match.supported(context)
        flat_keep = torch.cat(list(context.model.masks.values()))
        scores = self.scores(context) if scores is None else scores
        flat = torch.cat(list(scores.values())).masked_fill(~flat_keep, -math.inf)
        order = flat.nan_to_num(nan=-math.inf).argsort(descending=True)

        def first(count: int) -> Scores:
            chosen = torch.zeros_like(flat_keep)
            chosen[order[:count]] = True
            return context.guide.split(chosen)

        if self.match_by == "structures":
            return first(sum(int(removed.sum()) for removed in matched.values()))
        target = _parameters_without(context, matched)
        low, high = 0, int(flat_keep.sum())
        while low < high:
            middle = (low + high) // 2
            if _parameters_without(context, first(middle)) <= target:
                high = middle
            else:
                low = middle + 1
        return first(low)


def _parameters_without(context: PruningContext, removed: Scores) -> int:
    masks = {site: keep & ~removed[site] for site, keep in context.model.masks.items()}
    return count_parameters(context.model.net, context.structures, masks)


@dataclass(frozen=True)
class WeightNorm(RankingCriterion):
    """Rank by the L2 norm of a structure's incoming weights, smallest first."""

    @torch.no_grad()
    def scores(self, context: PruningContext) -> Scores:
        weights = dict(_own_network(context.model.net).named_parameters())
        record = context.structures.record
        return {site: -_incoming_norm(record, site, weights) for site in context.guide.sizes}


@dataclass(frozen=True)
class GradientWeightNorm(RankingCriterion):
    """Rank by the norm of the loss's gradient in a structure's incoming weights times their norm, smallest first."""

    def scores(self, context: PruningContext) -> Scores:
        model = context.model
        weights = {name: p for name, p in _own_network(model.net).named_parameters() if p.requires_grad}
        means = {site: mean.detach() for site, mean in context.guide.mean().items()}
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
    """Rank by chance, the same at every pruning.

    Args:
        seed: Seed of the ranking.
    """

    seed: int = 0

    def scores(self, context: PruningContext) -> Scores:
        generator = torch.Generator().manual_seed(self.seed)
        return {
            site: torch.rand(size, generator=generator).to(context.guide.device)
            for site, size in context.guide.sizes.items()
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
