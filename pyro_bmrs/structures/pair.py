"""A model and its guide: what removal needs to know of them, and whether they belong together."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pyro_bmrs.checks import described
from pyro_bmrs.structures.points import NoisePoint

__all__ = ["NoisePosterior", "NoisyModel", "check_model", "check_pair", "sum_of"]


class NoisyModel:
    """A Pyro model around a network with noise.

    Attributes:
        net: The network.
    """

    net: nn.Module

    @property
    def noise(self) -> Mapping[str, NoisePoint]:
        """The noise layers by site name."""
        raise NotImplementedError


class NoisePosterior:
    """The posterior of a model's noise, by site: what is asked of a guide once it is fitted.

    A subclass says what its model is, and the marginal posterior of each site; the rest follows for independent ones.
    """

    @property
    def model(self) -> NoisyModel:
        """The model that it is the posterior of."""
        raise NotImplementedError

    def posterior(self) -> Mapping[str, Any]:
        """Return the posterior of each site, of ``batch_shape`` ``(size,)``."""
        raise NotImplementedError

    @property
    def sizes(self) -> dict[str, int]:
        """Number of structures of each site."""
        return {site: layer.size for site, layer in self.model.noise.items()}

    @property
    def noise(self) -> Mapping[str, Any]:
        """The noise layers of the model, by site name."""
        return self.model.noise

    @property
    def keep(self) -> Tensor:
        """Which structures remain, of shape ``(structures,)``, bool."""
        return self.join({site: layer.keep for site, layer in self.noise.items()})

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.keep.device

    def prior(self) -> dict[str, Any]:
        """Return the prior of each site, of ``batch_shape`` ``(size,)``."""
        return {site: layer.prior for site, layer in self.noise.items()}

    def mean(self) -> dict[str, Tensor]:
        """Return the posterior mean of each site's noise, of shape ``(size,)``."""
        return {site: posterior.mean for site, posterior in self.posterior().items()}

    def points(self) -> dict[str, Tensor]:
        """Return the mean of each site's noise, and a value of each other latent site that the guide has."""
        return self.mean()

    def split(self, flat: Tensor) -> dict[str, Tensor]:
        """Split ``(..., structures)`` into one ``(..., size)`` per site."""
        return dict(zip(self.sizes, flat.split(list(self.sizes.values()), dim=-1), strict=True))

    def join(self, by_site: Mapping[str, Tensor]) -> Tensor:
        """Join one ``(..., size)`` per site to ``(..., structures)``, as ``split`` takes it apart."""
        return torch.cat([by_site[site] for site in self.sizes], -1)

    def draw(self, sample_shape: tuple[int, ...] = ()) -> dict[str, Tensor]:
        """Draw all noise at once: a tensor of shape ``(*sample_shape, size)`` for each site."""
        return {site: posterior.rsample(sample_shape) for site, posterior in self.posterior().items()}

    def draw_with_log_prob(self, draws: int) -> tuple[dict[str, Tensor], Tensor]:
        """Return draws of every latent site, and the log of their joint density, of shape ``(draws,)``.

        Those of noise are of shape ``(draws, size)``; of other latent sites, if the guide has any, ``(draws, ...)``.
        """
        thetas = self.draw((draws,))
        posteriors = self.posterior().items()
        return thetas, sum_of(posterior.log_prob(thetas[site]).double().sum(-1) for site, posterior in posteriors)

    def kl(self) -> Tensor:
        """Return the KL from the prior, summed over the structures that remain, in nats."""
        raise NotImplementedError

    def after_loading(self) -> None:
        """Adapt to parameters and buffers that have been read from a file."""


def check_model(model: Any) -> None:
    """Raise ``TypeError`` unless ``model`` is a noisy model."""
    if isinstance(model, NoisyModel):
        return
    hint = ""
    if isinstance(model, nn.Module):
        hint = "; make one of it: NoisyNetwork(attach_noise(net, find_structures(net, x)))"
    elif callable(model) and not isinstance(model, type):
        hint = "; fit any other Pyro program with pyro.infer.SVI"
    raise TypeError(f"model must be a NoisyNetwork, but got {described(model)}{hint}")


def check_pair(model: Any, guide: Any) -> None:
    """Raise unless ``guide`` is the guide of ``model``: the one place where this is checked.

    Raises:
        TypeError: If one of them is something else.
        ValueError: If the guide is of another model, or of other structures than the model has now.
    """
    check_model(model)
    if not isinstance(guide, NoisePosterior):
        raise TypeError(
            f"guide must be one that is made of the model, for instance TruncatedLogNormalGuide(model), but got "
            f"{described(guide)}; other guides are fitted with pyro.infer.SVI"
        )
    if guide.model is not model:
        raise ValueError(
            f"guide is the guide of another model than the one given: make {type(guide).__name__}(model) of this one, "
            "or copy both at once, model, guide = copy.deepcopy((model, guide))"
        )
    sizes = {site: layer.size for site, layer in model.noise.items()}
    if guide.sizes != sizes:
        raise ValueError(
            f"guide has {guide.sizes} structures, but the model has {sizes}: load or shrink both, or make a new guide"
        )


def sum_of(terms: Iterable[Tensor]) -> Tensor:
    """Return the sum of tensors, of which there is at least one."""
    first, *others = terms
    for each in others:
        first = first + each
    return first
