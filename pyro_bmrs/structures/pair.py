"""A model and its guide: what removal needs to know of them, and whether they belong together."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from pyro_bmrs.checks import described
from pyro_bmrs.structures.points import NoisePoint

__all__ = ["NoisePosterior", "NoisyModel", "check_model", "check_pair"]


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
    """A guide for the noise of one model."""

    @property
    def model(self) -> NoisyModel:
        """The model that it is the posterior of."""
        raise NotImplementedError

    @property
    def sizes(self) -> dict[str, int]:
        """Number of structures of each site."""
        raise NotImplementedError

    def after_loading(self) -> None:
        """Hear that parameters and buffers have been replaced by those of a file."""
        raise NotImplementedError


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
