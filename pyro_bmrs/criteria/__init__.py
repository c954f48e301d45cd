"""What to remove first: one protocol for evidence, statistics of the posterior, norms, gradients and chance."""

from pyro_bmrs.criteria.base import Criterion, PruningContext
from pyro_bmrs.criteria.evidence import BMRS_N, BMRS_U, EvidenceCriterion
from pyro_bmrs.criteria.ranking import GradientWeightNorm, Random, RankingCriterion, WeightNorm
from pyro_bmrs.criteria.statistics import SNR, PosteriorMean

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
