"""The prior of the paper: uniform in the logarithm."""

from typing import Any

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import constraints
from torch.distributions.utils import broadcast_all

from pyro_bmrs.checks import check_parameters
from pyro_bmrs.distributions.log_support import check_log_bounds, log_interval

__all__ = ["LogUniform"]


class LogUniform(TorchDistribution):
    r"""Log-uniform distribution on :math:`[e^a, e^b]`: :math:`p(\theta) = 1 / (\theta (b - a))`.

    The scale-free prior of Neklyudov et al. (2017) on a structure's multiplicative noise.

    Args:
        log_low: Lower bound :math:`a` of :math:`\log\theta`.
        log_high: Upper bound :math:`b` of :math:`\log\theta`, above ``log_low``.

    Raises:
        ValueError: If ``log_low >= log_high``.

    References:
        Structured Bayesian Pruning via Log-Normal Multiplicative Noise (Neklyudov et al., 2017)
        https://arxiv.org/abs/1705.07283

    Example:
        >>> prior = LogUniform(log_low=-20.0, log_high=0.0)
        >>> prior.log_prob(torch.tensor(0.5))
        tensor(-2.3026)
        >>> prior.mean
        tensor(0.0500)
    """

    arg_constraints = {"log_low": constraints.real, "log_high": constraints.real}
    has_rsample = True

    def __init__(
        self,
        log_low: Tensor | float = -20.0,
        log_high: Tensor | float = 0.0,
        validate_args: bool | None = None,
    ) -> None:
        check_parameters(log_low=log_low, log_high=log_high)
        self.log_low, self.log_high = broadcast_all(log_low, log_high)
        super().__init__(self.log_low.shape, validate_args=validate_args)
        if self._validate_args:
            check_log_bounds(self.log_low, self.log_high)

    @constraints.dependent_property(is_discrete=False, event_dim=0)
    def support(self) -> constraints.Constraint:
        return log_interval(self.log_low, self.log_high)

    @property
    def log_width(self) -> Tensor:
        r"""Width :math:`b - a` of the support of :math:`\log\theta`, of shape ``batch_shape``."""
        return self.log_high - self.log_low

    def expand(self, batch_shape: Any, _instance: Any = None) -> "LogUniform":
        new = self._get_checked_instance(LogUniform, _instance)
        new.log_low, new.log_high = self.log_low.expand(batch_shape), self.log_high.expand(batch_shape)
        super(LogUniform, new).__init__(torch.Size(batch_shape), validate_args=False)
        new._validate_args = self._validate_args
        return new

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        shape = self._extended_shape(sample_shape)
        uniform = torch.rand(shape, dtype=self.log_low.dtype, device=self.log_low.device)
        return self.icdf(uniform)

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        inside = self.support.check(value)
        return torch.where(inside, -torch.log(value) - torch.log(self.log_width), -torch.inf)

    def cdf(self, value: Tensor) -> Tensor:
        """Return P(theta <= value), for values inside the support."""
        return ((torch.log(value) - self.log_low) / self.log_width).clamp(0, 1)

    def icdf(self, value: Tensor) -> Tensor:
        """Return the quantile at probability ``value``."""
        log_theta = self.log_low + value * self.log_width
        return torch.exp(torch.minimum(log_theta, self.log_high))

    @property
    def mean(self) -> Tensor:
        width = self.log_high.double() - self.log_low.double()
        return (torch.exp(self.log_low.double()) * torch.expm1(width) / width).to(self.log_low)

    @property
    def variance(self) -> Tensor:
        r"""Variance :math:`E[\theta]^2 (h \coth h - 1)` with h half the width of the support of log theta."""
        half = 0.5 * (self.log_high.double() - self.log_low.double())
        wide = torch.where(half < 0.05, 1.0, half)
        series = half**2 / 3 - half**4 / 45 + 2 * half**6 / 945
        relative = torch.where(half < 0.05, series, wide / torch.tanh(wide) - 1)
        return (self.mean.double() ** 2 * relative).to(self.log_low)

    def entropy(self) -> Tensor:
        """Return the differential entropy of theta, in nats."""
        return torch.log(self.log_width) + 0.5 * (self.log_low + self.log_high)
