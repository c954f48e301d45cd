"""The logit-normal on an interval: what a normal in unconstrained space is there, as in Pyro's autoguides."""

from functools import cache
from typing import Any

import numpy as np
import torch
from pyro.distributions import Normal, TransformedDistribution
from torch import Tensor
from torch.distributions import biject_to, constraints

__all__ = ["LogitNormal"]

_NODES, _PANELS, _REACH = 16, 64, 9.0  # standard deviations, beyond which there is less than 1e-18 of the mass


class LogitNormal(TransformedDistribution):
    r"""Logit-normal on an interval.

    .. math:: \theta = a + (b - a)\, \sigma(x), \quad x \sim \mathcal{N}(\mu, s^2)

    Mean and variance have no closed form: they are integrated, in float64, to 1e-6 of the interval where
    :math:`s < 20`.

    Args:
        loc: :math:`\mu`.
        scale: :math:`s` > 0.
        low: :math:`a`.
        high: :math:`b`.

    Example:
        >>> LogitNormal(torch.tensor(0.0), torch.tensor(2.0), 0.0, 1.0).mean
        tensor(0.5000)
    """

    arg_constraints = {
        "loc": constraints.real,
        "scale": constraints.positive,
        "low": constraints.real,
        "high": constraints.real,
    }

    def __init__(self, loc: Any, scale: Any, low: Any, high: Any, validate_args: bool | None = None) -> None:
        normal = Normal(loc, scale, validate_args=validate_args)
        self.low, self.high = (torch.as_tensor(each).to(normal.loc).expand(normal.batch_shape) for each in (low, high))
        interval = biject_to(constraints.interval(self.low, self.high))
        super().__init__(normal, [interval], validate_args=False)

    def expand(self, batch_shape: Any, _instance: Any = None) -> "LogitNormal":
        expanded = torch.Size(batch_shape)
        loc, scale, low, high = (each.expand(expanded) for each in (self.loc, self.scale, self.low, self.high))
        return LogitNormal(loc, scale, low, high, validate_args=False)

    @property
    def loc(self) -> Tensor:
        """Location of the logit."""
        return self.base_dist.loc

    @property
    def scale(self) -> Tensor:
        """Standard deviation of the logit."""
        return self.base_dist.scale

    @constraints.dependent_property(is_discrete=False, event_dim=0)
    def support(self) -> constraints.Constraint:
        """The interval."""
        return constraints.interval(self.low, self.high)

    @property
    def mean(self) -> Tensor:
        return self.low + (self.high - self.low) * self._moments()[0]

    @property
    def variance(self) -> Tensor:
        return (self.high - self.low).square() * self._moments()[1]

    def _moments(self) -> tuple[Tensor, Tensor]:
        """Return mean and variance on the unit interval."""
        z, weights = (each.to(self.low.device) for each in _rule())
        loc, scale = (each.double().unsqueeze(-1) for each in (self.loc, self.scale))
        values = torch.sigmoid(loc + scale * z)
        mean = values @ weights
        variance = (values - mean.unsqueeze(-1)).square() @ weights
        return mean.to(self.low), variance.to(self.low)


@cache
def _rule() -> tuple[Tensor, Tensor]:
    """Return nodes, and weights that are those of a standard normal."""
    nodes, weights = np.polynomial.legendre.leggauss(_NODES)
    half = _REACH / _PANELS
    centres = -_REACH + half * (2 * np.arange(_PANELS) + 1)
    z = (centres[:, None] + half * nodes).ravel()
    density = np.tile(half * weights, _PANELS) * np.exp(-0.5 * z**2)
    return torch.from_numpy(z), torch.from_numpy(density / density.sum())
