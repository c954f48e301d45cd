"""Removal by free-form evidence."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pyro_bmrs.bmr.free_form import GradientSums
from pyro_bmrs.checks import check_integer
from pyro_bmrs.criteria.base import PruningContext, Scores
from pyro_bmrs.criteria.evidence import EvidenceCriterion
from pyro_bmrs.model.guides.flat import FlatGuide
from pyro_bmrs.model.network import NoisyNetwork
from pyro_bmrs.randomness import local_seed
from pyro_bmrs.structures.pair import check_pair
from pyro_bmrs.svi.data.making import source_of
from pyro_bmrs.svi.free_form import curvature, factors_of, gradient_sums
from pyro_bmrs.svi.training_gradients import TrainingGradients

__all__ = ["FreeFormCriterion"]


@dataclass(frozen=True)
class FreeFormCriterion(EvidenceCriterion):
    r"""Remove where the free-form evidence, with the prior odds, favours absence.

    Marginal evidence is not joint evidence: what may go alone may not go together. Prune again and again, as
    ``Continuous`` does, and the posterior of what remains adapts in between. ``stages`` judges jointly within one
    pruning: by the chain rule the evidence of removing a set is the sum over its members, each judged with those before
    it gone.

    Args:
        data: The training data, whatever ``fit`` takes, of which each pruning takes a pass; or ``TrainingGradients`` of
            the guide, which take none.
        pairs: As for ``free_form_evidence``.
        stages: Number of portions, the surest first, in which what may go is removed; after each the others are judged
            anew, by a pass over the data. 1 judges every structure alone.
        prior_log_odds: As for ``BMRS_N``.

    Raises:
        TypeError: If ``data`` is None, or a number of another type.
        ValueError: If a number is less than 1, or ``stages`` are to be judged by ``TrainingGradients``.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), bmrs.MultiplicativeNoise(8), nn.Linear(8, 3))
        >>> model = bmrs.NoisyNetwork(net)
        >>> guide = bmrs.TruncatedLogNormalGuide(model)
        >>> data = torch.randn(32, 4), torch.arange(32) % 3
        >>> few = {"epochs": 2, "fine_tune_epochs": 1, "kl_warmup_epochs": 0, "progress": False}
        >>> result = bmrs.fit(model, guide, data, criterion=bmrs.FreeFormCriterion(data), **few)
        >>> result.scores["2.theta"].shape
        torch.Size([8])
    """

    data: Any = field(repr=False)
    pairs: int = 1
    stages: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.data is None:
            raise TypeError("FreeFormCriterion needs the training data, or TrainingGradients(guide)")
        check_integer("pairs of FreeFormCriterion", self.pairs, low=1, high=10**6)
        check_integer("stages of FreeFormCriterion", self.stages, low=1, high=10**6)
        if self.stages > 1 and isinstance(self.data, TrainingGradients):
            raise ValueError(
                f"stages of FreeFormCriterion must be 1 with TrainingGradients, but got {self.stages}: what training "
                "has seen is not of a network without some structures; give it the data"
            )

    def scores(self, context: PruningContext) -> Scores:
        guide: Any = context.guide
        check_pair(context.model, guide)
        self._check_sites(list(guide.sizes))
        alone = self._judged(context, guide)
        if self.stages == 1:
            return guide.split(alone)
        order = alone.masked_fill(~guide.keep, -math.inf).argsort(descending=True, stable=True)
        portions = order[: int(((alone >= 0) & guide.keep).sum())].chunk(self.stages)
        scores = alone.clone()
        for i in range(1, len(portions)):
            absent = torch.zeros_like(guide.keep)
            absent[torch.cat([each[scores[each] >= 0] for each in portions[:i]])] = True
            with _without(context.model, guide.split(absent)):
                scores[portions[i]] = self._judged(context, guide)[portions[i]]
        return guide.split(scores)

    def _judged(self, context: PruningContext, guide: FlatGuide) -> Tensor:
        """Return the scores of all structures, flat, each judged alone."""
        sums, num_data = self._sums(context, guide)
        if sums is None:  # before the first step: nothing is known, and nothing goes
            return torch.full((sum(guide.sizes.values()),), -math.inf, device=guide.device)
        factors = factors_of(guide, sums, num_data)
        return torch.cat(
            [
                factor.delta_f + torch.as_tensor(self.log_odds(site, context)).to(factor.delta_f)
                for site, factor in factors.items()
            ]
        )

    def __deepcopy__(self, memo: Any) -> "FreeFormCriterion":
        return self  # it has no state, and its data may be large

    def _sums(self, context: PruningContext, guide: FlatGuide) -> tuple[GradientSums | None, int]:
        """Return the sums of gradients, and the number of examples that the likelihood counts."""
        model = context.model
        if isinstance(self.data, TrainingGradients):
            if self.data.guide is not guide:
                raise ValueError("the TrainingGradients of FreeFormCriterion are of another guide than is fitted")
            if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
                raise ValueError("TrainingGradients are of one process alone: give FreeFormCriterion the data")
            with local_seed(0, [guide.device], validate=False):
                sums = self.data.sums
                return sums and sums + curvature(model, guide, context.x), self.data.examples
        source = source_of(self.data, model, None)
        with local_seed(0, [guide.device], validate=False):
            return gradient_sums(model, guide, source, self.pairs), model.num_data or source.size


@contextmanager
def _without(model: NoisyNetwork, removed: dict[str, Tensor]) -> Iterator[None]:
    """Remove structures for a while."""
    before = {site: layer.keep.clone() for site, layer in model.noise.items()}
    try:
        for site, layer in model.noise.items():
            layer.remove(removed[site])
        yield
    finally:
        for site, layer in model.noise.items():
            layer.keep.copy_(before[site])
