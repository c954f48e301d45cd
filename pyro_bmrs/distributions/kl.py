"""Kullback-Leibler divergences, registered with ``torch.distributions.kl_divergence``."""

import torch
from torch import Tensor
from torch.distributions import kl_divergence, register_kl

from pyro_bmrs import numerics
from pyro_bmrs.distributions.log_uniform import LogUniform
from pyro_bmrs.distributions.truncated_log_normal import TruncatedLogNormal

__all__ = ["kl_divergence"]


@register_kl(TruncatedLogNormal, LogUniform)
def _kl_truncated_log_normal_log_uniform(q: TruncatedLogNormal, p: LogUniform) -> Tensor:
    """Return the KL in nats, of shape ``batch_shape``; infinite where q reaches outside p's support."""
    wider = torch.log((p.log_high.double() - p.log_low) / (q.log_high.double() - q.log_low))
    kl = numerics.kl_of_truncated(q.loc, q.scale, q.log_low, q.log_high) + wider
    return torch.where((p.log_low <= q.log_low) & (q.log_high <= p.log_high), kl, torch.inf).to(q.loc)


@register_kl(TruncatedLogNormal, TruncatedLogNormal)
def _kl_truncated_log_normals(q: TruncatedLogNormal, p: TruncatedLogNormal) -> Tensor:
    """Return minus q's entropy less q's mean of log p, whose exponent is quadratic in log theta."""
    q_low, q_high = q.log_low.double(), q.log_high.double()
    p_loc, p_scale, p_low, p_high = p.double_parameters()
    negative_entropy = numerics.kl_from_uniform(*q.interval_coordinates()) - torch.log(q_high - q_low)
    mean, variance = q.double_log_theta_moments()
    energy = numerics.relative_energy(mean, p_loc, p_scale, p_low, p_high) + 0.5 * variance / p_scale**2
    p_log_mass = torch.log(p_scale) + numerics.log_integral(*p.interval_coordinates())
    inside = (p_low <= q_low) & (q_high <= p_high)
    return torch.where(inside, negative_entropy + energy + p_log_mass, torch.inf).to(q.loc)
