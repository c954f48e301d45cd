r"""One rule for exponential families.

With posterior, prior and reduced prior in one family of log-normaliser :math:`G` and natural parameters
:math:`\eta`, the reduced posterior is the member with :math:`\hat\eta = \eta_q + \tilde\eta - \eta_p`, and

.. math:: \Delta F = G(\hat\eta) + G(\eta_p) - G(\eta_q) - G(\tilde\eta),

a second difference of :math:`G`. Outside :math:`G`'s domain the integral diverges. A ``Family`` says how to take
that difference without losing digits; where :math:`G` stays moderate, ``bregman(G)`` will do. The normals,
whose natural parameters already lose digits, and distributions on finite sets, whose parameters may be infinite,
have rules of their own; the reduction is the same.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import Beta, Dirichlet, Distribution, Exponential, Gamma, InverseGamma

from pyro_bmrs.bmr.log_gamma import gamma_second_difference, log_gamma_second_difference, subtract_prior
from pyro_bmrs.bmr.registry import Triple, check_convergence, register_evidence_change, register_reduced_posterior

__all__ = ["Family", "bregman", "register_exponential_family"]

SecondDifference = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


class Family(NamedTuple):
    r"""What the rule needs to know of an exponential family.

    Natural parameters are stacked along the last dimension: ``batch_shape + (k,)``; any affine form of them serves.

    Attributes:
        natural_parameters: From a distribution to :math:`\eta`, in float64.
        in_domain: From :math:`\eta` to whether :math:`G` is finite there, of shape ``batch_shape``.
        domain: The same in words, for the error.
        second_difference: From :math:`\eta_q, \eta_p, \tilde\eta, \hat\eta` to
            :math:`G(\hat\eta) + G(\eta_p) - G(\eta_q) - G(\tilde\eta)`; 0 where :math:`\tilde\eta = \eta_p`.
        from_natural_parameters: From :math:`\eta`, in the posterior's dtype by now, to a distribution.
    """

    natural_parameters: Callable[[Any], Tensor]
    in_domain: Callable[[Tensor], Tensor]
    domain: str
    second_difference: SecondDifference
    from_natural_parameters: Callable[[Tensor], Distribution]


def bregman(log_normalizer: Callable[[Tensor], Tensor]) -> SecondDifference:
    """Return the second difference of ``log_normalizer`` as it stands: accurate to rounding in its own values."""

    def second_difference(q: Tensor, p: Tensor, r: Tensor, reduced: Tensor) -> Tensor:
        return (log_normalizer(reduced) - log_normalizer(q)) + (log_normalizer(p) - log_normalizer(r))

    return second_difference


def register_exponential_family(triple: Triple, family: Family) -> None:
    """Register evidence change and reduced posterior of three types of one exponential family.

    Args:
        triple: Types of posterior, prior and reduced prior; usually one type three times.
        family: What they have in common.

    Raises:
        TypeError: If one of the types is not a distribution.

    Example:
        >>> from pyro_bmrs.bmr.exponential_family import GAMMA
        >>> class Erlang(torch.distributions.Gamma):
        ...     pass
        >>> register_exponential_family((Erlang, Erlang, Erlang), GAMMA)
    """

    @register_evidence_change(*triple)
    def _evidence_change(q: Distribution, p: Distribution, reduced: Distribution) -> Tensor:
        eta_q, eta_p, eta_r = torch.broadcast_tensors(*(family.natural_parameters(each) for each in (q, p, reduced)))
        eta = subtract_prior(eta_q, eta_p, eta_r)
        converges = family.in_domain(eta)
        # A diverging element is computed as if all were the prior, for the sake of the others' gradients.
        inside = converges.unsqueeze(-1)
        eta_q, eta_r, eta = (torch.where(inside, value, eta_p) for value in (eta_q, eta_r, eta))
        delta_f = family.second_difference(eta_q, eta_p, eta_r, eta)
        return torch.where(converges, delta_f, torch.inf).to(_dtype(q))

    @register_reduced_posterior(*triple)
    def _reduced_posterior(q: Distribution, p: Distribution, reduced: Distribution) -> Distribution:
        eta_q, eta_p, eta_r = (family.natural_parameters(each) for each in (q, p, reduced))
        eta = subtract_prior(eta_q, eta_p, eta_r)
        check_convergence(family.in_domain(eta), f"its parameters do not satisfy {family.domain}")
        return family.from_natural_parameters(eta.to(_dtype(q)))


def _dtype(q: Distribution) -> torch.dtype:
    """Return the dtype of the parameters, whichever the distribution has."""
    return getattr(q, next(iter(q.arg_constraints))).dtype


def _all_positive(eta: Tensor) -> Tensor:
    return (eta > 0).all(-1)


def _beta_second_difference(q: Tensor, p: Tensor, r: Tensor, reduced: Tensor) -> Tensor:
    """Second difference of the log of the (multivariate) beta function."""
    eta = (q, p, r, reduced)
    of_sum = log_gamma_second_difference(*(value.sum(-1) for value in eta))
    return log_gamma_second_difference(*eta).sum(-1) - of_sum


def _concentration_and_rate(gamma: Any) -> Tensor:
    return torch.stack([gamma.concentration.double(), gamma.rate.double()], -1)


def _one_and_rate(exponential: Exponential) -> Tensor:
    return torch.stack([torch.ones_like(exponential.rate.double()), exponential.rate.double()], -1)


GAMMA = Family(
    natural_parameters=lambda q: _one_and_rate(q) if isinstance(q, Exponential) else _concentration_and_rate(q),
    in_domain=_all_positive,
    domain="concentration > 0 and rate > 0",
    second_difference=gamma_second_difference,
    from_natural_parameters=lambda eta: dist.Gamma(*eta.unbind(-1), validate_args=False),
)

INVERSE_GAMMA = GAMMA._replace(
    from_natural_parameters=lambda eta: dist.InverseGamma(*eta.unbind(-1), validate_args=False)
)

EXPONENTIAL = Family(
    natural_parameters=lambda q: q.rate.double().unsqueeze(-1),
    in_domain=_all_positive,
    domain="rate > 0",
    second_difference=bregman(lambda rate: -torch.log(rate).squeeze(-1)),
    from_natural_parameters=lambda eta: dist.Exponential(eta.squeeze(-1), validate_args=False),
)

BETA = Family(
    natural_parameters=lambda q: torch.stack([q.concentration1.double(), q.concentration0.double()], -1),
    in_domain=_all_positive,
    domain="concentration1 > 0 and concentration0 > 0",
    second_difference=_beta_second_difference,
    from_natural_parameters=lambda eta: dist.Beta(*eta.unbind(-1), validate_args=False),
)

DIRICHLET = Family(
    natural_parameters=lambda q: q.concentration.double(),
    in_domain=_all_positive,
    domain="concentration > 0",
    second_difference=_beta_second_difference,
    from_natural_parameters=lambda eta: dist.Dirichlet(eta, validate_args=False),
)

for _q in (Gamma, Exponential):
    for _p in (Gamma, Exponential):
        for _r in (Gamma, Exponential):
            register_exponential_family((_q, _p, _r), GAMMA)
for _kind, _family in (
    (InverseGamma, INVERSE_GAMMA),
    (Exponential, EXPONENTIAL),
    (Beta, BETA),
    (Dirichlet, DIRICHLET),
):
    register_exponential_family((_kind, _kind, _kind), _family)
