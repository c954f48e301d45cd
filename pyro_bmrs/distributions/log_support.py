"""What a bounded support in log space means, for every distribution that has one."""

import torch
from torch import Tensor
from torch.distributions import constraints

__all__ = ["check_log_bounds", "log_interval"]


def check_log_bounds(log_low: Tensor, log_high: Tensor) -> None:
    """Raise ``ValueError`` unless both bounds are finite and ``log_low < log_high`` everywhere."""
    if not bool((torch.isfinite(log_low) & torch.isfinite(log_high) & (log_low < log_high)).all()):
        raise ValueError(
            f"log_low must be finite and below log_high, but got log_low={log_low} and log_high={log_high}; "
            "they bound log(theta): the paper's are -20 and 0"
        )


def log_interval(log_low: Tensor, log_high: Tensor) -> constraints.Constraint:
    """Return the constraint ``exp(log_low) <= theta <= exp(log_high)``."""
    return constraints.interval(torch.exp(log_low), torch.exp(log_high))
