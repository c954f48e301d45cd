r"""Priors on the noise to compare, and the families of posterior for them; hard concrete noise is here in full."""

import math
from collections import OrderedDict
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from pyro.distributions import Beta, Delta, Gamma, LogNormal, TorchDistribution
from pyro.infer.autoguide import AutoNormal
from pyro.nn import PyroModule, PyroSample
from torch import Tensor, nn
from torch.distributions import constraints, register_kl
from torch.nn.functional import logsigmoid

import pyro_bmrs as bmrs
from analysis.examples.your_own import GammaGuide

__all__ = ["PRIORS", "HardConcrete", "HardConcreteGuide", "LayerScale", "Noise"]

_TEMPERATURE, _STRETCH = 2 / 3, 0.1  # as Louizos et al. (2018) have them
_EDGE = math.log((1 + _STRETCH) / _STRETCH)  # beyond it, on either side, the noise is 0 or 1


class HardConcrete(TorchDistribution):
    r"""Noise from 0 to 1 that is exactly 0 or 1 with positive probability.

    .. math:: \theta = \min(1, \max(0, 1.2\, \sigma(x) - 0.1)), \quad x = (\mathrm{logit}(u) + a) / (2/3)

    Args:
        location: :math:`a`, of any shape: larger is nearer to 1.

    References:
        Learning Sparse Neural Networks through L0 Regularization (Louizos et al., 2018)
        https://arxiv.org/abs/1712.01312
    """

    arg_constraints = {"location": constraints.real}
    support = constraints.interval(0.0, 1.0)
    has_rsample = True

    def __init__(self, location: Tensor | float, validate_args: bool | None = None) -> None:
        self.location = torch.as_tensor(location)
        super().__init__(self.location.shape, validate_args=validate_args)

    def expand(self, batch_shape: Any, _instance: Any = None) -> "HardConcrete":
        return HardConcrete(self.location.expand(batch_shape), validate_args=False)

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        a = self.location.expand(self._extended_shape(torch.Size(sample_shape)))
        uniform = torch.rand_like(a).clamp(1e-6, 1 - 1e-6)
        return _noise((torch.logit(uniform) + a) / _TEMPERATURE).clamp(0, 1)

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the log of the probability at 0 and 1, and of the density between."""
        inside = (value > 0) & (value < 1)
        s = (torch.where(inside, value, 0.5) + _STRETCH) / (1 + 2 * _STRETCH)
        density = self._log_density(torch.logit(s)) - torch.log((1 + 2 * _STRETCH) * s * (1 - s))
        return torch.where(inside, density, torch.where(value > 0, self.log_one, self.log_zero))

    @property
    def log_zero(self) -> Tensor:
        """Log probability of 0."""
        return logsigmoid(-_TEMPERATURE * _EDGE - self.location)

    @property
    def log_one(self) -> Tensor:
        """Log probability of 1."""
        return logsigmoid(self.location - _TEMPERATURE * _EDGE)

    @property
    def mean(self) -> Tensor:
        nodes, weights = _rule(self.location)
        return self.log_one.exp() + (_noise(nodes) * self._density_at(nodes)) @ weights

    @property
    def variance(self) -> Tensor:
        nodes, weights = _rule(self.location)
        second = self.log_one.exp() + (_noise(nodes).square() * self._density_at(nodes)) @ weights
        return (second - self.mean.square()).clamp_min(0)

    def _log_density(self, x: Tensor) -> Tensor:
        """Return the log density of what is squashed."""
        distance = _TEMPERATURE * x - self.location
        return math.log(_TEMPERATURE) + logsigmoid(distance) + logsigmoid(-distance)

    def _density_at(self, nodes: Tensor) -> Tensor:
        return HardConcrete(self.location.unsqueeze(-1), validate_args=False)._log_density(nodes).exp()


def _noise(x: Tensor) -> Tensor:
    return (1 + 2 * _STRETCH) * torch.sigmoid(x) - _STRETCH


def _rule(like: Tensor) -> tuple[Tensor, Tensor]:
    """Return nodes and weights of a Gauss-Legendre rule between the edges, exact to 1e-9 for what is averaged here."""
    return tuple(each.to(like) for each in _gauss_legendre())  # type: ignore[return-value]


@cache
def _gauss_legendre() -> tuple[Tensor, Tensor]:
    nodes, weights = np.polynomial.legendre.leggauss(32)
    return _EDGE * torch.from_numpy(nodes), _EDGE * torch.from_numpy(weights)


@register_kl(HardConcrete, HardConcrete)
def _kl(q: HardConcrete, p: HardConcrete) -> Tensor:
    nodes, weights = _rule(q.location)
    at_edges = q.log_zero.exp() * (q.log_zero - p.log_zero) + q.log_one.exp() * (q.log_one - p.log_one)
    wide = [HardConcrete(each.location.unsqueeze(-1), validate_args=False)._log_density(nodes) for each in (q, p)]
    return at_edges + (wide[0].exp() * (wide[0] - wide[1])) @ weights


@bmrs.spike.register(HardConcrete)
def _spike(prior: Any, scale: float = 1e-6) -> Delta:
    """Return the reduced prior that BMRS_N compares with: exactly 0, which has a probability; no width is needed."""
    return Delta(torch.zeros_like(prior.location))


class HardConcreteGuide(bmrs.FlatGuide):
    """Mean-field guide of hard concrete noise.

    Attributes:
        location: Parameter of shape ``(structures,)``.
    """

    prior_types = (HardConcrete,)

    def __init__(self, model: bmrs.NoisyNetwork) -> None:
        super().__init__(model)
        self.location = nn.Parameter(torch.full((sum(self.sizes.values()),), 5.0))  # a mean of 0.97

    def family(self, index: slice | Tensor = slice(None)) -> HardConcrete:
        """Return the posterior of the structures at ``index``."""
        return HardConcrete(self.location[index], validate_args=False)


class LayerScale(PyroModule):
    """Multiplies by a scale that all structures of a layer share; its logarithm has a standard normal prior."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = PyroSample(LogNormal(0.0, 1.0))

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x`` times the scale."""
        return x * self.scale


@dataclass(frozen=True)
class Noise:
    """A prior on the noise of each structure, and the guide for it.

    Attributes:
        prior: The prior.
        guide: The guide.
        layer_scales: Whether each layer has a scale besides, with a posterior of its own: a hierarchical prior on what
            a structure is multiplied by, the product of its layer's scale and its noise.
    """

    prior: TorchDistribution
    guide: type[bmrs.FlatGuide] = bmrs.TruncatedLogNormalGuide
    layer_scales: bool = False

    def model(self, net: nn.Sequential, kl_weight: float) -> tuple[bmrs.NoisyNetwork, bmrs.FlatGuide]:
        """Return a model of a network with noise layers, whose noise has this prior, and its guide."""
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        for name, module in net.named_children():
            if isinstance(module, bmrs.MultiplicativeNoise):
                layers[name] = bmrs.MultiplicativeNoise(module.size, self.prior)
                if self.layer_scales:
                    layers[f"{name}_scale"] = LayerScale()
            else:
                layers[name] = module
        kind = PyroModule[nn.Sequential] if self.layer_scales else nn.Sequential  # which names the scales' sites
        model = bmrs.NoisyNetwork(kind(layers), kl_weight=kl_weight)
        guide = self.guide(model)
        return model, guide.add_latents(AutoNormal) if self.layer_scales else guide


PRIORS: dict[str, Noise] = {
    "log-uniform, up to 1": Noise(bmrs.LogUniform(-20.0, 0.0)),
    "log-uniform, up to e": Noise(bmrs.LogUniform(-20.0, 1.0)),
    "log-uniform, up to e^2": Noise(bmrs.LogUniform(-20.0, 2.0)),
    "truncated log-normal, -10 and 10, up to 1": Noise(bmrs.TruncatedLogNormal(-10.0, 10.0, -20.0, 0.0)),
    "Beta(0.2, 0.2)": Noise(Beta(0.2, 0.2), bmrs.BetaGuide),
    "Gamma(0.2, 0.2)": Noise(Gamma(0.2, 0.2), GammaGuide),
    "log-uniform, up to 1, times a scale per layer": Noise(bmrs.LogUniform(-20.0, 0.0), layer_scales=True),
    "hard concrete, 0 with probability 0.8": Noise(HardConcrete(-3.0), HardConcreteGuide),
}
