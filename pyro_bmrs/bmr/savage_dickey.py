r"""A point mass as the reduced prior: the Savage-Dickey density ratio.

Any posterior and prior with a ``log_prob`` will do, so this is the least specific of the rules.
"""

import copy
from typing import Any

import torch
from pyro.distributions import Delta
from torch import Tensor
from torch.distributions import Distribution

from pyro_bmrs.bmr.registry import register_evidence_change, register_reduced_posterior

__all__ = ["evidence_change_at_point"]


@register_evidence_change(Distribution, Distribution, Delta)
def evidence_change_at_point(q: Distribution, p: Distribution, reduced: Delta) -> Tensor:
    r"""Return the log of the Savage-Dickey density ratio at the point :math:`v`.

    .. math:: \Delta F = \log q(v) - \log p(v)

    -inf where the posterior has no density at the point. The densities are the distributions' own, in their dtype.

    References:
        The weighted likelihood ratio, linear hypotheses on normal location parameters (Dickey, 1971)
        https://doi.org/10.1214/aoms/1177693507
    """
    log_p = _checked_log_prior(q, p, reduced)
    log_q = _log_prob(q, reduced.v)
    return (log_q.double() - log_p.double()).to(log_q)


@register_reduced_posterior(Distribution, Distribution, Delta)
def _reduced_posterior_point(q: Distribution, p: Distribution, reduced: Delta) -> Delta:
    """Return the point mass itself, whatever the data: no posterior puts mass where its prior has none."""
    _checked_log_prior(q, p, reduced)
    return reduced.expand(torch.broadcast_shapes(q.batch_shape, p.batch_shape, reduced.batch_shape))


def _checked_log_prior(q: Distribution, p: Distribution, reduced: Delta) -> Tensor:
    """Return log p(v), of which the ratio needs that it is finite."""
    event_dims = [len(each.event_shape) for each in (q, p, reduced)]
    if len(set(event_dims)) > 1:
        raise ValueError(
            "posterior, prior and reduced prior need the same event dimensions, but have "
            f"{event_dims[0]}, {event_dims[1]} and {event_dims[2]}; the point is Delta(v, event_dim={event_dims[0]})"
        )
    if bool((reduced.log_density != 0).any()):
        raise ValueError("the reduced prior must integrate to one: leave Delta's log_density at 0")
    log_p = _log_prob(p, reduced.v)
    if not bool(torch.isfinite(log_p).all()):
        raise ValueError(
            "the reduced prior's point must lie within the prior's support, where its density is positive and finite: "
            f"elsewhere the posterior says nothing about it; the log density there is {log_p}"
        )
    return log_p


def _log_prob(distribution: Distribution, value: Tensor) -> Tensor:
    """Return the log density, -inf outside the support whether or not the distribution validates."""
    support: Any = distribution.support
    inside = support.check(value)
    return torch.where(inside, _without_validation(distribution).log_prob(value), -torch.inf)


def _without_validation(distribution: Distribution) -> Distribution:
    """Return a shallow copy that evaluates its density anywhere."""
    unchecked = copy.copy(distribution)
    base = getattr(distribution, "base_dist", None)
    if isinstance(base, Distribution):  # first: Pyro's Independent validates as its base does, and sets it there
        unchecked.base_dist = _without_validation(base)  # type: ignore[attr-defined]
    unchecked._validate_args = False
    return unchecked
