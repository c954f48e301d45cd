"""The evidence change from draws of the posterior, for distributions that have no closed form, and how far to trust it.

The weights are the raw ones: their mean has no bias, and its standard error is its own. Smoothing the largest
(Vehtari et al., 2024) halves the error where k-hat is 0.6 to 0.7, changes nothing below 0.5, and pulls the estimate
down. So ArviZ is asked only for k-hat, which says whether the mean of the weights can be trusted at all.
"""

import math
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from pyro.distributions import Delta, Empirical
from torch import Tensor
from torch.distributions import Distribution

from pyro_bmrs.bmr.registry import check_distributions, register_evidence_change
from pyro_bmrs.checks import check_integer, check_seed
from pyro_bmrs.randomness import local_seed
from pyro_bmrs.warn import warn

__all__ = [
    "PARETO_K_LIMIT",
    "SampledEvidenceChange",
    "UnreliableEvidenceWarning",
    "estimate_evidence_change",
]

PARETO_K_LIMIT = 0.7
_SMALLEST_TAIL = 5  # draws; ArviZ fits none to fewer
_ZERO_WEIGHT = 700.0  # nats below the largest weight
_LEVEL_TAIL = 1e-3  # nats


class UnreliableEvidenceWarning(UserWarning):
    """A sampled evidence change whose Pareto k-hat says that its standard error cannot be trusted."""


@dataclass(frozen=True)
class SampledEvidenceChange:
    r"""Estimate of :math:`\Delta F` from draws.

    Attributes:
        estimate: :math:`\Delta F` in nats, of shape ``batch_shape``; >= 0 favours the reduced prior.
        standard_error: Its standard error in nats, of shape ``batch_shape``.
        pareto_k: Pareto k-hat of the weights, of shape ``batch_shape``: above 0.7 neither estimate nor standard error
            is to be trusted; -inf if the largest weights are all the same, inf if fewer than five are not zero.
        num_samples: Number of draws.
    """

    estimate: Tensor
    standard_error: Tensor
    pareto_k: Tensor
    num_samples: int

    @property
    def reliable(self) -> Tensor:
        """Whether ``pareto_k`` is at most 0.7, of shape ``batch_shape``, bool."""
        return self.pareto_k <= PARETO_K_LIMIT


def estimate_evidence_change(
    posterior: Distribution,
    prior: Distribution,
    reduced_prior: Distribution,
    num_samples: int = 4000,
    seed: int | None = None,
) -> SampledEvidenceChange:
    r"""Estimate ``evidence_change`` from draws of the posterior.

    .. math:: \Delta F \approx \log \frac{1}{S} \sum_{s=1}^S \frac{\tilde p(\theta_s)}{p(\theta_s)}, \quad
        \theta_s \sim q

    Its standard error is that of the mean of the weights, relative to the mean (the delta method). Where the reduced
    prior is narrow against the posterior, or far from it, a few draws carry all the weight: the Pareto k-hat of the
    weights tells, and above 0.7 a warning follows. It judges the draws there are: mass of the reduced prior that none
    of them meets is invisible to it. A closed form is always better.

    Args:
        posterior: :math:`q(\theta)`, anything with ``sample``, ``log_prob`` and ``expand``.
        prior: :math:`p(\theta)`, whose support covers the posterior's.
        reduced_prior: :math:`\tilde p(\theta)`; outside its support it is zero.
        num_samples: Number of draws :math:`S`, at least 25; the limit 0.7 on k-hat is meant for 2200 or more.
        seed: Seed of the draws, which then leave the global random state alone; None draws from it.

    Returns:
        The estimate and its reliability, each of the three distributions' broadcast ``batch_shape``. The densities
        have the distributions' dtype; what is made of them is computed in float64, in the draws' dtype.

    Raises:
        TypeError: If an argument is of another type.
        NotImplementedError: If the posterior is a point mass.
        ValueError: If there are too few draws, shapes do not fit, or draws lie outside the prior's support.

    Warns:
        UnreliableEvidenceWarning: If any k-hat is above 0.7.

    References:
        Pareto Smoothed Importance Sampling (Vehtari et al., 2024)
        https://arxiv.org/abs/1507.02646

    Example:
        >>> q, p, reduced = (torch.distributions.Normal(0.0, scale) for scale in (0.5, 2.0, 1.0))
        >>> result = estimate_evidence_change(q, p, reduced, seed=0)
        >>> exact = 0.5 * math.log(4 / 4.75 / 0.25)
        >>> bool((result.estimate - exact).abs() < 3 * result.standard_error)
        True
    """
    if check_integer("num_samples", num_samples, high=10**8) < 5 * _SMALLEST_TAIL:
        raise ValueError(f"num_samples must be at least {5 * _SMALLEST_TAIL}, but got {num_samples}; 4000 is usual")
    if seed is not None:
        check_seed("seed", seed)
    shape = check_distributions(posterior, prior, reduced_prior)
    with torch.no_grad(), nullcontext() if seed is None else local_seed(seed):
        draws = posterior.expand(shape).sample((num_samples,))
        rows = _log_weights(draws, prior, reduced_prior).double().movedim(0, -1).reshape(-1, num_samples)
    dtype = draws.dtype if draws.is_floating_point() else torch.get_default_dtype()
    estimate, standard_error, k = (each.reshape(shape).to(dtype) for each in (*_log_mean(rows), _pareto_k(rows)))
    result = SampledEvidenceChange(estimate, standard_error, k, num_samples)
    _warn_where_unreliable(result)
    return result


@register_evidence_change(Empirical, Distribution, Distribution)
@torch.no_grad()
def _evidence_change_of_draws(q: Empirical, p: Distribution, reduced: Distribution) -> Tensor:
    """Return the estimate from the draws that the posterior is known by, with a warning where it is none."""
    if isinstance(reduced, Delta):
        raise NotImplementedError(
            "a posterior that is known by its draws has no density at a point: give the reduced prior some width"
        )
    shape = check_distributions(q, p, reduced)
    draws = q.enumerate_support().movedim(len(q.batch_shape), 0).expand(-1, *shape)
    rows = _log_weights(draws, p, reduced).double().movedim(0, -1).reshape(-1, len(draws))
    estimate, standard_error, k = (each.reshape(shape).to(draws) for each in (*_log_mean(rows), _pareto_k(rows)))
    _warn_where_unreliable(SampledEvidenceChange(estimate, standard_error, k, len(draws)))
    return estimate


def _log_weights(draws: Tensor, prior: Any, reduced_prior: Any) -> Tensor:
    """Return the log density ratio at draws of shape ``(samples, *batch_shape, *event_shape)``."""
    outside = ~prior.support.check(draws)
    if bool(outside.any()):
        raise ValueError(
            f"{int(outside.sum())} of {outside.numel()} draws of the posterior lie outside the "
            f"support of the {type(prior).__name__} prior, where no posterior can have mass; give both one support"
        )
    inside = reduced_prior.support.check(draws)
    mask = inside.reshape(inside.shape + (1,) * len(reduced_prior.event_shape))
    legal = torch.where(mask, draws, reduced_prior.sample())  # log_prob refuses, or misjudges, what lies outside
    reduced = torch.where(inside, reduced_prior.log_prob(legal), -torch.inf)
    return reduced.double() - prior.log_prob(draws).double()


def _log_mean(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return the log of the mean weight of each row, and its standard error."""
    top = rows.amax(-1)
    weights = torch.exp(rows - torch.where(top == -torch.inf, 0.0, top).unsqueeze(-1))
    mean = weights.mean(-1)
    relative_error = weights.std(-1) / mean / math.sqrt(rows.shape[-1])
    return top + torch.log(mean), torch.where(mean == 0, torch.inf, relative_error)


def _pareto_k(rows: Tensor) -> Tensor:
    """Return each row's k-hat; ArviZ is imported only for rows whose largest weights have a tail to fit.

    Between a log-uniform prior and a window of it, for one, a weight is zero or one constant: no Pareto tail, and an
    estimate as good as its standard error.
    """
    num_samples = rows.shape[-1]
    length = math.ceil(min(num_samples / 5, 3 * math.sqrt(num_samples)))
    tail = rows.topk(length).values
    positive = tail > tail[:, :1] - _ZERO_WEIGHT
    spread = tail[:, 0] - torch.where(positive, tail, torch.inf).amin(-1)
    k = torch.where(spread <= _LEVEL_TAIL, -torch.inf, torch.nan)
    k = torch.where(positive.sum(-1) < _SMALLEST_TAIL, torch.inf, k)
    fit = k.isnan() & ~rows.isnan().any(-1)
    if bool(fit.any()):
        from pyro_bmrs._arviz import pareto_k  # noqa: PLC0415  (ArviZ takes as long to import as torch)

        log_weights = (rows[fit] - tail[fit, :1]).clamp(min=-_ZERO_WEIGHT)
        k[fit] = torch.as_tensor(pareto_k(log_weights.cpu().numpy())).to(k)
    return k


def _warn_where_unreliable(result: SampledEvidenceChange) -> None:
    k = result.pareto_k[~result.reliable]
    if not k.numel():
        return
    warn(
        f"the sampled evidence change of {k.numel()} of {result.pareto_k.numel()} elements is unreliable: its Pareto "
        f"k-hat is above {PARETO_K_LIMIT}, up to {k.nan_to_num(torch.inf, torch.inf).max():.2g}, because hardly any of "
        f"{result.num_samples} draws of the posterior fall where the reduced prior has its mass; use evidence_change "
        "if there is a closed form, else a wider reduced prior or more draws",
        UnreliableEvidenceWarning,
    )
