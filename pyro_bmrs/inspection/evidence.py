"""The evidence of every structure."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution

from pyro_bmrs.bmr import evidence_change, spike
from pyro_bmrs.checks import check_function
from pyro_bmrs.structures.any_guide import known_posterior

__all__ = ["evidence_changes"]


@torch.no_grad()
def evidence_changes(guide: Any, reduced_prior: Callable[[Any], Distribution] = spike) -> dict[str, Tensor]:
    r"""Return :math:`\Delta F` of every structure, in nats, by site; >= 0 favours removal.

    With BMRS_N's reduced prior, how negative it is of a structure that is needed says nothing in nats, see ``BMRS_N``;
    ``free_form_evidence`` does. Of shape ``(size,)``, in the numbering of the original network. A structure that has
    been cut out by shrinking has no posterior left to judge, and NaN here; ``FitResult.scores`` holds the last score of
    it.

    Args:
        guide: The fitted guide, if it knows its model; of any other ``noise_posterior(model, guide, ...)``.
        reduced_prior: From a site's prior to the prior that would remove its structures; ``spike`` is BMRS_N's.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), bmrs.MultiplicativeNoise(8), nn.Linear(8, 3))
        >>> model = bmrs.NoisyNetwork(net)
        >>> guide = bmrs.TruncatedLogNormalGuide(model)
        >>> bmrs.evidence_changes(guide)["2.theta"].shape
        torch.Size([8])
    """
    check_function("reduced_prior", reduced_prior, "of a prior, as spike is")
    guide = known_posterior(guide)
    priors, layers = guide.prior(), guide.noise
    return {
        site: layers[site].in_original(evidence_change(posterior, priors[site], reduced_prior(priors[site])), math.nan)
        for site, posterior in guide.posterior().items()
    }
