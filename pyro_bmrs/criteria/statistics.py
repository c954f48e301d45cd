"""Criteria by a statistic of the posterior against a threshold: signal-to-noise ratio, mean."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyro_bmrs.checks import check_number
from pyro_bmrs.criteria.base import Criterion, PruningContext, Scores
from pyro_bmrs.distributions import signal_to_noise

__all__ = ["SNR", "PosteriorMean"]


@dataclass(frozen=True)
class _ThresholdCriterion(Criterion):
    """Remove where a positive statistic of the posterior is at most ``threshold``."""

    threshold: float

    def __post_init__(self) -> None:
        check_number(f"threshold of {type(self).__name__}", self.threshold)

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
    """Remove where the posterior's mean over standard deviation is at most ``threshold`` (Neklyudov et al., 2017).

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), bmrs.MultiplicativeNoise(8), nn.Linear(8, 3))
        >>> model = bmrs.NoisyNetwork(net)
        >>> guide = bmrs.TruncatedLogNormalGuide(model)
        >>> x = torch.randn(5, 4)
        >>> context = bmrs.PruningContext(model, guide, bmrs.find_structures(net, x), x, torch.arange(5) % 3)
        >>> bmrs.SNR(1.0).removable(context)["2.theta"].any()
        tensor(False)
    """

    threshold: float = 1.0

    def statistic(self, posterior: Any) -> Tensor:
        return signal_to_noise(posterior)


@dataclass(frozen=True)
class PosteriorMean(_ThresholdCriterion):
    """Remove where the posterior mean of the noise is at most ``threshold``.

    Example:
        >>> bmrs.PosteriorMean(0.1)
        PosteriorMean(threshold=0.1)
    """

    threshold: float = 0.1

    def statistic(self, posterior: Any) -> Tensor:
        return posterior.mean
