r"""Rules for normal posteriors, the Bayesian model reduction of Friston and Penny, and for what they map to.

Measured from the prior (:math:`A = (\mu_q - \mu_p)/\sigma_p`, :math:`B = (\tilde\mu - \mu_p)/\sigma_p`), with
:math:`u_q = 1 - \sigma_q^2/\sigma_p^2`, :math:`u_r = 1 - \tilde\sigma^2/\sigma_p^2` and :math:`w = 1 - u_q u_r`,

.. math:: \Delta F = -\tfrac12 \log w + \frac{2 A B - u_r A^2 - u_q B^2}{2 w}
    = -\tfrac12 \log w + \frac{-(A - B)^2 + (1 - u_r) A^2 + (1 - u_q) B^2}{2 w}:

no term has the size of :math:`\mu^2/\sigma^2`. The first quotient serves distributions near the prior, the second
those much narrower. The reduced posterior has precision :math:`w \sigma_p^2 / (\sigma_q^2 \tilde\sigma^2)`, so the
integral converges where :math:`w > 0`. A change of variables leaves :math:`\Delta F` alone: ``LogNormal`` is the normal
of log theta.

References:
    Post hoc Bayesian model selection (Friston & Penny, 2011)
    https://doi.org/10.1016/j.neuroimage.2011.03.062
"""

from typing import NamedTuple

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import HalfNormal, LogNormal, Normal

from pyro_bmrs.bmr.registry import check_convergence, register_evidence_change, register_reduced_posterior

__all__: list[str] = []

_REASON = "the precision 1/scale_q**2 + 1/scale_reduced**2 - 1/scale_prior**2 is not positive"


class _Standardised(NamedTuple):
    """Three normals in units of the prior's scale, in float64.

    Attributes:
        a: Location of the posterior, from the prior's.
        b: Location of the reduced prior, from the prior's.
        gap: ``a - b``, from one subtraction.
        rho_q: Variance of the posterior.
        rho_r: Variance of the reduced prior.
        u_q: ``1 - rho_q``, to all its digits.
        u_r: ``1 - rho_r``, of the same shape.
    """

    a: Tensor
    b: Tensor
    gap: Tensor
    rho_q: Tensor
    rho_r: Tensor
    u_q: Tensor
    u_r: Tensor

    @property
    def narrow(self) -> Tensor:
        """Whether ``1 - u_q * u_r`` would cancel and the variances tell it better."""
        return (self.u_q > 0) & (self.u_q * self.u_r > 0.5)

    @property
    def w(self) -> Tensor:
        """Precision of the reduced posterior times ``rho_q * rho_r``; not positive where the integral diverges."""
        return torch.where(self.narrow, self.rho_q + self.rho_r * self.u_q, 1 - self.u_q * self.u_r)


def _standardise(q: Normal, p: Normal, reduced: Normal) -> _Standardised:
    q_loc, p_loc, r_loc, q_scale, p_scale, r_scale = torch.broadcast_tensors(
        *(each.loc.double() for each in (q, p, reduced)), *(each.scale.double() for each in (q, p, reduced))
    )
    return _Standardised(
        a=(q_loc - p_loc) / p_scale,
        b=(r_loc - p_loc) / p_scale,
        gap=(q_loc - r_loc) / p_scale,
        rho_q=(q_scale / p_scale) ** 2,
        rho_r=(r_scale / p_scale) ** 2,
        u_q=(p_scale - q_scale) / p_scale * ((p_scale + q_scale) / p_scale),
        u_r=(p_scale - r_scale) / p_scale * ((p_scale + r_scale) / p_scale),
    )


def _finite_quadratic(s: _Standardised) -> Tensor:
    """Return the numerator of the quotient, from the form whose terms are the smaller."""
    near = (2 * s.a * s.b, -s.u_r * s.a**2, -s.u_q * s.b**2)
    far = (-(s.gap**2), s.rho_r * s.a**2, s.rho_q * s.b**2)
    near_size, far_size = (sum(term.abs() for term in terms) for terms in (near, far))
    return torch.where(torch.as_tensor(near_size <= far_size), sum(near), sum(far))


@register_evidence_change(Normal, Normal, Normal)
def _evidence_change_normal(q: Normal, p: Normal, reduced: Normal) -> Tensor:
    s = _standardise(q, p, reduced)
    w, converges = s.w, s.w > 0
    # A diverging element is computed as if all three were the prior, for the sake of the others' gradients.
    s = _Standardised(*(torch.where(converges, value, torch.zeros_like(value)) for value in s))
    w = torch.where(converges, w, torch.ones_like(w))
    product = torch.where(s.narrow, torch.zeros_like(w), s.u_q * s.u_r)
    log_w = torch.where(s.narrow, torch.log(w), torch.log1p(-product))
    delta_f = -0.5 * log_w + 0.5 * _finite_quadratic(s) / w
    return torch.where(converges, delta_f, torch.inf).to(q.loc)


@register_reduced_posterior(Normal, Normal, Normal)
def _reduced_posterior_normal(q: Normal, p: Normal, reduced: Normal) -> dist.Normal:
    """Return the normal of precision 1/q + 1/reduced - 1/prior, its location measured from the narrower factor's."""
    s = _standardise(q, p, reduced)
    check_convergence(s.w > 0, _REASON)
    q_loc, p_scale, r_loc = q.loc.double(), p.scale.double(), reduced.loc.double()
    from_q = q_loc + p_scale * (s.rho_q * (s.b - s.u_r * s.a) / s.w)
    from_r = r_loc + p_scale * (s.rho_r * (s.a - s.u_q * s.b) / s.w)
    loc = torch.where(s.rho_q <= s.rho_r, from_q, from_r)
    scale = q.scale.double() * (reduced.scale.double() / p_scale) / torch.sqrt(s.w)
    return dist.Normal(loc.to(q.loc), scale.to(q.loc), validate_args=False)


@register_evidence_change(LogNormal, LogNormal, LogNormal)
def _evidence_change_log_normal(q: LogNormal, p: LogNormal, reduced: LogNormal) -> Tensor:
    return _evidence_change_normal(q.base_dist, p.base_dist, reduced.base_dist)


@register_reduced_posterior(LogNormal, LogNormal, LogNormal)
def _reduced_posterior_log_normal(q: LogNormal, p: LogNormal, reduced: LogNormal) -> dist.LogNormal:
    base = _reduced_posterior_normal(q.base_dist, p.base_dist, reduced.base_dist)
    return dist.LogNormal(base.loc, base.scale, validate_args=False)


@register_evidence_change(HalfNormal, HalfNormal, HalfNormal)
def _evidence_change_half_normal(q: HalfNormal, p: HalfNormal, reduced: HalfNormal) -> Tensor:
    """Return that of the normals around 0: folding doubles all three densities."""
    return _evidence_change_normal(q.base_dist, p.base_dist, reduced.base_dist)


@register_reduced_posterior(HalfNormal, HalfNormal, HalfNormal)
def _reduced_posterior_half_normal(q: HalfNormal, p: HalfNormal, reduced: HalfNormal) -> dist.HalfNormal:
    base = _reduced_posterior_normal(q.base_dist, p.base_dist, reduced.base_dist)
    return dist.HalfNormal(base.scale, validate_args=False)
