"""The variational posterior over all noise: one flat vector of each parameter."""

from abc import abstractmethod
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.distributions import TorchDistribution
from pyro.nn import PyroModule
from torch import Tensor
from torch.distributions import kl_divergence

from pyro_bmrs.model.network import NoisyNetwork
from pyro_bmrs.model.noise import MultiplicativeNoise, fix_noise

__all__ = ["FlatGuide"]


class FlatGuide(PyroModule):
    """Mean-field guide of one family for the noise of every structure, whatever the family.

    Parameters are vectors over all structures of all sites, there from construction on. All noise is drawn in one
    operation, and the KL is one call for each type of prior. A subclass names the prior types it is for, adds its
    parameters in ``__init__``, and says in ``family`` what distribution they stand for.

    Args:
        model: The model whose noise layers it is the posterior of.

    Attributes:
        sizes: Number of structures of each site, in the order of the vectors.
        prior_types: Types of prior that the family can be a posterior for.

    Raises:
        TypeError: If a noise layer's prior is of another type.
    """

    prior_types: tuple[type[TorchDistribution], ...] = ()

    def __init__(self, model: NoisyNetwork) -> None:
        super().__init__(type(self).__name__)
        for site, layer in model.noise.items():
            if not isinstance(layer.prior, self.prior_types):
                names = " or ".join(kind.__name__ for kind in self.prior_types)
                raise TypeError(
                    f"site {site!r} has a {type(layer.prior).__name__} prior, but {type(self).__name__} is for "
                    f"{names} ones; use another guide, or write one with one sample statement a site"
                )
        self.sizes: dict[str, int] = model.sizes
        self._model = (model,)  # a tuple, so that the model's parameters are not this module's too
        self._prior_groups = self._group_priors()
        weights = [torch.full_like(layer.keep, layer.kl_weight, dtype=torch.float32) for layer in model.noise.values()]
        self.register_buffer("_kl_weights", torch.cat(weights), persistent=False)

    @abstractmethod
    def family(self, index: slice | Tensor = slice(None)) -> TorchDistribution:
        """Return the posterior of the structures at ``index`` of the flat vectors, of ``batch_shape`` ``(count,)``."""

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next(self.parameters()).device

    @property
    def keep(self) -> Tensor:
        """Which structures remain, of shape ``(structures,)``, bool."""
        return torch.cat([layer.keep for layer in self._model[0].noise.values()])

    @property
    def noise(self) -> dict[str, MultiplicativeNoise]:
        """The noise layers of the model, by site name."""
        return self._model[0].noise

    def flat_posterior(self) -> TorchDistribution:
        """Return the posterior over all structures, of ``batch_shape`` ``(structures,)``."""
        return self.family()

    def project_(self) -> None:
        """Bring parameters back, in place, into the range that the family documents; called after every step."""

    def split(self, flat: Tensor) -> dict[str, Tensor]:
        """Split ``(..., structures)`` into one ``(..., size)`` a site."""
        return dict(zip(self.sizes, flat.split(list(self.sizes.values()), dim=-1), strict=True))

    def posterior(self) -> dict[str, TorchDistribution]:
        """Return the posterior of each site, of ``batch_shape`` ``(size,)``."""
        start, posteriors = 0, {}
        for site, size in self.sizes.items():
            posteriors[site] = self.family(slice(start, start + size))
            start += size
        return posteriors

    def prior(self) -> dict[str, TorchDistribution]:
        """Return the prior of each site, of ``batch_shape`` ``(size,)``."""
        return {site: layer.prior for site, layer in self._model[0].noise.items()}

    def mean(self) -> dict[str, Tensor]:
        """Return the posterior mean of each site's noise, of shape ``(size,)``."""
        return self.split(self.flat_posterior().mean)

    def draw(self, sample_shape: tuple[int, ...] = ()) -> dict[str, Tensor]:
        """Draw all noise at once: a tensor of shape ``(*sample_shape, size)`` for each site."""
        return self.split(self.flat_posterior().rsample(sample_shape))

    def kl(self) -> Tensor:
        """Return the KL from the prior, summed over the structures that remain, in nats; sites by their weight."""
        counted = self.keep * self._kl_weights
        total = torch.zeros((), device=counted.device)
        for kind, index, prior in self._prior_groups:
            parameters = {name: getattr(self, buffer) for name, buffer in prior.items()}
            selected = slice(None) if index is None else getattr(self, index)
            divergence = kl_divergence(self.family(selected), kind(**parameters, validate_args=False))
            total = total + (divergence * counted[selected]).sum()
        return total

    def select(self, kept: Tensor) -> None:
        """Become the guide of the structures at ``kept`` of the flat vectors, in place, as the noise layers have.

        Parameters stay the same objects. Buffers of a subclass count as one entry a structure if their first dimension
        has that size.
        """
        structures = sum(self.sizes.values())
        for parameter in self.parameters():
            parameter.data = parameter.data[kept]
            parameter.grad = None
        for name, buffer in list(self.named_buffers(recurse=False)):
            if buffer.shape[:1] == (structures,):
                setattr(self, name, buffer[kept])
        self.sizes = self._model[0].sizes
        self._prior_groups = self._group_priors()

    def _group_priors(self) -> list[tuple[type[TorchDistribution], str | None, dict[str, str]]]:
        """Store the priors' parameters as one buffer for each type of prior, and return how to find them."""
        priors = self.prior()
        kinds = list(dict.fromkeys(type(prior) for prior in priors.values()))
        site_of = torch.repeat_interleave(torch.arange(len(self.sizes)), torch.tensor(list(self.sizes.values())))
        groups = []
        for i, kind in enumerate(kinds):
            members = [k for k, prior in enumerate(priors.values()) if type(prior) is kind]
            names = {name: f"_prior{i}_{name}" for name in kind.arg_constraints}
            for name, buffer in names.items():
                values = [getattr(list(priors.values())[k], name) for k in members]
                self.register_buffer(buffer, torch.cat(values), persistent=False)
            index = None
            if len(kinds) > 1:
                index = f"_prior{i}_index"
                of_kind = torch.isin(site_of, torch.tensor(members))
                self.register_buffer(index, of_kind.nonzero().squeeze(1).to(self.keep.device), persistent=False)
            groups.append((kind, index, names))
        return groups

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Make one sample site for each noise layer of the model; takes and ignores the model's arguments."""
        model = self._model[0]
        layers, values = model.noise, self.draw()
        with fix_noise(values), poutine.scale(scale=model.kl_weight):
            for site, posterior in self.posterior().items():
                with poutine.scale(scale=layers[site].kl_weight):
                    pyro.sample(site, layers[site].site_distribution(posterior))
        return values
