"""Which tensors of a network a structure owns: found on its dependency graph, not assumed of its layers.

A structure's noise stands somewhere between the layers that produce it and those that consume it. Torch-Pruning's
dependency graph says which, for any nn.Module it can trace; this module reads from it, for every noise site, the axes
of the layers' tensors along which its structures lie, and where its noise can be folded into weights.
"""

import copy
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch_pruning
from torch import Tensor, nn
from torch_pruning.pruner.function import BasePruningFunc

from pyro_bmrs.noise import noise_layers

__all__ = ["Axis", "ChannelGather", "ChannelScale", "Structures", "find_structures", "replace_module", "scaled_copy"]

_WEIGHTED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)

# Operations f with f(c * x) = c * f(x) for c >= 0, each channel by itself: noise may pass through them.
_HOMOGENEOUS = (
    "Relu", "LeakyRelu", "MaxPool", "AvgPool", "AdaptiveMaxPool", "AdaptiveAvgPool",
    "Mean", "Sum", "View", "UnsafeView", "ReshapeAlias", "Permute", "Transpose", "Squeeze", "Unsqueeze", "Clone",
    "Upsample", "Alias",
)  # fmt: skip


class ChannelScale(nn.Module):
    """Multiply each channel by a constant: noise at a fixed value, where it cannot be folded into weights.

    Args:
        scale: Factors, of shape ``(channels,)``.
        dim: Dimension of the input that indexes channels.
    """

    scale: Tensor

    def __init__(self, scale: Tensor, dim: int = 1) -> None:
        super().__init__()
        self.register_buffer("scale", scale)
        self.dim = dim

    def forward(self, x: Tensor) -> Tensor:
        shape = [1] * x.dim()
        shape[self.dim] = -1
        return x * self.scale.view(shape)


class ChannelGather(nn.Module):
    """Pass on some of the channels: where what remains is finer than what a layer produces, or is an input.

    Args:
        index: Channels to pass on, of shape ``(channels,)``.
        dim: Dimension of the input that indexes channels.
    """

    index: Tensor

    def __init__(self, index: Tensor, dim: int = 1) -> None:
        super().__init__()
        self.register_buffer("index", index)
        self.dim = dim

    def forward(self, x: Tensor) -> Tensor:
        return x.index_select(self.dim, self.index)


@dataclass(frozen=True)
class Axis:
    """An axis of a layer's tensors along which a site's structures lie.

    Attributes:
        module: Qualified name of the layer.
        side: ``"out"`` for the layer that produces them (or normalises them), ``"in"`` for one that consumes them.
        index: For every position on the axis, the structure it belongs to, -1 for none; shape ``(positions,)``.
    """

    module: str
    side: Literal["out", "in"]
    index: Tensor


@dataclass(frozen=True)
class Structures:
    """What one site's structures consist of.

    Attributes:
        axes: The tensor axes that shrink when a structure goes.
        producer: Layer into whose outgoing weights the noise can be folded, or None.
        consumers: Layers into whose incoming weights it can be folded, or None if some path does not allow it.
        gathered: Whether no layer produces just these structures (inputs of the network, single positions of feature
            maps), so that the consumers' axes alone shrink, and what remains is gathered in front of them.
    """

    axes: tuple[Axis, ...]
    producer: str | None
    consumers: tuple[str, ...] | None
    gathered: bool = False

    def side(self, side: Literal["out", "in"]) -> Iterator[Axis]:
        """Iterate over the axes on one side."""
        return (axis for axis in self.axes if axis.side == side)


def scaled_copy(net: nn.Module, scales: Mapping[str, Tensor]) -> tuple[nn.Module, dict[str, str]]:
    """Return a copy of ``net`` in eval mode with its noise at fixed values, and the scale's name for each site."""
    net = copy.deepcopy(net).eval()
    layers = noise_layers(net)
    names = {id(module): name for name, module in net.named_modules()}
    located = {site: names[id(layer)] for site, layer in layers.items()}
    for site, layer in layers.items():
        scale = ChannelScale(scales[site].detach().to(layer.keep.device), layer.dim)
        net = replace_module(net, located[site], scale)
    return net, located


def replace_module(net: nn.Module, name: str, module: nn.Module) -> nn.Module:
    """Put ``module`` in the place of the submodule called ``name`` and return the network."""
    if not name:
        return module
    parent, _, child = name.rpartition(".")
    setattr(net.get_submodule(parent), child, module)
    return net


def find_structures(net: nn.Module, example_input: Tensor) -> dict[str, Structures]:
    """Trace a noisy network once and return what each site's structures consist of.

    Args:
        net: Network with noise layers; it is copied, not changed.
        example_input: Inputs of shape ``(batch, ...)`` to trace it with.

    Raises:
        ValueError: If a site's structures are consumed by nothing, or by layers that cannot shrink.
    """
    ones = {site: torch.ones(layer.size) for site, layer in noise_layers(net).items()}
    net, located = scaled_copy(net, ones)
    net.requires_grad_(True)
    if example_input.is_floating_point():
        example_input = example_input.detach().clone().requires_grad_()  # or noise on inputs leaves no trace
    with torch.enable_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about modules it cannot prune, which are none of ours
        graph = torch_pruning.DependencyGraph().build_dependency(
            net, example_input, customized_pruners={ChannelScale: _ScalePruner()}, verbose=False
        )
    names = {module: name for name, module in net.named_modules()}
    return {site: _site_structures(graph, net.get_submodule(name), names, site) for site, name in located.items()}


class _ScalePruner(BasePruningFunc):
    """Tells the dependency graph that a ChannelScale has channels; the graph is only ever read."""

    def prune_out_channels(self, layer: ChannelScale, idxs: list[int]) -> nn.Module:
        raise NotImplementedError

    prune_in_channels = prune_out_channels

    def get_out_channels(self, layer: ChannelScale) -> int:
        return len(layer.scale)

    get_in_channels = get_out_channels


def _site_structures(graph: Any, scale: Any, names: dict[nn.Module, str], site: str) -> Structures:
    pruner = graph.get_pruner_of_module(scale)
    size = len(scale.scale)
    axes, produced = [], torch.zeros(size, dtype=torch.bool)
    for item in graph.get_pruning_group(scale, pruner.prune_out_channels, list(range(size))):
        module = item.dep.target.module
        if module not in names or isinstance(module, ChannelScale):
            continue
        if not isinstance(module, _WEIGHTED + _NORMS) or getattr(module, "groups", 1) != 1:
            raise ValueError(
                f"the structures of {site!r} reach {names[module]!r}, a {type(module).__name__} that cannot shrink; "
                "move the noise behind it, or leave this site out"
            )
        side: Literal["out", "in"] = "in" if "in_channels" in item.dep.handler.__name__ else "out"
        positions = (
            module.weight.shape[1 if side == "in" else 0] if isinstance(module, _WEIGHTED) else module.num_features
        )
        index = torch.full((positions,), -1)
        index[torch.tensor(item.idxs)] = torch.tensor(item.root_idxs)
        axes.append(Axis(names[module], "out" if isinstance(module, _NORMS) else side, index))
        if side == "out" and isinstance(module, _WEIGHTED):
            produced[index[index >= 0]] = True
    node = graph.module2node[scale]
    consumers = _consumers(node, names)
    if not produced.all():  # inputs of the network, or finer than what the layer before them makes
        axes = [axis for axis in axes if axis.side == "in" and axis.module in (consumers or ())]
    if not any(axis.side == "in" for axis in axes):
        raise ValueError(
            f"nothing consumes the structures of {site!r}, so removing one would change the network's output; put "
            "noise between layers only"
        )
    if not produced.all():
        return Structures(tuple(axes), None, consumers, gathered=True)
    return Structures(tuple(axes), _producer(node, names), consumers)


def _producer(node: Any, names: dict[nn.Module, str]) -> str | None:
    """Walk up from the noise through homogeneous operations to the one layer that feeds nothing else."""
    while len(node.inputs) == 1:
        node = node.inputs[0]
        if len(set(map(id, node.outputs))) != 1:
            return None
        if isinstance(node.module, _WEIGHTED + _NORMS):
            return names[node.module] if node.module.weight is not None else None
        if not _is_homogeneous(node):
            return None
    return None


def _consumers(node: Any, names: dict[nn.Module, str]) -> tuple[str, ...] | None:
    """Walk down all paths from the noise through homogeneous operations to the layers that consume it."""
    found: list[str] = []
    for output in node.outputs:
        if isinstance(output.module, _WEIGHTED):
            found.append(names[output.module])
        elif _is_homogeneous(output) and len(output.inputs) == 1:
            below = _consumers(output, names)
            if below is None:
                return None
            found.extend(below)
        else:
            return None
    return tuple(found) or None


def _is_homogeneous(node: Any) -> bool:
    name = node.grad_fn.name() if node.grad_fn is not None else ""
    return name.startswith(_HOMOGENEOUS)
