"""The variational posterior over all noise: one flat vector of each parameter."""

from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.nn import PyroModule
from torch import Tensor, nn
from torch.distributions import kl_divergence

from pyro_bmrs.distributions import LogUniform, TruncatedLogNormal
from pyro_bmrs.model import NoisyNetwork
from pyro_bmrs.noise import fix_noise

__all__ = ["LOG_SCALE_RANGE", "TruncatedLogNormalGuide"]

LOG_SCALE_RANGE = (-20.0, 5.0)


class TruncatedLogNormalGuide(PyroModule):
    r"""Mean-field guide: a truncated log-normal for the noise of every structure.

    Its parameters are two vectors over all structures of all sites, there from construction on. All noise is drawn
    in one operation and its KL is one call, which is what makes a step cheap; ``posterior()`` gives the sites back.

    Args:
        model: The model whose noise layers have log-uniform priors; the posterior takes over their bounds.
        init_loc: Initial location of :math:`\log\theta`.
        init_log_scale: Initial log standard deviation of :math:`\log\theta`.

    Attributes:
        loc: Parameter of shape ``(structures,)``, any real number.
        log_scale: Parameter of shape ``(structures,)``, used clamped to ``LOG_SCALE_RANGE``.
        sizes: Number of structures of each site, in the order of the vectors.

    Raises:
        TypeError: If a noise layer's prior is not log-uniform.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), bmrs.MultiplicativeNoise(8), nn.Linear(8, 3))
        >>> guide = bmrs.TruncatedLogNormalGuide(bmrs.NoisyNetwork(net, num_data=100))
        >>> guide.posterior()["2.theta"].mean.shape
        torch.Size([8])
    """

    def __init__(self, model: NoisyNetwork, init_loc: float = 0.0, init_log_scale: float = -5.0) -> None:
        super().__init__(type(self).__name__)
        layers = model.noise
        for site, layer in layers.items():
            if not isinstance(layer.prior, LogUniform):
                raise TypeError(
                    f"site {site!r} has a {type(layer.prior).__name__} prior, but this guide is for LogUniform ones; "
                    "write a guide with one sample statement a site instead"
                )
        self.sizes: dict[str, int] = model.sizes
        self._model = (model,)  # a tuple, so that the model's parameters are not this module's too
        priors = [layer.prior for layer in layers.values()]
        self.register_buffer("log_low", torch.cat([prior.log_low for prior in priors]))
        self.register_buffer("log_high", torch.cat([prior.log_high for prior in priors]))
        self.loc = nn.Parameter(torch.full_like(self.log_low, init_loc))
        self.log_scale = nn.Parameter(torch.full_like(self.log_low, init_log_scale))

    @property
    def keep(self) -> Tensor:
        """Which structures remain, of shape ``(structures,)``, bool."""
        return torch.cat([layer.keep for layer in self._model[0].noise.values()])

    def flat_posterior(self) -> TruncatedLogNormal:
        """Return the posterior over all structures, of ``batch_shape`` ``(structures,)``."""
        scale = torch.exp(self.log_scale.clamp(*LOG_SCALE_RANGE))
        return TruncatedLogNormal(self.loc, scale, self.log_low, self.log_high, validate_args=False)

    def flat_prior(self) -> LogUniform:
        """Return the prior over all structures, of ``batch_shape`` ``(structures,)``."""
        return LogUniform(self.log_low, self.log_high, validate_args=False)

    def split(self, flat: Tensor) -> dict[str, Tensor]:
        """Split ``(..., structures)`` into one ``(..., size)`` a site."""
        return dict(zip(self.sizes, flat.split(list(self.sizes.values()), dim=-1), strict=True))

    def posterior(self) -> dict[str, TruncatedLogNormal]:
        """Return the posterior of each site, of ``batch_shape`` ``(size,)``."""
        flat = self.flat_posterior()
        loc, scale, low, high = map(self.split, (flat.loc, flat.scale, flat.log_low, flat.log_high))
        return {
            site: TruncatedLogNormal(loc[site], scale[site], low[site], high[site], validate_args=False)
            for site in self.sizes
        }

    def prior(self) -> dict[str, LogUniform]:
        """Return the prior of each site, of ``batch_shape`` ``(size,)``."""
        low, high = self.split(self.log_low), self.split(self.log_high)
        return {site: LogUniform(low[site], high[site], validate_args=False) for site in self.sizes}

    def mean(self) -> dict[str, Tensor]:
        """Return the posterior mean of each site's noise, of shape ``(size,)``."""
        return self.split(self.flat_posterior().mean)

    def draw(self, sample_shape: tuple[int, ...] = ()) -> dict[str, Tensor]:
        """Draw all noise at once: a tensor of shape ``(*sample_shape, size)`` for each site."""
        return self.split(self.flat_posterior().rsample(sample_shape))

    def kl(self) -> Tensor:
        """Return the KL from the prior, summed over the structures that remain, in nats."""
        return (kl_divergence(self.flat_posterior(), self.flat_prior()) * self.keep).sum()

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Make one sample site for each noise layer of the model; takes and ignores the model's arguments."""
        model = self._model[0]
        layers, values = model.noise, self.draw()
        with fix_noise(values), poutine.scale(scale=model.kl_weight):
            for site, posterior in self.posterior().items():
                pyro.sample(site, layers[site].site_distribution(posterior))
        return values
