"""Where noise stands inside a network: what discovery and removal need to know of a noise layer."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from pyro_bmrs.structures.structure_set import StructureSet

__all__ = ["Attachment", "NoiseError", "NoisePoint", "noise_points", "replace_everywhere"]


class NoiseError(ValueError):
    """Noise does not fit the network that it stands in, whatever the inputs."""


class NoisePoint(nn.Module):
    """A layer that multiplies each position along one dimension of its input by a number of its own.

    Args:
        size: Number of positions, the input's extent along ``dim``.
        dim: Dimension of the input that indexes them.

    Attributes:
        keep: Buffer of shape ``(size,)``, bool; False where a structure has been removed.
        index: Buffer of shape ``(size,)``: which structure of the original network each one is, in increasing order.
        original_size: Number of structures of the original network, before any was cut out.
        site_name: Name of the site where it is not the layer's own name in the network.
    """

    keep: Tensor
    index: Tensor

    def __init__(self, size: int, dim: int) -> None:
        super().__init__()
        self.size, self.original_size, self.dim = size, size, dim
        self.site_name: str | None = None
        self.register_buffer("keep", torch.ones(size, dtype=torch.bool))
        self.register_buffer("index", torch.arange(size))

    @property
    def original_keep(self) -> Tensor:
        """Which structures of the original network remain, bool of shape ``(original_size,)``."""
        return self.in_original(self.keep, False)

    def in_original(self, values: Tensor, missing: float) -> Tensor:
        """Return values of shape ``(size,)`` as ``(original_size,)``, ``missing`` where a structure has been cut."""
        original = values.new_full((self.original_size,), missing)
        original[self.index.to(values.device)] = values
        return original

    def after_loading(self) -> None:
        """Adapt to buffers and sizes that have been read from a file."""

    def select(self, kept: Tensor) -> None:
        """Become a layer of the structures at the positions ``kept``, in place."""
        raise NotImplementedError


class Attachment(nn.Module):
    """A network with noise attached from outside.

    Args:
        net: The network.
        structures: What has noise, with the record of the network and of these sites.

    Attributes:
        detached: Whether the noise has been taken off again.
    """

    def __init__(self, net: nn.Module, structures: "StructureSet") -> None:
        super().__init__()
        self.net, self.structures, self.detached = net, structures, False

    def check_attached(self) -> None:
        """Raise ``NoiseError`` if the noise has been detached."""
        if self.detached:
            raise NoiseError("the noise has been detached from this network: attach it again, and make a model of that")

    def detach_hooks(self, net: nn.Module) -> nn.Module:
        """Take the noise's hooks off ``net``, the network or a copy of it, and return it."""
        raise NotImplementedError

    def after_loading(self) -> None:
        """Adapt to a network and noise layers that have been read from a file."""
        raise NotImplementedError

    def follow(self, structures: "StructureSet") -> None:
        """Take up what is left of the structures, once network and noise layers have been cut."""
        raise NotImplementedError


def noise_points(net: nn.Module) -> dict[str, NoisePoint]:
    """Return the noise layers of ``net`` by site name, in the order in which they were registered."""
    return dict(_named_points(net))


def _named_points(net: nn.Module) -> Iterator[tuple[str, NoisePoint]]:
    for name, module in net.named_modules():
        if isinstance(module, NoisePoint):
            own = name if module.site_name is None else module.site_name
            yield (f"{own}.theta" if own else "theta"), module


def replace_everywhere(net: nn.Module, old: nn.Module, new: nn.Module) -> nn.Module:
    """Put ``new`` in the place of ``old``, under all its names, and return the network."""
    if net is old:
        return new
    for module in list(net.modules()):
        for name, child in module._modules.items():
            if child is old:
                module._modules[name] = new
    return net
