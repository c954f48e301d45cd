"""The posterior of the paper: a log-normal truncated to the support of its prior."""

from typing import Any

import numpy as np
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import constraints
from torch.distributions.utils import broadcast_all

from pyro_bmrs import numerics
from pyro_bmrs.checks import check_parameters
from pyro_bmrs.distributions.log_support import check_log_bounds, log_interval

__all__ = ["TruncatedLogNormal"]

_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(6)
_SMALL_VARIANCE = 1e-2  # of log theta; below, the variance of theta is integrated instead of subtracted


class TruncatedLogNormal(TorchDistribution):
    r"""Log-normal distribution truncated to :math:`[e^a, e^b]`.

    .. math:: q(\theta) = \frac{1}{Z \sigma \theta} \phi\Big(\frac{\log\theta - \mu}{\sigma}\Big),
        \quad Z = \Phi\Big(\frac{b - \mu}{\sigma}\Big) - \Phi\Big(\frac{a - \mu}{\sigma}\Big).

    Everything is computed in float64 and in log space, whatever the dtype of the parameters, and returned in
    their dtype: no digits are lost however far ``loc`` lies outside the bounds or however small ``scale`` is.

    Args:
        loc: :math:`\mu`, location of :math:`\log\theta` before truncation; any real number.
        scale: :math:`\sigma` > 0, standard deviation of :math:`\log\theta` before truncation.
        log_low: Lower bound :math:`a` of :math:`\log\theta`.
        log_high: Upper bound :math:`b` of :math:`\log\theta`, above ``log_low``.

    Raises:
        ValueError: If ``scale <= 0`` or ``log_low >= log_high``.

    References:
        Structured Bayesian Pruning via Log-Normal Multiplicative Noise (Neklyudov et al., 2017)
        https://arxiv.org/abs/1705.07283

    Example:
        >>> q = TruncatedLogNormal(loc=torch.tensor(-1.0), scale=torch.tensor(0.1))
        >>> q.mean
        tensor(0.3697)
        >>> q.snr
        tensor(9.9750)
    """

    arg_constraints = {
        "loc": constraints.real,
        "scale": constraints.positive,
        "log_low": constraints.real,
        "log_high": constraints.real,
    }
    has_rsample = True

    def __init__(
        self,
        loc: Tensor | float,
        scale: Tensor | float,
        log_low: Tensor | float = -20.0,
        log_high: Tensor | float = 0.0,
        validate_args: bool | None = None,
    ) -> None:
        check_parameters(loc=loc, scale=scale, log_low=log_low, log_high=log_high)
        self.loc, self.scale, self.log_low, self.log_high = broadcast_all(loc, scale, log_low, log_high)
        super().__init__(self.loc.shape, validate_args=validate_args)
        if self._validate_args:
            check_log_bounds(self.log_low, self.log_high)

    @constraints.dependent_property(is_discrete=False, event_dim=0)
    def support(self) -> constraints.Constraint:
        return log_interval(self.log_low, self.log_high)

    def expand(self, batch_shape: Any, _instance: Any = None) -> "TruncatedLogNormal":
        new = self._get_checked_instance(TruncatedLogNormal, _instance)
        for name in self.arg_constraints:
            setattr(new, name, getattr(self, name).expand(batch_shape))
        super(TruncatedLogNormal, new).__init__(torch.Size(batch_shape), validate_args=False)
        new._validate_args = self._validate_args
        return new

    def double_parameters(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return ``loc, scale, log_low, log_high`` in float64."""
        return self.loc.double(), self.scale.double(), self.log_low.double(), self.log_high.double()

    def interval_coordinates(self) -> tuple[Tensor, Tensor]:
        """Return distance to the nearest bound and width, in units of scale (see ``numerics``), in float64."""
        return numerics.interval_coordinates(*self.double_parameters())

    @property
    def log_normalizer(self) -> Tensor:
        r""":math:`\log Z`, the log mass of the untruncated normal inside the bounds."""
        distance, width = self.interval_coordinates()
        at_mode = -0.5 * distance.clamp(min=0) ** 2 - numerics.LOG_SQRT_2PI
        return (at_mode + numerics.log_integral(distance, width)).to(self.loc)

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        parameters = self.double_parameters()
        log_theta = torch.log(value.double())
        log_mass = torch.log(parameters[1]) + numerics.log_integral(*self.interval_coordinates())
        log_prob = -log_theta - numerics.relative_energy(log_theta, *parameters) - log_mass
        return torch.where(self.support.check(value), log_prob, -torch.inf).to(self.loc)

    def cdf(self, value: Tensor) -> Tensor:
        """Return P(theta <= value)."""
        loc, scale, low, high = self.double_parameters()
        log_theta = torch.minimum(torch.maximum(torch.log(value.double()), low), high)
        # Width zero is the lower bound itself, where the integral is zero but its gradient has no limit.
        above_low = log_theta > low
        end = torch.where(above_low, log_theta, high)
        below = numerics.interval_coordinates(loc, scale, low, end)
        log_below = numerics.log_integral(*below) - numerics.relative_energy(
            torch.clamp(loc, low, end), loc, scale, low, high
        )
        log_cdf = log_below - numerics.log_integral(*self.interval_coordinates())
        return torch.where(above_low, torch.exp(log_cdf.clamp(max=0)), 0.0).to(self.loc)

    def icdf(self, value: Tensor) -> Tensor:
        """Return the quantile at probability ``value``, differentiable in the parameters."""
        return torch.exp(self.log_icdf(value))

    def log_icdf(self, value: Tensor) -> Tensor:
        """Return the quantile of log(theta) at probability ``value``."""
        return numerics.quantile(value.double(), self.loc, self.scale, self.log_low, self.log_high)

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        dtype = torch.float32 if self.loc.dtype == torch.float32 else torch.float64
        return self.rsample_at(torch.rand(self._extended_shape(sample_shape), dtype=dtype, device=self.loc.device))

    def rsample_at(self, uniform: Tensor) -> Tensor:
        """Return the draw that each of ``uniform``, in [0, 1), stands for, differentiable in the parameters.

        Quickly in float32, where it is the quantile at ``uniform`` or at one less it; exactly otherwise.
        """
        if self.loc.dtype == torch.float32:
            return numerics.sample(uniform.float(), self.loc, self.scale, self.log_low, self.log_high)
        return self.icdf(uniform)

    def _tilted_coordinates(self, order: float) -> tuple[Tensor, Tensor]:
        """Return the coordinates of the density times theta^order: its centre moves by order * scale^2."""
        loc, scale, low, high = self.double_parameters()
        shift = order * scale
        return torch.maximum((low - loc) / scale - shift, (loc - high) / scale + shift), (high - low) / scale

    def _log_moment(self, order: int) -> Tensor:
        """Return log E[theta^order], of shape ``batch_shape``, in float64."""
        loc, scale, low, high = self.double_parameters()
        mode = torch.clamp(loc + order * scale**2, low, high)
        both = zip(self._tilted_coordinates(order), self.interval_coordinates(), strict=True)
        tilted, plain = numerics.log_integral(*(torch.stack(pair) for pair in both))
        log_mass = tilted - plain
        return order * mode - numerics.relative_energy(mode, loc, scale, low, high) + log_mass

    @property
    def mean(self) -> Tensor:
        return torch.exp(self._log_moment(1)).to(self.loc)

    @property
    def _log_relative_second_moment(self) -> Tensor:
        r"""Return :math:`\log E[\theta^2] / E[\theta]^2` in float64, the log of 1 + squared noise-to-signal.

        It is the second difference of the cumulant generating function of log(theta), so where the difference
        would cancel it is the integral of the tilted variance instead, a smooth positive function.
        """
        scale = self.scale.double()
        subtracted = self._log_moment(2) - 2 * self._log_moment(1)
        integrated = torch.zeros_like(scale)
        for node, weight in zip(_NODES.tolist(), _WEIGHTS.tolist(), strict=True):
            for order in (0.5 * (1 + node), 1.5 + 0.5 * node):
                hat = 1 - abs(order - 1)
                tilted = numerics.variance(*self._tilted_coordinates(order))
                integrated = integrated + 0.5 * weight * hat * tilted
        small = numerics.variance(*self.interval_coordinates()) * scale**2 < _SMALL_VARIANCE
        return torch.where(small, integrated * scale**2, subtracted)

    @property
    def variance(self) -> Tensor:
        relative = torch.expm1(self._log_relative_second_moment)
        return (torch.exp(2 * self._log_moment(1)) * relative).to(self.loc)

    @property
    def snr(self) -> Tensor:
        """Signal-to-noise ratio, mean over standard deviation."""
        return torch.rsqrt(torch.expm1(self._log_relative_second_moment)).to(self.loc)

    def double_log_theta_moments(self) -> tuple[Tensor, Tensor]:
        """Return mean and variance of log(theta) in float64."""
        loc, scale, low, high = self.double_parameters()
        coordinates = self.interval_coordinates()
        step = numerics.mean_displacement(*coordinates) * scale
        from_high = loc - high > low - loc
        mean = torch.clamp(loc, low, high) + torch.where(from_high, -step, step)
        return mean, numerics.variance(*coordinates) * scale**2

    @property
    def log_theta_mean(self) -> Tensor:
        """Mean of log(theta)."""
        return self.double_log_theta_moments()[0].to(self.loc)

    @property
    def log_theta_variance(self) -> Tensor:
        """Variance of log(theta)."""
        return self.double_log_theta_moments()[1].to(self.loc)

    def entropy(self) -> Tensor:
        """Return the differential entropy of theta, in nats."""
        distance, width = self.interval_coordinates()
        log_width = torch.log(self.log_high.double() - self.log_low.double())
        of_log_theta = log_width - numerics.kl_from_uniform(distance, width)
        return (of_log_theta + self.double_log_theta_moments()[0]).to(self.loc)
