"""From masks to a smaller network in the middle of its training: weights, posterior and optimiser state, in place."""

import copy
import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from pyro_bmrs.guide import FlatGuide
from pyro_bmrs.model import NoisyNetwork
from pyro_bmrs.noise import MultiplicativeNoise, noise_layers
from pyro_bmrs.structures import Axis, find_structures, replace_module
from pyro_bmrs.surgery import check_equal, keep_positions, received_inputs, take

__all__ = ["shrink"]


@torch.no_grad()
def shrink(model: NoisyNetwork, guide: FlatGuide, optimizer: Optimizer, example_input: Tensor) -> dict[str, Tensor]:
    """Take the structures that the model's masks remove out of network, guide and optimiser, and train on faster.

    The steps that follow are those of the masked network: same losses, same weights, same posteriors of what remains.
    That holds for a structure from which, with its noise at zero, nothing reaches the layers behind, whatever the
    weights. Others stay, masked: where ``f(0)`` of what stands behind the noise is not zero (a sigmoid), or may become
    so (batch normalisation), the next layer's weights for them are a bias that goes on learning. So do structures that
    no layer produces one by one (pixels of a filter's map), those that share a layer's positions with structures which
    are kept, and the first of a layer that would lose all: layers cannot be empty.

    "The same" is up to rounding, of which Adam makes whole steps where a gradient is nothing else: a bias in front of
    batch normalisation drifts differently, which the loss does not feel, and running means follow it.

    Parameters stay the same objects with smaller data, and lose their gradients; what the optimiser remembers of them
    is cut alike. Whatever has recorded their sizes or addresses (a compiled or captured step, a DDP wrapper, a graph
    kept from an earlier loss) has to be made again.

    Args:
        model: The model, its network cut in place.
        guide: Its guide, cut in place.
        optimizer: Any optimiser that remembers, for each parameter, numbers and tensors of the parameter's shape.
        example_input: Inputs of shape ``(batch, ...)``, to trace the network with and to check the result on.

    Returns:
        For each site the positions kept, among those before the call: increasing integers of shape ``(new size,)``, on
        the CPU.

    Raises:
        ValueError: If the structures of a site cannot be found, or the optimiser remembers something else.
        RuntimeError: If a copy, cut first, has other outputs than the masked network. Nothing has been changed then.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), bmrs.MultiplicativeNoise(8), nn.Linear(8, 3))
        >>> model = bmrs.NoisyNetwork(net, num_data=100)
        >>> guide = bmrs.TruncatedLogNormalGuide(model)
        >>> optimizer = torch.optim.Adam([*model.parameters(), *guide.parameters()])
        >>> model.noise["2.theta"].remove(torch.arange(8) < 5)
        >>> bmrs.shrink(model, guide, optimizer, torch.randn(2, 4))
        {'2.theta': tensor([5, 6, 7])}
        >>> net[0]
        Linear(in_features=4, out_features=3, bias=True)
    """
    kept = {site: torch.arange(size) for site, size in model.sizes.items()}
    if bool(guide.keep.all()):
        return kept
    _check_state(optimizer)
    example_input = example_input.to(guide.device)
    axes = _axes_of_sites(model.net, example_input)
    removed = _removable_positions(model.net, axes, example_input)
    kept = {site: (~removed[_key(parts[-1])]).nonzero().squeeze(1) for site, parts in axes.items()}
    _try_on_copy(model.net, removed, example_input)
    _cut(model.net, removed, optimizer)
    ends = torch.tensor(list(guide.sizes.values())).cumsum(0).tolist()
    starts = [0, *ends[:-1]]
    flat = torch.cat([start + kept[site] for start, site in zip(starts, guide.sizes, strict=True)]).to(guide.device)
    _keep_memory(optimizer, guide.parameters(), 0, flat)
    guide.select(flat)
    return kept


def _key(axis: Axis) -> tuple[str, str]:
    return axis.module, axis.side


def _axes_of_sites(net: nn.Module, x: Tensor) -> dict[str, list[Axis]]:
    """Return the axes of each site's structures, the last that of its own noise layer."""
    names = {id(module): name for name, module in net.named_modules()}
    noise = {site: Axis(names[id(layer)], "out", torch.arange(layer.size)) for site, layer in noise_layers(net).items()}
    return {site: [*parts.axes, noise[site]] for site, parts in find_structures(net, x[:2]).items()}


def _removable_positions(net: nn.Module, axes: Mapping[str, list[Axis]], x: Tensor) -> dict[tuple[str, str], Tensor]:
    """Return, for every layer and side, which positions can go without a trace.

    A structure goes if all its positions do; a position goes if all structures that it belongs to do, if nothing is
    received there, and if it is not the last. So strike out what cannot go until all the rest can.
    """
    gone = {
        site: ~layer.keep.cpu() & _is_produced(net, axes[site], layer.size) for site, layer in noise_layers(net).items()
    }
    consumers = dict.fromkeys(axis.module for parts in axes.values() for axis in parts if axis.side == "in")
    received = received_inputs(_tainted(net), consumers, _nan_like(x[:1]))
    silent = {(name, "in"): (values == 0).all(1).cpu() for name, values in received.items()}
    while True:
        going = _positions_of(gone, axes, silent)
        whole = {site: each & _all_going(axes[site], going, len(each)) for site, each in gone.items()}
        if all(torch.equal(whole[site], gone[site]) for site in gone):
            return going
        gone = whole


def _is_produced(net: nn.Module, axes: list[Axis], size: int) -> bool:
    """Return whether layers with weights produce all of a site's structures, each one at a position of its own."""
    producers = [
        axis.index
        for axis in axes
        if axis.side == "out" and any(p.dim() > 1 for p in net.get_submodule(axis.module).parameters(recurse=False))
    ]
    return bool(torch.isin(torch.arange(size), torch.cat(producers)).all()) if producers else False


def _positions_of(
    gone: Mapping[str, Tensor], axes: Mapping[str, list[Axis]], silent: Mapping[tuple[str, str], Tensor]
) -> dict[tuple[str, str], Tensor]:
    """Return which positions belong to structures that go, and to no others, but never all of an axis."""
    owned: dict[tuple[str, str], Tensor] = {}
    going: dict[tuple[str, str], Tensor] = {}
    for site, parts in axes.items():
        for axis in parts:
            key, own = _key(axis), axis.index >= 0
            owned[key] = owned.get(key, torch.zeros_like(own)) | own
            going[key] = going.get(key, silent.get(key, torch.ones_like(own))) & (gone[site][axis.index] | ~own)
    for key, each in going.items():
        each.logical_and_(owned[key])
        each[0] &= not bool(each.all())
    return going


def _all_going(axes: list[Axis], going: Mapping[tuple[str, str], Tensor], size: int) -> Tensor:
    """Return which of a site's structures lose every position that they own."""
    result = torch.ones(size, dtype=torch.bool)
    for axis in axes:
        staying = axis.index[~going[_key(axis)]]
        result[staying[staying >= 0]] = False
    return result


class _Gate(nn.Module):
    """Let pass what a noise layer keeps, and exact zeros for the rest, whatever comes in."""

    def __init__(self, noise: MultiplicativeNoise) -> None:
        super().__init__()
        self.keep, self.dim = noise.keep, noise.dim

    def forward(self, x: Tensor) -> Tensor:
        return x.movedim(self.dim, -1).where(self.keep, 0.0).movedim(-1, self.dim)


def _tainted(net: nn.Module) -> nn.Module:
    """Return a copy that is NaN wherever anything but a mask has a say: what is zero there is so for all weights.

    Zeros seen in the network itself would not do: a ReLU that is off for the example may be on for the next one.
    """
    net = copy.deepcopy(net).eval()
    for tensor in (*net.parameters(), *net.buffers()):
        tensor.copy_(_nan_like(tensor))
    names = {id(module): name for name, module in net.named_modules()}
    for layer in noise_layers(net).values():
        net = replace_module(net, names[id(layer)], _Gate(layer))
    return net


def _nan_like(tensor: Tensor) -> Tensor:
    return torch.full_like(tensor, math.nan) if tensor.is_floating_point() else tensor


def _try_on_copy(net: nn.Module, removed: Mapping[tuple[str, str], Tensor], x: Tensor) -> None:
    net = copy.deepcopy(net).eval()
    for layer in noise_layers(net).values():
        layer.site = None  # it only masks
    expected = net(x)
    _cut(net, removed)
    check_equal(net(x), expected)


def _cut(net: nn.Module, removed: Mapping[tuple[str, str], Tensor], optimizer: Optimizer | None = None) -> None:
    """Take the removed positions out of the network's layers and of what the optimiser remembers of them."""
    for (name, side), positions in removed.items():
        layer, kept = net.get_submodule(name), (~positions).nonzero().squeeze(1)
        if len(kept) == len(positions):
            continue
        if isinstance(layer, MultiplicativeNoise):
            layer.select(kept)
            continue
        if optimizer is not None:
            _keep_memory(optimizer, layer.parameters(recurse=False), 1 if side == "in" else 0, kept)
        keep_positions(layer, side, kept)


def _keep_memory(optimizer: Optimizer, parameters: Iterable[nn.Parameter], dim: int, kept: Tensor) -> None:
    """Cut what the optimiser remembers of parameters, before they are cut themselves."""
    for parameter in parameters:
        if parameter.dim() > dim and parameter in optimizer.state:
            memory: dict[str, Any] = optimizer.state[parameter]
            for name, value in memory.items():
                if isinstance(value, Tensor) and value.shape == parameter.shape:
                    memory[name] = take(value, dim, kept)


def _check_state(optimizer: Optimizer) -> None:
    for parameter, memory in optimizer.state.items():
        for name, value in memory.items():
            cuttable = isinstance(value, Tensor) and (value.dim() == 0 or value.shape == parameter.shape)
            if not (cuttable or value is None or isinstance(value, int | float)):
                found = f"tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
                raise ValueError(
                    f"{type(optimizer).__name__} remembers {name!r}, a {found}, of a parameter of shape "
                    f"{tuple(parameter.shape)}, which cannot be cut with it; use an optimiser such as Adam or SGD, or "
                    "leave the structures masked"
                )
