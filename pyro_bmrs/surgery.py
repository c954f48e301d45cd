"""From masks to a smaller plain nn.Module, exactly."""

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from pyro_bmrs.cost import removed_positions
from pyro_bmrs.guide import FlatGuide
from pyro_bmrs.model import NoisyNetwork
from pyro_bmrs.prediction import check_masks
from pyro_bmrs.structures import ChannelGather, ChannelScale, Structures, find_structures, replace_module, scaled_copy

__all__ = ["check_equal", "compact", "keep_positions", "received_inputs", "take"]

_TOLERANCE = 1e-4  # relative; the surgery is exact, so anything above rounding is a fault


def compact(
    model: NoisyNetwork,
    guide: FlatGuide,
    masks: Mapping[str, Tensor] | None,
    example_input: Tensor,
) -> nn.Module:
    r"""Return the network without the structures that the masks remove: a smaller, plain nn.Module.

    Its outputs are those of ``predict(model, guide, x, masks)``: every :math:`\theta` at its posterior mean, folded
    into the weights of the layer before it, or of the layers behind it where an activation such as tanh stands between.
    Where neither is possible a ``ChannelScale`` remains; a ``ChannelGather`` stands in front of layers some of whose
    inputs are removed without a layer that produces just those. Noise layers become ``nn.Identity``, so that names and
    indices of the other layers stay. A site that keeps none leaves one structure, with zero noise: layers cannot be
    empty.

    Args:
        model: The model; neither it nor its network is changed.
        guide: Its guide.
        masks: For each site a bool tensor of shape ``(size,)``, True = keep; None, and sites left out, keep what
            has not been removed so far.
        example_input: Inputs of shape ``(batch, ...)``, to trace the network with and to check the result on.

    Returns:
        The network in eval mode, on the model's device.

    Raises:
        ValueError: If a mask does not fit, or a removed structure leaves something behind that no bias can hold.
        RuntimeError: If the smaller network's outputs differ from the masked one's on ``example_input``.
    """
    masks = check_masks(model, masks)
    source = model.net
    example_input = example_input.to(next(source.parameters()).device)
    structures = find_structures(source, example_input[:2])
    net, located = scaled_copy(source, {site: mean * masks[site] for site, mean in guide.mean().items()})
    with torch.no_grad():
        expected = net(example_input)
        removed = removed_positions(structures, masks)
        _move_constants_to_biases(net, removed, example_input)
        for site, name in located.items():
            net = _fold(net, name, structures[site], masks[site])
            if structures[site].gathered:
                index = _remaining_of_arriving(site, structures, masks, removed).to(example_input.device)
                net = replace_module(net, name, ChannelGather(index, model.noise[site].dim))
        for (name, side), positions in removed.items():
            keep_positions(net.get_submodule(name), side, (~positions).nonzero().squeeze(1))
        check_equal(net(example_input), expected)
    return net


def _move_constants_to_biases(net: nn.Module, removed: Mapping[tuple[str, str], Tensor], x: Tensor) -> None:
    """Add to each consumer's bias what it gets from structures about to go: f(0) of what stands between, often 0."""
    consumers = {name: gone.to(x.device) for (name, side), gone in removed.items() if side == "in" and gone.any()}
    for name, received in received_inputs(net, consumers, x).items():
        layer: Any = net.get_submodule(name)
        gone = consumers[name]
        values = received[gone]
        if not values.any():
            continue
        constant = values[:, 0]
        padded = not isinstance(layer, nn.Linear) and any(p != 0 for p in layer.padding)
        if padded or not torch.allclose(values, constant.unsqueeze(1).expand_as(values), atol=1e-6):
            raise ValueError(
                f"structures that layer {name!r} consumes cannot go: with noise zero they still send it something that "
                "no bias can hold; put the noise directly behind the activation"
            )
        effect = layer.weight[:, gone].reshape(len(layer.weight), len(constant), -1).sum(2) @ constant
        layer.bias = nn.Parameter(effect if layer.bias is None else layer.bias + effect)


def received_inputs(net: nn.Module, names: Iterable[str], x: Tensor) -> dict[str, Tensor]:
    """Run ``net`` on ``x`` and return what each input position of the named layers gets: ``(positions, values)``."""
    seen: dict[str, Tensor] = {}
    with ExitStack() as hooks:
        for name in names:

            def note(layer: nn.Module, inputs: tuple[Tensor, ...], name: str = name) -> None:
                values = inputs[0].movedim(-1 if isinstance(layer, nn.Linear) else 1, 0).flatten(1)
                seen[name] = torch.cat([seen[name], values], 1) if name in seen else values  # a layer used twice

            hooks.callback(net.get_submodule(name).register_forward_pre_hook(note).remove)
        net(x)
    return seen


def _fold(net: nn.Module, name: str, parts: Structures, mask: Tensor) -> nn.Module:
    """Multiply the noise of one site into weights, or keep it for the structures that remain."""
    noise: Any = net.get_submodule(name)
    scale: Tensor = noise.scale
    if parts.producer is not None:
        producer: Any = net.get_submodule(parts.producer)
        producer.weight.mul_(scale.view(-1, *(1,) * (producer.weight.dim() - 1)))
        if producer.bias is not None:
            producer.bias.mul_(scale)
    elif parts.consumers is not None:
        for axis in (axis for axis in parts.side("in") if axis.module in parts.consumers):
            consumer: Any = net.get_submodule(axis.module)
            index = axis.index.to(scale.device)
            factors = torch.where(index >= 0, scale[index], 1.0)
            consumer.weight.mul_(factors.view(1, -1, *(1,) * (consumer.weight.dim() - 2)))
    else:
        kept = mask if mask.any() else torch.arange(len(mask), device=mask.device) == 0
        return replace_module(net, name, ChannelScale(scale[kept], noise.dim))
    return replace_module(net, name, nn.Identity())


def _remaining_of_arriving(
    site: str,
    structures: Mapping[str, Structures],
    masks: Mapping[str, Tensor],
    removed: Mapping[tuple[str, str], Tensor],
) -> Tensor:
    """Return which of the structures that still arrive at a site remain, once other sites' are gone."""
    axis = structures[site].axes[0]
    key = (axis.module, axis.side)
    others = {other: parts for other, parts in structures.items() if other != site}
    lost_before = removed_positions(others, masks).get(key, torch.zeros_like(removed[key]))
    arriving, remaining = (axis.index[~gone].unique() for gone in (lost_before, removed[key]))
    return torch.searchsorted(arriving[arriving >= 0], remaining[remaining >= 0])


_SIZES = {"in": ("in_features", "in_channels"), "out": ("out_features", "out_channels", "num_features")}


def keep_positions(layer: nn.Module, side: str, kept: Tensor) -> None:
    """Cut every tensor of a layer down to the kept positions of one side; parameters stay the same objects."""
    dim = 1 if side == "in" else 0
    for parameter in layer.parameters(recurse=False):
        if parameter.dim() > dim:
            parameter.data = take(parameter.data, dim, kept)
            parameter.grad = None
    for name, buffer in list(layer.named_buffers(recurse=False)):
        if buffer.dim() > dim:
            setattr(layer, name, take(buffer, dim, kept))
    for attribute in _SIZES[side]:
        if hasattr(layer, attribute):
            setattr(layer, attribute, len(kept))


def take(tensor: Tensor, dim: int, kept: Tensor) -> Tensor:
    """Return the kept positions of one dimension in the tensor's memory layout, channels last for instance."""
    selected = tensor.index_select(dim, kept.to(tensor.device))
    outer_to_inner = sorted(range(tensor.dim()), key=tensor.stride, reverse=True)
    kind: Any = {"dtype": tensor.dtype, "device": tensor.device}
    return torch.empty_permuted(selected.shape, outer_to_inner, **kind).copy_(selected)


def check_equal(found: Tensor, expected: Tensor) -> None:
    """Raise ``RuntimeError`` if surgery has changed a network's outputs by more than rounding."""
    if found.shape != expected.shape:
        raise RuntimeError(f"surgery changed the output's shape from {tuple(expected.shape)} to {tuple(found.shape)}")
    error = (found - expected).abs().max().item()
    if error > _TOLERANCE * (1 + expected.abs().max().item()):
        raise RuntimeError(
            f"the smaller network differs from the masked one by {error:.2g}: its dependency graph was misread; please "
            "report the architecture"
        )
