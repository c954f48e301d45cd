"""Noise from outside: a site for each group of structures, multiplied in by hooks at the layers that read them."""

from collections.abc import Mapping
from typing import Any

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor, nn

from pyro_bmrs.checks import check_module
from pyro_bmrs.model.noise import MultiplicativeNoise
from pyro_bmrs.structures.attention import HeadwiseAttention
from pyro_bmrs.structures.points import Attachment
from pyro_bmrs.structures.record import Argument, Site
from pyro_bmrs.structures.removal import adopt_attention, changed_arguments, drop_hooks, reader_inputs
from pyro_bmrs.structures.structure_set import StructureSet, check_structures

__all__ = ["AttachedNoise", "attach_noise"]


def attach_noise(
    net: nn.Module, structures: StructureSet, prior: TorchDistribution | Mapping[str, TorchDistribution] | None = None
) -> "AttachedNoise":
    """Return ``net`` with noise on its structures, as a module to give to ``NoisyNetwork``.

    Each group of structures gets one site, ``"<group>.theta"``, and one factor for each structure. It multiplies the
    structures where layers read them, so that a structure with noise 0 is invisible, whatever stands in between. The
    network itself is used, not copied: its parameters are trained. Its class, attributes and ``state_dict`` stay as
    they are; hooks do the work, and every ``nn.MultiheadAttention`` in it becomes a ``HeadwiseAttention``, a subclass,
    until ``detach``.

    Args:
        net: The network that ``structures`` were found in.
        structures: What gets noise: all that ``find_structures`` returned, or what ``select`` left of it.
        prior: Prior on the noise, for all groups or for each by name; ``LogUniform(-20, 0)`` by default.

    Raises:
        TypeError: If an argument is of another type.
        ValueError: If there are no structures, they are of another network, or noise is attached already.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> noisy = bmrs.attach_noise(net, bmrs.find_structures(net, torch.randn(2, 4)))
        >>> model = bmrs.NoisyNetwork(noisy, num_data=100)
        >>> model.sizes
        {'0.theta': 8}
        >>> noisy.detach() is net
        True
    """
    return AttachedNoise(net, structures, prior)


class AttachedNoise(Attachment):
    """See ``attach_noise``.

    Attributes:
        net: The user's network.
        structures: What has noise, with the record of the network and these sites.
        noise: The noise layers; they run before the network does, and hooks read what they have drawn.
    """

    def __init__(
        self,
        net: nn.Module,
        structures: StructureSet,
        prior: TorchDistribution | Mapping[str, TorchDistribution] | None = None,
    ) -> None:
        _check(net, structures)
        super().__init__(net, structures.with_noise())
        unknown = [name for name in prior if name not in structures] if isinstance(prior, Mapping) else []
        if unknown:
            raise ValueError(f"prior names {unknown}, but the groups are {list(structures)}")
        self.noise = nn.ModuleDict()
        for name, each in structures.items():
            own = prior.get(name) if isinstance(prior, Mapping) else prior
            layer = MultiplicativeNoise(each.size, own, dim=-1)
            layer.site_name = name
            like = next((p for p in net.parameters()), torch.zeros(()))
            self.noise[_key(name)] = layer.to(like.device)
        self.training = net.training
        self._attach()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.check_attached()
        return self.net(*args, **kwargs)

    def detach(self) -> nn.Module:
        """Take the noise off again and return the network, as it was but for what training has made of its weights.

        Models around the noise cannot be run any more.
        """
        self.detached = True
        return self.detach_hooks(self.net)

    def detach_hooks(self, net: nn.Module) -> nn.Module:
        drop_hooks(net, (_ReaderHook, _OutputHook))
        for module in list(net.modules()):
            if isinstance(module, HeadwiseAttention) and module.is_whole:
                module.release()
        return net

    def follow(self, structures: StructureSet) -> None:
        """Take up what is left of the structures, once network and noise layers have been cut."""
        self.detach_hooks(self.net)
        self.structures = structures
        self._attach()

    def after_loading(self) -> None:
        record = self.structures.record
        layers: dict[str, Any] = {f"{name}.theta": self.noise[_key(name)] for name in self.structures}
        known = {site: record.sites[site].size for site in layers}
        if all(layer.size == known[site] for site, layer in layers.items()):
            self.follow(self.structures)
            return
        whole = {site: layer.original_size for site, layer in layers.items()}
        if whole != known:
            raise ValueError(
                f"the saved network was cut from one with {whole} structures, but the one passed to load has {known}: "
                "pass a whole one"
            )
        there = {site: layer.in_original(torch.ones_like(layer.keep), False) for site, layer in layers.items()}
        left = self.structures.without(record.dead(there, in_place=True))
        if any(left.record.sites[site].size != layer.size for site, layer in layers.items()):
            raise ValueError("the saved network was cut from another one than the one passed to load")
        self.follow(left)

    def _attach(self) -> None:
        adopt_attention(self.net)
        record = self.structures.record
        for name in self.structures:
            layer: Any = self.noise[_key(name)]
            site: Site = record.sites[f"{name}.theta"]
            for module, (index, arguments) in reader_inputs(record, site).items():
                hook = _ReaderHook(layer, index, arguments)
                self.net.get_submodule(module).register_forward_pre_hook(hook, with_kwargs=True)
            if site.module is not None:
                self.net.get_submodule(site.module).register_forward_hook(
                    _OutputHook(layer, site.dim), with_kwargs=True
                )


def _key(name: str) -> str:
    """Return the name of a group's noise layer: one without dots, and different from any attribute's."""
    return "/" + name.replace("/", "//").replace(".", "/")


def _check(net: nn.Module, structures: StructureSet) -> None:
    check_module("net", net)
    check_structures(net, structures)
    if len(structures) == 0:
        raise ValueError("there are no structures to attach noise to; print(structures) says why each was refused")
    for module in net.modules():
        hooks = (*module._forward_pre_hooks.values(), *module._forward_hooks.values())
        if any(isinstance(hook, _ReaderHook | _OutputHook) for hook in hooks):
            raise ValueError("the network has noise attached already: detach() that first, or attach all at once")


class _ReaderHook:
    """Multiplies channels of a module's arguments by a noise layer's draw; an object, so that copies are whole.

    Args:
        noise: The noise layer.
        index: Structure of each channel, -1 for none; shape ``(channels,)``.
        arguments: Those that hold the channels.
    """

    def __init__(self, noise: MultiplicativeNoise, index: Tensor, arguments: tuple[Argument, ...]) -> None:
        self.noise, self.arguments = noise, arguments
        self.partial = bool((index < 0).any())
        identity = torch.equal(index, torch.arange(noise.size))
        self.index = None if identity else torch.where(index < 0, noise.size, index)

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        theta = self.noise.factors()
        if theta is None:
            return None
        if self.index is not None:
            if self.index.device != theta.device:
                self.index = self.index.to(theta.device)
            padded = nn.functional.pad(theta, (0, 1), value=1.0) if self.partial else theta
            theta = padded.index_select(-1, self.index)
        factors = theta
        return changed_arguments(
            self.arguments, args, kwargs, lambda x, each: self.noise.multiply(x, factors, each.dim, each.batch)
        )


class _OutputHook:
    """Multiplies channels of a module's output by a noise layer's draw."""

    def __init__(self, noise: MultiplicativeNoise, dim: int) -> None:
        self.noise, self.dim = noise, dim

    def __call__(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        theta = self.noise.factors()
        if theta is None:
            return output
        x = output if isinstance(output, Tensor) else output[0]
        y = self.noise.multiply(x, theta, self.dim)
        return y if isinstance(output, Tensor) else (y, *output[1:])
