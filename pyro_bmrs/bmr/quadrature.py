r"""A posterior that is a transformed normal, against any prior: one-dimensional quadrature.

This is what autoguides have at a site that is not on the whole line: a log-normal on the positive numbers, a
logit-normal on an interval. With :math:`\theta = T(\mu + \sigma z)`,

.. math:: \Delta F = \log \int \mathcal{N}(z; 0, 1) \, \frac{\tilde p(T(\mu + \sigma z))}{p(T(\mu + \sigma z))} \, dz

Of a reduced prior of several modes far narrower than the posterior one may be overlooked.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from pyro.distributions import Delta
from torch import Tensor
from torch.distributions import Distribution, Normal, TransformedDistribution
from torch.distributions.transforms import ComposeTransform

from pyro_bmrs.bmr.registry import register_evidence_change
from pyro_bmrs.bmr.savage_dickey import evidence_change_at_point
from pyro_bmrs.numerics.integral import log_integral
from pyro_bmrs.randomness import local_seed

__all__: list[str] = []

_LARGEST = 1e100  # beyond it the densities of some distributions overflow
_SAME = 1e-6  # relative difference of bounds that are the same in float32

register_evidence_change(TransformedDistribution, Distribution, Delta)(evidence_change_at_point)


@register_evidence_change(TransformedDistribution, Distribution, Distribution)
@torch.no_grad()
def _evidence_change_transformed(q: TransformedDistribution, p: Distribution, reduced: Distribution) -> Tensor:
    """Return it to 1e-9 nats, without gradients; +inf where the integral diverges."""
    base, transform = q.base_dist, ComposeTransform(list(q.transforms))
    if not (type(q.base_dist).__name__ == "Normal" and isinstance(base, Normal) and transform.bijective):
        raise NotImplementedError(
            f"no evidence_change is known for a {type(q).__name__} posterior, which is no one-to-one function of one "
            "normal; register one, or sample it: estimate_evidence_change(posterior, prior, reduced_prior)"
        )
    shape = torch.broadcast_shapes(q.batch_shape, p.batch_shape, reduced.batch_shape)
    loc, scale = (each.double().expand(shape) for each in (base.loc, base.scale))
    p, reduced = _in_float64(p), _in_float64(reduced)
    low, high = _open_support(transform, (p, reduced), torch.full_like(loc, torch.inf))

    def theta(z: Tensor) -> Tensor:
        return torch.minimum(torch.maximum(transform(loc + scale * z), low), high)

    _check_support(q, p, theta, loc)
    start, end = _limits(reduced, transform, (low, high), loc, scale)

    def log_integrand(z: Tensor) -> Tensor:
        value = theta(z)
        log_p, log_reduced = _log_prob(p, value), _log_prob(reduced, value)
        known = (value.abs() < _LARGEST) & (value != 0) & (log_reduced > -torch.inf)
        return torch.where(known, log_reduced - log_p - 0.5 * (z * z + math.log(2 * math.pi)), -torch.inf)

    try:
        return log_integral(log_integrand, start, end).to(base.loc.dtype)
    except ArithmeticError as error:
        raise NotImplementedError(
            f"{error}; sample it: estimate_evidence_change(posterior, prior, reduced_prior)"
        ) from error


def _in_float64(distribution: Any) -> Any:
    """Return a distribution of float64, if it is nothing but its parameters."""
    parameters = {name: getattr(distribution, name) for name in distribution.arg_constraints}
    if not parameters or not all(isinstance(each, Tensor) for each in parameters.values()):
        return distribution
    return type(distribution)(**{name: each.double() for name, each in parameters.items()}, validate_args=False)


def _log_prob(distribution: Any, value: Tensor) -> Tensor:
    """Return the log density, -inf outside the support."""
    inside = distribution.support.check(value) & value.isfinite()
    if not bool(inside.all()):
        value = torch.where(inside, value, _legal(distribution))  # log_prob refuses, or misjudges, what lies outside
    return torch.where(inside, distribution.log_prob(value), -torch.inf)


def _legal(distribution: Any) -> Tensor:
    """Return some number inside the support."""
    with local_seed():
        return distribution.sample().double()


def _bounds(distribution: Any) -> tuple[Tensor, Tensor]:
    """Return the bounds of a distribution's support, infinite where there are none."""
    support = distribution.support
    while hasattr(support, "base_constraint"):
        support = support.base_constraint
    ends = getattr(support, "lower_bound", -torch.inf), getattr(support, "upper_bound", torch.inf)
    return tuple(torch.as_tensor(each, dtype=torch.float64) for each in ends)  # type: ignore[return-value]


def _open_support(transform: Any, priors: tuple[Any, Any], infinity: Tensor) -> tuple[Tensor, Tensor]:
    """Return the smallest and the largest number inside the posterior's support: at a bound densities may end.

    A prior's bound that differs from the posterior's by rounding is the same. 0 stays, since the numbers above it are
    so many that what is rounded to it has underflowed.
    """
    ends = torch.stack([transform(-infinity), transform(infinity)])
    lows, highs = zip(*([end.to(infinity) for end in _bounds(each)] for each in priors), strict=True)
    return _inner(ends.amin(0), lows, infinity), -_inner(-ends.amax(0), [-high for high in highs], infinity)


def _inner(low: Tensor, others: Sequence[Tensor], infinity: Tensor) -> Tensor:
    """Return the first number above a lower bound, and above those of ``others`` that are the same but for rounding."""
    for other in others:
        same = low.isfinite() & ((low - other).abs() <= _SAME * low.abs())
        low = torch.where(same, torch.maximum(low, other), low)
    return torch.where(low.isfinite() & (low != 0), low.nextafter(infinity), low)


def _limits(
    reduced: Any, transform: Any, support: tuple[Tensor, Tensor], loc: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    """Return where, in standard deviations, the reduced prior begins and ends, if that is inside the support."""
    ends = []
    bounds = [end.to(loc) for end in _bounds(reduced)]
    for own, bound, beyond in zip(support, bounds, (-torch.inf, torch.inf), strict=True):
        inside = (bound > own) if beyond < 0 else (bound < own)
        somewhere = torch.where(inside, bound, transform(loc))
        ends.append(torch.where(inside, (transform.inv(somewhere) - loc) / scale, beyond * transform.sign))
    return torch.minimum(*ends), torch.maximum(*ends)


def _check_support(q: Any, p: Any, theta: Callable[[Tensor], Tensor], loc: Tensor) -> None:
    for z in (-2.0, 0.0, 2.0):
        if not bool(p.support.check(theta(torch.full_like(loc, z))).all()):
            raise ValueError(
                f"the {type(q).__name__} posterior has mass outside the support of the {type(p).__name__} prior, where "
                "no posterior can have any; give both one support"
            )
