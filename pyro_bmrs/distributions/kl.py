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
    p_low, p_high = p.log_low.double(), p.log_high.double()
    q_low, q_high = q.log_low.double(), q.log_high.double()
    wider = torch.log((p_high - p_low) / (q_high - q_low))
    kl = numerics.kl_from_uniform(*q.interval_coordinates()) + wider
    return torch.where((p_low <= q_low) & (q_high <= p_high), kl, torch.inf).to(q.loc)
