"""Criteria by the change of evidence under a prior that would remove a structure: the paper's two."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution

from pyro_bmrs.bmr import UnreliableEvidenceWarning, evidence_change, precision_window, spike
from pyro_bmrs.checks import check_number, described
from pyro_bmrs.criteria.base import Criterion, PruningContext, Scores
from pyro_bmrs.distributions import TruncatedLogNormal
from pyro_bmrs.warn import warn

__all__ = ["BMRS_N", "BMRS_U", "LACKING_EVIDENCE", "EvidenceCriterion"]

LACKING_EVIDENCE = math.log(3)
"""Prior log-odds that remove what lacks positive evidence on Kass and Raftery's scale; those of a fit by default."""

_FAR = 3.0  # standard deviations: one part in a hundred of the density at the location


@dataclass(frozen=True)
class EvidenceCriterion(Criterion):
    r"""Remove where the evidence, with the prior odds, favours a reduced prior; subclasses say which.

    Scores are :math:`\Delta F` + log-odds, in nats. With a weight :math:`\lambda` of the KL, :math:`\Delta F` estimates
    the change of the ELBO divided by :math:`\lambda`.

    Each structure is judged alone. Layers one behind the other whose channels are one group share one noise, and are
    one structure. Where several layers write one sum, each with noise of its own, what one of them may lose depends on
    the others: judge the sum of their :math:`\Delta F`.

    Args:
        prior_log_odds: Log-odds, before seeing data, of a structure being absent: one number, or for each site a number
            or a tensor of shape ``(size,)`` in the numbering of the original network, as from ``cost_log_odds``. A
            decision needs them: evidence compares two hypotheses as if they were equally likely.

    Raises:
        TypeError, ValueError: If log-odds are no finite numbers, or (when asked) not those of the model's sites.

    Example:
        >>> class HalfAsWide(bmrs.EvidenceCriterion):
        ...     def reduced_prior(self, prior):
        ...         return bmrs.LogUniform(prior.log_low, prior.log_high - 10.0)
        >>> HalfAsWide(prior_log_odds=1.0).reduced_prior(bmrs.LogUniform(-20.0, 0.0)).log_high
        tensor(-10.)
    """

    prior_log_odds: float | Mapping[str, Tensor | float] = field(default=0.0, kw_only=True)

    def __post_init__(self) -> None:
        by_site = isinstance(self.prior_log_odds, Mapping)
        odds = dict(self.prior_log_odds) if isinstance(self.prior_log_odds, Mapping) else {"": self.prior_log_odds}
        for site, each in odds.items():
            name = f"prior_log_odds of site {site!r}" if by_site else "prior_log_odds"
            if not (by_site and isinstance(each, Tensor)):
                check_number(name, each, positive=False)
            elif each.is_complex() or each.dtype == torch.bool or not bool(torch.isfinite(each).all()):
                raise ValueError(f"{name} must be finite numbers, but {described(each)} has others")

    def _check_sites(self, known: list[str]) -> None:
        if not isinstance(self.prior_log_odds, Mapping):
            return
        named = list(self.prior_log_odds)
        for site in known:
            if site not in named:
                raise ValueError(f"prior_log_odds has no entry for site {site!r}; it has {named}")
        for site in named:
            if site not in known:
                raise ValueError(f"prior_log_odds names {site!r}, but the model's sites are {known}")

    def log_odds(self, site: str, context: PruningContext) -> Tensor | float:
        """Return the prior log-odds of the structures of one site that are physically there."""
        if not isinstance(self.prior_log_odds, Mapping):
            return self.prior_log_odds
        odds, layer = self.prior_log_odds[site], context.guide.noise[site]
        if not isinstance(odds, Tensor) or odds.dim() == 0:
            return odds
        if odds.shape == (layer.original_size,):
            return odds[layer.index.to(odds.device)]
        if odds.shape == (layer.size,):
            return odds
        raise ValueError(
            f"prior_log_odds of site {site!r} must be a number or of shape ({layer.original_size},), but has shape "
            f"{tuple(odds.shape)}"
        )

    def reduced_prior(self, prior: Any) -> Distribution:
        """Return the prior that would remove structures whose prior is ``prior``."""
        raise NotImplementedError

    @torch.no_grad()
    def scores(self, context: PruningContext) -> Scores:
        self._check_sites(list(context.guide.sizes))
        priors, scores = context.guide.prior(), {}
        for site, posterior in context.guide.posterior().items():
            delta_f = evidence_change(posterior, priors[site], self.reduced_prior(priors[site]))
            scores[site] = delta_f + torch.as_tensor(self.log_odds(site, context)).to(delta_f)
        return scores


@dataclass(frozen=True)
class BMRS_N(EvidenceCriterion):  # noqa: N801  (the paper's name)
    r"""Remove where the evidence favours a spike at the lower bound: :math:`\Delta F` + prior log-odds >= 0 (eq. 8).

    The formula is exact, the posterior's family is not: a truncated log-normal falls towards zero as the exact
    posterior does not. What BMRS_N removes is safe to remove, and with log-odds of log 3 it decides as exact evidence
    does in 95 % of cases (``python -m analysis.evidence_check``). For structures that are needed its size is no
    evidence in nats (-166 where it is -1.3), and their order is not to be read: ``free_form_evidence`` has both.

    Args:
        scale: Width of the spike, in units of :math:`\log\theta`.
        prior_log_odds: Log-odds, before seeing data, of a structure being absent. 0 is the paper's rule as printed.
            With the exact ELBO a structure that the data does not need returns to its prior, where
            :math:`\Delta F` is about -0.04 to -0.7 and never positive by much, so that 0 keeps most of them:
            ``math.log(3)`` removes whatever lacks positive evidence on Kass and Raftery's scale.
            ``0.5 * math.log(2 * math.pi)`` is what the paper's reference code computes.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), bmrs.MultiplicativeNoise(8), nn.Linear(8, 3))
        >>> model = bmrs.NoisyNetwork(net)
        >>> guide = bmrs.TruncatedLogNormalGuide(model)
        >>> data = torch.randn(32, 4), torch.arange(32) % 3
        >>> few = {"epochs": 2, "fine_tune_epochs": 1, "kl_warmup_epochs": 0, "progress": False}
        >>> result = bmrs.fit(model, guide, data, criterion=bmrs.BMRS_N(prior_log_odds=1.1), **few)
        >>> result.scores["2.theta"].shape
        torch.Size([8])
    """

    scale: float = field(default=1e-6, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("scale of BMRS_N", self.scale)

    def reduced_prior(self, prior: Any) -> Distribution:
        if isinstance(prior, TruncatedLogNormal):
            _warn_of_far_bound(prior)
        return spike(prior, self.scale)


def _warn_of_far_bound(prior: TruncatedLogNormal) -> None:
    """Warn where a prior has next to no density at its lower bound, of which the spike asks."""
    distance = (prior.loc - prior.log_low) / prior.scale
    if bool((distance > _FAR).any()):
        warn(
            f"the lower bound of a truncated log-normal prior is {float(distance.max()):.3g} standard deviations below "
            "its location, where it has next to no density: BMRS_N, which compares posterior and prior there, means "
            "nothing, in either direction; use BMRS_U or free-form evidence, or a wider prior",
            UnreliableEvidenceWarning,
        )


@dataclass(frozen=True)
class BMRS_U(EvidenceCriterion):  # noqa: N801  (the paper's name)
    r"""Remove where the evidence favours noise too small for the arithmetic: :math:`[2^{-p_2}, 2^{-p_1}]` (eq. 10).

    Args:
        p1: Bits that the noise must reach to matter; the paper uses 8 and 4.
        p2: Bits below which nothing is representable. None reaches down to the prior's own bound; the paper's 23 (the
            mantissa of float32) keeps structures that collapsed below it, whose mass counts as outside the window.
        prior_log_odds: As for ``BMRS_N``.

    Example:
        >>> prior = bmrs.LogUniform(-20.0, 0.0)
        >>> window = bmrs.BMRS_U(8).reduced_prior(prior)
        >>> window.log_low, round(window.log_high.item(), 3)
        (tensor(-20.), -5.545)
    """

    p1: float = 8
    p2: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("p1 of BMRS_U", self.p1, positive=False)
        if self.p2 is not None and not check_number("p2 of BMRS_U", self.p2, positive=False) > self.p1:
            raise ValueError(
                f"p2 of BMRS_U must be above p1={self.p1}, but got {self.p2}: the window reaches from 2^-p2 to 2^-p1"
            )

    def reduced_prior(self, prior: Any) -> Distribution:
        return precision_window(prior, self.p1, self.p2)
