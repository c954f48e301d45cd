"""Moments that every distribution over noise has, in the form that keeps its digits."""

from typing import Any

from torch import Tensor

__all__ = ["signal_to_noise"]


def signal_to_noise(distribution: Any) -> Tensor:
    """Return mean over standard deviation: the distribution's own ``snr`` where it has one, which cannot underflow."""
    if hasattr(distribution, "snr"):
        return distribution.snr
    return distribution.mean / distribution.stddev
