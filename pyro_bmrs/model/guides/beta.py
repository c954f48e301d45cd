r"""Beta noise: a family of its own in one file.

Everything else follows from the registries: the KL between Betas is torch's, the evidence change is the exponential
families' rule, and the guide's base class does the drawing, splitting and summing. What a family has to say is

- what its posterior's parameters are (``BetaGuide``), and
- what prior would remove a structure (its ``spike``).
"""

import math
from typing import Any

import torch
from pyro.distributions import Beta
from torch import Tensor, nn

from pyro_bmrs.bmr.reduced_priors import spike
from pyro_bmrs.checks import check_number
from pyro_bmrs.model.guides.flat import FlatGuide, at_least_float32
from pyro_bmrs.model.network import NoisyNetwork

__all__ = ["BetaGuide"]

LOG_CONCENTRATION_RANGE = (-7.0, 14.0)


class BetaGuide(FlatGuide):
    r"""Mean-field guide: :math:`\theta \sim \mathrm{Beta}(\alpha, \beta)` for the noise of every structure.

    Args:
        model: The model, whose noise layers have ``Beta`` priors.
        init_mean: Initial mean of the noise, in (0, 1).
        init_concentration: Initial :math:`\alpha + \beta`; more is less noise.

    Attributes:
        log_concentration1, log_concentration0: Parameters of shape ``(structures,)``, :math:`\log\alpha` and
            :math:`\log\beta`, used clamped to ``LOG_CONCENTRATION_RANGE``.

    Raises:
        TypeError: If a noise layer's prior is of another type.
        ValueError: If ``init_mean`` is not inside (0, 1), or ``init_concentration`` is not positive.

    Example:
        >>> from pyro.distributions import Beta
        >>> noise = bmrs.MultiplicativeNoise(8, prior=Beta(1.0, 1.0))
        >>> model = bmrs.NoisyNetwork(nn.Sequential(nn.Linear(4, 8), nn.Tanh(), noise, nn.Linear(8, 3)))
        >>> bmrs.BetaGuide(model).posterior()["2.theta"].mean[:2].detach()
        tensor([0.9500, 0.9500])
    """

    prior_types = (Beta,)
    parameter_ranges = dict.fromkeys(("log_concentration1", "log_concentration0"), LOG_CONCENTRATION_RANGE)

    def __init__(self, model: NoisyNetwork, init_mean: float = 0.95, init_concentration: float = 50.0) -> None:
        super().__init__(model)
        if not 0 < check_number("init_mean", init_mean) < 1:
            raise ValueError(f"init_mean must lie inside (0, 1), but got {init_mean}")
        check_number("init_concentration", init_concentration)
        like = at_least_float32(torch.cat([prior.concentration1 for prior in self.prior().values()]))
        self.log_concentration1 = nn.Parameter(torch.full_like(like, math.log(init_mean * init_concentration)))
        self.log_concentration0 = nn.Parameter(torch.full_like(like, math.log((1 - init_mean) * init_concentration)))

    def family(self, index: slice | Tensor = slice(None)) -> Beta:
        one, zero = (
            torch.exp(parameter[index].clamp(*LOG_CONCENTRATION_RANGE))
            for parameter in (self.log_concentration1, self.log_concentration0)
        )
        return _Beta(one, zero, validate_args=False)


class _Beta(Beta):
    r"""A Beta whose draws can be mapped over replicas, which torch's own cannot.

    :math:`\theta = G_1 / (G_1 + G_0)` with Gamma draws, of whose logarithms small concentrations leave enough:
    :math:`\log G_a = \log G_{a+1} + \log(U) / a`.
    """

    def rsample(self, sample_shape: torch.Size | tuple[int, ...] = ()) -> Tensor:
        shape = self._extended_shape(torch.Size(sample_shape))
        logs = []
        for concentration in (self.concentration1, self.concentration0):
            a = concentration.expand(shape)
            uniform = torch.rand_like(a).clamp_min(torch.finfo(a.dtype).tiny)
            logs.append(torch.log(torch._standard_gamma(a + 1)) + torch.log(uniform) / a)
        return torch.sigmoid(logs[0] - logs[1])


@spike.register(Beta)
def _spike_at_zero(prior: Any, scale: float = 1e-6) -> Beta:
    """Return a Beta of the prior's first concentration and mean about ``scale``."""
    return Beta(prior.concentration1, prior.concentration1 / scale, validate_args=False)
