"""The guide of log-uniform and truncated log-normal noise."""

import torch
from torch import Tensor, nn

from pyro_bmrs.checks import check_number
from pyro_bmrs.distributions import LogUniform, TruncatedLogNormal
from pyro_bmrs.model.guides.flat import FlatGuide, at_least_float32
from pyro_bmrs.model.network import NoisyNetwork

__all__ = ["LOC_RANGE", "LOG_SCALE_RANGE", "TruncatedLogNormalGuide"]

LOC_RANGE = (-1000.0, 1000.0)  # beyond, nothing that a posterior can say changes, and float32 runs out of digits
LOG_SCALE_RANGE = (-20.0, 5.0)


def _check_inside(name: str, value: float, bounds: tuple[float, float]) -> None:
    if not bounds[0] <= check_number(name, value, positive=False) <= bounds[1]:
        raise ValueError(f"{name} must lie between {bounds[0]:g} and {bounds[1]:g}, but got {value}")


class TruncatedLogNormalGuide(FlatGuide):
    r"""Mean-field guide: a truncated log-normal for the noise of every structure.

    Args:
        model: The model whose noise layers have log-uniform or truncated log-normal priors; the posterior takes over
            their bounds.
        init_loc: Initial location of :math:`\log\theta`.
        init_log_scale: Initial log standard deviation of :math:`\log\theta`.

    Attributes:
        loc: Parameter of shape ``(structures,)``; fitting keeps it within ``LOC_RANGE``.
        log_scale: Parameter of shape ``(structures,)``, used clamped to ``LOG_SCALE_RANGE``.

    Raises:
        TypeError: If a noise layer's prior is of another type, or an initial value is no number.
        ValueError: If an initial value lies outside the range of its parameter.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), bmrs.MultiplicativeNoise(8), nn.Linear(8, 3))
        >>> guide = bmrs.TruncatedLogNormalGuide(bmrs.NoisyNetwork(net, num_data=100))
        >>> guide.posterior()["2.theta"].mean.shape
        torch.Size([8])
    """

    prior_types = (LogUniform, TruncatedLogNormal)

    def __init__(self, model: NoisyNetwork, init_loc: float = 0.0, init_log_scale: float = -5.0) -> None:
        super().__init__(model)
        _check_inside("init_loc", init_loc, LOC_RANGE)
        _check_inside("init_log_scale", init_log_scale, LOG_SCALE_RANGE)
        priors = list(self.prior().values())
        self.register_buffer("log_low", at_least_float32(torch.cat([prior.log_low for prior in priors])))
        self.register_buffer("log_high", at_least_float32(torch.cat([prior.log_high for prior in priors])))
        self.loc = nn.Parameter(torch.full_like(self.log_low, init_loc))
        self.log_scale = nn.Parameter(torch.full_like(self.log_low, init_log_scale))

    @torch.no_grad()
    def project_(self) -> None:
        self.loc.clamp_(*LOC_RANGE)
        self.log_scale.clamp_(*LOG_SCALE_RANGE)

    def family(self, index: slice | Tensor = slice(None)) -> TruncatedLogNormal:
        scale = torch.exp(self.log_scale[index].clamp(*LOG_SCALE_RANGE))
        return TruncatedLogNormal(
            self.loc[index], scale, self.log_low[index], self.log_high[index], validate_args=False
        )
