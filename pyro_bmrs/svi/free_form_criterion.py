"""Removal by free-form evidence."""

import math
from dataclasses import dataclass, field
from typing import Any

import torch

from pyro_bmrs.bmr.free_form import GradientSums
from pyro_bmrs.checks import check_integer
from pyro_bmrs.criteria.base import PruningContext, Scores
from pyro_bmrs.criteria.evidence import EvidenceCriterion
from pyro_bmrs.model.guides.flat import FlatGuide
from pyro_bmrs.structures.pair import check_pair
from pyro_bmrs.svi.data.making import source_of
from pyro_bmrs.svi.free_form import curvature, factors_of, gradient_sums
from pyro_bmrs.svi.isolation import local_seed
from pyro_bmrs.svi.training_gradients import TrainingGradients

__all__ = ["FreeFormCriterion"]


@dataclass(frozen=True)
class FreeFormCriterion(EvidenceCriterion):
    r"""Remove where the free-form evidence, with the prior odds, favours absence.

    Marginal evidence is not joint evidence: what may go alone may not go together. Prune in stages, as ``Continuous``
    does, and the posterior of what remains adapts between them.

    Args:
        data: The training data, whatever ``fit`` takes, of which each pruning takes a pass; or ``TrainingGradients`` of
            the guide, which take none.
        pairs: As for ``free_form_evidence``.
        prior_log_odds: As for ``BMRS_N``.
    """

    data: Any = field(repr=False)
    pairs: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.data is None:
            raise TypeError("FreeFormCriterion needs the training data, or TrainingGradients(guide)")
        check_integer("pairs of FreeFormCriterion", self.pairs, low=1, high=10**6)

    def scores(self, context: PruningContext) -> Scores:
        guide: Any = context.guide
        check_pair(context.model, guide)
        self._check_sites(list(guide.sizes))
        sums, num_data = self._sums(context, guide)
        if sums is None:  # before the first step: nothing is known, and nothing goes
            return {site: torch.full((size,), -math.inf, device=guide.device) for site, size in guide.sizes.items()}
        factors = factors_of(guide, sums, num_data)
        return {
            site: factor.delta_f + torch.as_tensor(self.log_odds(site, context)).to(factor.delta_f)
            for site, factor in factors.items()
        }

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
            with local_seed(0, [guide.device]):
                sums = self.data.sums
                return sums and sums + curvature(model, guide, context.x), self.data.examples
        source = source_of(self.data, model, None)
        with local_seed(0, [guide.device]):
            return gradient_sums(model, guide, source, self.pairs), model.num_data or source.size
