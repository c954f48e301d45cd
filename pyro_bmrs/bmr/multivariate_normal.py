r"""Rules for multivariate normal posteriors, through Cholesky factors.

With :math:`\Sigma = L L^T`, everything is expressed in the posterior's factor :math:`L_q`. There its precision is
:math:`I`, the prior's :math:`E^T E` and the reduced prior's :math:`F^T F`, with :math:`E = L_p^{-1} L_q` and
:math:`F = \tilde L^{-1} L_q`, and the reduced posterior's is

.. math:: M = I + X = F^T F + Y, \quad X = F^T F - E^T E, \quad Y = I - E^T E,

where :math:`X` is made of :math:`L_p - \tilde L` and :math:`Y` of :math:`L_p - L_q`, to keep their digits. The
integral converges where :math:`M` is positive definite, and then, with :math:`a` and :math:`b` the locations of
posterior and reduced prior measured from the prior's, times :math:`L_q^{-1}`,

.. math:: \Delta F = \log|L_p| - \log|\tilde L| - \tfrac12 \log|M| + \tfrac12 \big(
    a^T M^{-1} (F^T F b - X a) + b^T F^T F M^{-1} (a - Y b) \big),

the sum of the rule for ``Normal`` over the dimensions if all three are diagonal.

References:
    Post hoc Bayesian model selection (Friston & Penny, 2011)
    https://doi.org/10.1016/j.neuroimage.2011.03.062
"""

from typing import NamedTuple

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import MultivariateNormal
from torch.linalg import cholesky_ex, solve_triangular

from pyro_bmrs.bmr.registry import check_convergence, register_evidence_change, register_reduced_posterior

__all__: list[str] = []

_REASON = "the precision matrix of posterior plus reduced prior minus prior is not positive definite"


class _Factors(NamedTuple):
    """Three multivariate normals in the coordinates of the posterior's factor, in float64 (see the module)."""

    q_tril: Tensor
    p_tril: Tensor
    r_tril: Tensor
    a: Tensor
    b: Tensor
    gap: Tensor
    e: Tensor
    f: Tensor
    x: Tensor
    y: Tensor
    root: Tensor
    converges: Tensor

    def halve(self, v: Tensor) -> Tensor:
        """Return ``v`` such that scalar products of two of them are quadratic forms in the inverse of M."""
        return solve_triangular(self.root, v, upper=False)


def _factorise(q: MultivariateNormal, p: MultivariateNormal, reduced: MultivariateNormal) -> _Factors:
    q_loc, p_loc, r_loc = (each.loc.double().unsqueeze(-1) for each in (q, p, reduced))
    q_tril, p_tril, r_tril = (each._unbroadcasted_scale_tril.double() for each in (q, p, reduced))
    e, f = (solve_triangular(tril, q_tril, upper=False) for tril in (p_tril, r_tril))
    f_minus_e = solve_triangular(r_tril, (p_tril - r_tril) @ e, upper=False)
    one_minus_e = solve_triangular(p_tril, p_tril - q_tril, upper=False)
    x = _symmetric_part(f_minus_e.mT @ (f + e))
    y = one_minus_e + one_minus_e.mT - one_minus_e.mT @ one_minus_e
    m, identity = _sum_of_smaller(x, y, f.mT @ f)
    converges = cholesky_ex(m.detach())[1] == 0
    # A diverging element is given the posterior's precision, for the sake of the others' gradients.
    root = torch.linalg.cholesky(torch.where(converges[..., None, None], m, identity))
    a, b, gap = (solve_triangular(q_tril, v, upper=False) for v in (q_loc - p_loc, r_loc - p_loc, q_loc - r_loc))
    return _Factors(q_tril, p_tril, r_tril, a, b, gap, e, f, x, y, root, converges)


def _sum_of_smaller(x: Tensor, y: Tensor, f_squared: Tensor) -> tuple[Tensor, Tensor]:
    """Return M from the two terms that cancel less, and the identity."""
    identity = torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)
    near, far = identity + x, f_squared + y
    far_is_smaller = 2 * (_size(f_squared) + _size(y)) < _size(identity) + _size(x)
    return torch.where(far_is_smaller[..., None, None], far, near), identity


def _symmetric_part(matrix: Tensor) -> Tensor:
    return 0.5 * (matrix + matrix.mT)


def _size(v: Tensor) -> Tensor:
    """Return the Frobenius norm, to choose by: without a gradient."""
    return torch.linalg.matrix_norm(v.detach())


def _log_det(tril: Tensor) -> Tensor:
    return torch.log(tril.diagonal(dim1=-2, dim2=-1)).sum(-1)


def _sum_of_products(*pairs: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Return the sum of the scalar products and a bound of the size of its terms."""
    products, sizes = zip(*(((v * w).sum((-2, -1)), _size(v) * _size(w)) for v, w in pairs), strict=True)
    return sum(products[1:], products[0]), sum(sizes[1:], sizes[0])


def _quadratic(s: _Factors) -> Tensor:
    """Return the quadratic part of twice Delta F, from the form whose terms are the smaller (see ``normal``)."""
    f_squared, e_squared = s.f.mT @ s.f, s.e.mT @ s.e
    a, b, gap = (s.halve(v) for v in (s.a, s.b, s.gap))
    p_a, p_b, p_gap = (s.halve(e_squared @ v) for v in (s.a, s.b, s.gap))
    r_b, r_gap = (s.halve(f_squared @ v) for v in (s.b, s.gap))
    x_a, y_b = s.halve(s.x @ s.a), s.halve(s.y @ s.b)
    near, near_size = _sum_of_products((a, r_b), (-a, x_a), (r_b, a), (-r_b, y_b))
    far, far_size = _sum_of_products((a, p_a), (r_b, p_b), (gap, p_b), (-p_gap, b), (-gap, r_gap))
    return torch.where(near_size <= far_size, near, far)


@register_evidence_change(MultivariateNormal, MultivariateNormal, MultivariateNormal)
def _evidence_change_multivariate_normal(
    q: MultivariateNormal, p: MultivariateNormal, reduced: MultivariateNormal
) -> Tensor:
    s = _factorise(q, p, reduced)
    delta_f = (_log_det(s.p_tril) - _log_det(s.r_tril)) - _log_det(s.root) + 0.5 * _quadratic(s)
    return torch.where(s.converges, delta_f, torch.inf).to(q.loc)


@register_reduced_posterior(MultivariateNormal, MultivariateNormal, MultivariateNormal)
def _reduced_posterior_multivariate_normal(
    q: MultivariateNormal, p: MultivariateNormal, reduced: MultivariateNormal
) -> dist.MultivariateNormal:
    """Return the normal whose precision is 1/q + 1/reduced - 1/prior: its factor from a QR, never its inverse."""
    s = _factorise(q, p, reduced)
    check_convergence(s.converges, _REASON)
    half = s.halve(s.q_tril.mT)  # half.mT @ half is the covariance
    loc = q.loc.double() + (half.mT @ s.halve(s.f.mT @ s.f @ s.b - s.x @ s.a)).squeeze(-1)
    upper = torch.linalg.qr(half).R
    signs = torch.sign(upper.diagonal(dim1=-2, dim2=-1)).unsqueeze(-1)
    return dist.MultivariateNormal(loc.to(q.loc), scale_tril=(signs * upper).mT.to(q.loc), validate_args=False)
