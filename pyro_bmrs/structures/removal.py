"""Removing what a record says can go: noise at fixed values in a copy, then smaller tensors."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from pyro_bmrs.structures.attention import HeadwiseAttention
from pyro_bmrs.structures.copying import copied
from pyro_bmrs.structures.layers import ChannelGather, ChannelScale, ChannelScatter
from pyro_bmrs.structures.norms import narrow_norms
from pyro_bmrs.structures.points import noise_points, replace_everywhere
from pyro_bmrs.structures.record import Argument, Record, Site, Slot, positions

__all__ = [
    "adopt_attention",
    "aligned",
    "changed_arguments",
    "cut",
    "cut_tensors",
    "drop_hooks",
    "fixed_copy",
    "reader_inputs",
    "release_attention",
    "take",
]


class _FixedInput:
    """Multiplies the channels of some of a module's arguments by constants; an object, so that copies are whole.

    Args:
        scale: For each channel, of shape ``(channels,)``.
        arguments: Those that hold the channels.
    """

    def __init__(self, scale: Tensor, arguments: tuple[Argument, ...]) -> None:
        self.scale, self.arguments = scale, arguments

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        scale = self.scale
        return changed_arguments(
            self.arguments, args, kwargs, lambda x, each: x * aligned(scale.to(x.device, x.dtype), x, each.dim)
        )


def changed_arguments(
    arguments: tuple[Argument, ...],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    change: Callable[[Tensor, Argument], Tensor],
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return a module's arguments with some of them changed; what was one tensor stays one."""
    done: dict[int, Tensor] = {}
    new: dict[int | str, Any] = dict(enumerate(args))
    new.update(kwargs)
    for each in arguments:
        x = new.get(each.key)
        if isinstance(x, Tensor):
            if id(x) not in done:
                done[id(x)] = change(x, each)
            new[each.key] = done[id(x)]
    return tuple(new[i] for i in range(len(args))), {name: new[name] for name in kwargs}


def aligned(scale: Tensor, x: Tensor, dim: int) -> Tensor:
    """Return factors of shape ``(*leading, channels)`` to multiply ``x`` with, leading dimensions at its first ones."""
    leading = scale.shape[:-1]
    spread = scale.reshape(*leading, *(1,) * (x.dim() - 1 - len(leading)), scale.shape[-1])
    return spread.movedim(-1, dim)


def factors(values: Tensor, index: Tensor) -> Tensor:
    """Return the value of each position's structure, 1 where it has none."""
    index = index.to(values.device)
    return torch.where(
        index >= 0, values[..., index.clamp_min(0)], torch.ones((), dtype=values.dtype, device=values.device)
    )


def adopt_attention(net: nn.Module) -> None:
    """Have every ``nn.MultiheadAttention`` call its output projection as a module, in place."""
    for module in list(net.modules()):
        if type(module) is nn.MultiheadAttention:
            HeadwiseAttention.adopt(module)


def fixed_copy(net: nn.Module, record: Record, values: Mapping[str, Tensor]) -> nn.Module:
    """Return a copy of ``net`` in eval mode with all noise at fixed values, of shape ``(size,)`` for each site.

    Noise layers become ``ChannelScale``; noise from outside stands in hooks that ``cut`` takes away again.
    """
    net = copied(net).eval()
    adopt_attention(net)
    for name, point in noise_points(net).items():
        net = replace_everywhere(net, point, _Scale(name, values[name].detach().to(point.keep.device), point.dim))
    for name, site in record.sites.items():
        hook_readers(net, record, site, values[name].detach())
        if site.module is not None:
            hook = _FixedOutput(values[name].detach(), site.dim)
            net.get_submodule(site.module).register_forward_hook(hook, with_kwargs=True)
    return net


class _Scale(ChannelScale):
    """A noise layer at a fixed value, until it is folded or replaced."""

    def __init__(self, site: str, scale: Tensor, dim: int) -> None:
        super().__init__(scale, dim)
        self.site = site


class _FixedOutput:
    """Multiplies the channels of a module's output by constants."""

    def __init__(self, scale: Tensor, dim: int) -> None:
        self.scale, self.dim = scale, dim

    def __call__(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        x = output if isinstance(output, Tensor) else output[0]
        y = x * aligned(self.scale.to(x), x, self.dim)
        return y if isinstance(output, Tensor) else (y, *output[1:])


def hook_readers(net: nn.Module, record: Record, site: Site, values: Tensor) -> None:
    """Multiply the inputs of a site's readers by its values."""
    for module, (index, arguments) in reader_inputs(record, site).items():
        hook = _FixedInput(factors(values, index), arguments)
        net.get_submodule(module).register_forward_pre_hook(hook, with_kwargs=True)


def reader_inputs(record: Record, site: Site) -> dict[str, tuple[Tensor, tuple[Argument, ...]]]:
    """Return, for each module that reads a site's channels, the structure of each channel, and in which arguments."""
    inputs: dict[str, tuple[Tensor, tuple[Argument, ...]]] = {}
    for reader in site.readers:
        index, arguments = positions(site.before, record.slots[reader.slot]), reader.arguments
        if not arguments:
            continue
        if reader.module in inputs:
            arguments = tuple(dict.fromkeys((*inputs[reader.module][1], *arguments)))
        inputs[reader.module] = index, arguments
    return inputs


def drop_hooks(net: nn.Module, kinds: tuple[type, ...]) -> None:
    """Take hooks of these classes off all modules, in place."""
    for module in net.modules():
        for hooks, with_kwargs in (
            (module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs),
            (module._forward_hooks, module._forward_hooks_with_kwargs),
        ):
            for key in [key for key, hook in hooks.items() if isinstance(hook, kinds)]:
                del hooks[key]
                with_kwargs.pop(key, None)


def cut(net: nn.Module, record: Record, masks: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> nn.Module:
    """Take out of what ``fixed_copy`` returned all that the masks remove, in place, and return the network.

    Args:
        net: The copy.
        record: The record of the original.
        masks: For each site a bool tensor of shape ``(size,)``, True = keep.
        values: The noise, 0 where it is masked.
    """
    record = untied(net, record)
    dead = record.dead(masks)
    drop_hooks(net, (_FixedInput, _FixedOutput))
    scales = {module.site: module for module in net.modules() if isinstance(module, _Scale)}
    left: dict[str, list[nn.Module]] = {}
    for name, site in record.sites.items():
        left[name] = _left_behind(net, record, site, values[name], dead)
    norm_scales = {norm: _scale_of_norm(record, norm, values) for norm in record.averaged}
    cut_tensors(net, record, dead)
    net = narrow_norms(net, record, dead, norm_scales)
    for name, modules in left.items():
        site = record.sites[name]
        if name in scales:
            new = modules[0] if len(modules) == 1 else nn.Sequential(*modules) if modules else nn.Identity()
            net = replace_everywhere(net, scales[name], new)
        elif modules and site.module is not None:
            old = net.get_submodule(site.module)
            net = replace_everywhere(net, old, nn.Sequential(old, *modules))
    return net


def _scale_of_norm(record: Record, norm: str, values: Mapping[str, Tensor]) -> Tensor:
    """Return what all noise in front of a norm multiplies its channels with."""
    axis = record.averaged[norm]
    scale = torch.ones(len(axis), dtype=torch.float64)
    for name, site in record.sites.items():
        if any(reader.module == norm for reader in site.readers):
            scale = scale * factors(values[name].double().cpu(), positions(site.before, axis))
    return scale


def _left_behind(net: nn.Module, record: Record, site: Site, values: Tensor, dead: Tensor) -> list[nn.Module]:
    """Fold a site's noise into weights if possible, and return the layers that say the rest."""
    if site.after is None:
        fold(net, record, site.folds, site.before, values)
        return []
    device = next((p.device for p in net.parameters()), values.device)
    arriving, leaving = ~dead[site.before], ~dead[site.after]
    passing = arriving & leaving
    scale = values.to(device)[passing.to(device)]
    modules: list[nn.Module] = []
    if not torch.equal(passing, arriving):
        modules.append(ChannelGather(_ranks(arriving, passing).to(device), site.dim))
    if site.folds:
        fold(net, record, site.folds, site.after, values)
    elif site.maker is not None:
        fold(net, record, [(site.maker.weight, site.maker.dim)], site.before, values)
        if site.maker.bias is not None:
            fold(net, record, [(site.maker.bias, 0)], site.before, values)
    elif not torch.equal(scale, torch.ones_like(scale)):
        modules.append(ChannelScale(scale, site.dim))
    if not torch.equal(passing, leaving):
        modules.append(ChannelScatter(_ranks(leaving, passing).to(device), int(leaving.sum()), site.dim))
    return modules


def _ranks(among: Tensor, chosen: Tensor) -> Tensor:
    """Return where the chosen positions stand among others: increasing integers."""
    return (among.cumsum(0) - 1)[chosen]


def fold(net: nn.Module, record: Record, slots: Iterable[Slot], classes: Tensor, values: Tensor) -> None:
    """Multiply noise into parameters along some of their dimensions, in place."""
    for name, d in slots:
        owner, _, leaf = name.rpartition(".")
        parameter = getattr(net.get_submodule(owner), leaf)
        scale = factors(values, positions(classes, record.slots[name, d])).to(parameter)
        parameter.data = parameter.data * scale.view([-1 if i == d else 1 for i in range(parameter.dim())])


def untied(net: nn.Module, record: Record) -> Record:
    """Give readers whose weights have other uses weights of their own to multiply noise into, in place.

    Returns:
        The record with the new parameters in it.
    """
    before = dict(net.named_parameters())
    new: dict[Slot, list[str]] = {}
    for reader in dict.fromkeys(each for site in record.sites.values() for each in site.readers):
        module = net.get_submodule(reader.module)
        for leaf, parameter in list(module._parameters.items()):
            if reader.slot in record.shared and parameter is before[reader.slot[0]]:
                setattr(module, leaf, nn.Parameter(parameter.data.clone(), requires_grad=parameter.requires_grad))
                new.setdefault(reader.slot, []).append(f"{reader.module}.{leaf}".lstrip("."))
    if not new:
        return record
    now = {id(parameter): name for name, parameter in net.named_parameters()}
    names = {name: now.get(id(parameter), name) for name, parameter in before.items()}
    slots = {(names.get(name, name), d): axis for (name, d), axis in record.slots.items()}
    for (name, _), copies in new.items():
        axes = {d: axis for (other, d), axis in record.slots.items() if other == name}
        slots |= {(copy, d): axis for copy in copies for d, axis in axes.items()}

    def renamed(slot: Slot) -> list[Slot]:
        return [(each, slot[1]) for each in new.get(slot, [names.get(slot[0], slot[0])])]

    sites = {
        name: replace(site, folds=tuple(each for slot in site.folds for each in renamed(slot)))
        for name, site in record.sites.items()
    }
    return replace(record, slots=slots, sites=sites, parameters=frozenset(now.values()))


def cut_tensors(net: nn.Module, record: Record, dead: Tensor) -> None:
    """Cut parameters and buffers, in place, and tell modules their new sizes; parameters stay the same objects."""
    removed = record.removed(dead)
    parameters = dict(net.named_parameters())
    holders = _buffer_holders(net)
    for (name, d), removed_positions in removed.items():
        kept = (~removed_positions).nonzero().squeeze(1)
        if name in parameters:
            parameters[name].data = take(parameters[name].data, d, kept)
            parameters[name].grad = None
        else:
            owner, _, leaf = name.rpartition(".")
            old = getattr(net.get_submodule(owner), leaf)
            new = take(old, d, kept)
            for module, other in holders.get(id(old), []):
                module._buffers[other] = new
            holders[id(new)] = holders.get(id(old), [])
    for name, classes in record.heads.items():
        parent = name.rpartition(".")[0]
        for each in dict.fromkeys((name, parent)):
            refit_attention(net.get_submodule(each), classes, dead, name in record.guessed)
    for name, axis in record.counted.items():
        _refit_counts(net.get_submodule(name), int((~dead[axis]).sum()))
    refit(net)


def _refit_counts(module: Any, channels: int) -> None:
    """Tell a normalisation without tensors of its own how many channels it has left."""
    if isinstance(module, nn.GroupNorm):
        per_group = module.num_channels // module.num_groups
        module.num_channels, module.num_groups = channels, channels // per_group
    elif hasattr(module, "num_features"):
        module.num_features = channels


def _buffer_holders(net: nn.Module) -> dict[int, list[tuple[nn.Module, str]]]:
    holders: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in net.modules():
        for leaf, buffer in module._buffers.items():
            if buffer is not None:
                holders.setdefault(id(buffer), []).append((module, leaf))
    return holders


def take(tensor: Tensor, dim: int, kept: Tensor) -> Tensor:
    """Return the kept positions of one dimension in the tensor's memory layout, channels last for instance."""
    selected = tensor.index_select(dim, kept.to(tensor.device))
    outer_to_inner = sorted(range(tensor.dim()), key=tensor.stride, reverse=True)
    kind: Any = {"dtype": tensor.dtype, "device": tensor.device}
    return torch.empty_permuted(selected.shape, outer_to_inner, **kind).copy_(selected)


_NOT_HEADS = ("dim", "size", "width", "channel", "feature", "depth", "layer", "hidden", "embed", "idx", "index", "step")
_TOTALS = ("all_head_size", "inner_dim", "attention_inner_dim", "split_size")


def refit_attention(module: Any, classes: Tensor, dead: Tensor, guess: bool) -> None:
    """Tell a module that computes an attention how many heads it has left.

    It is told so in attributes with "head" in their name; if asked to guess, in all that have the number's value.
    """
    heads, left = len(classes), int((~dead[classes]).sum())
    if heads == left:
        return
    for name, value in list(vars(module).items()):
        if type(value) is not int or name.startswith("_"):
            continue
        if name in _TOTALS and value % heads == 0:
            setattr(module, name, value // heads * left)
        elif any(word in name.lower() for word in _NOT_HEADS):
            continue
        elif (guess and value == heads) or ("head" in name.lower() and value % heads == 0):
            setattr(module, name, value // heads * left)


def refit(net: nn.Module) -> None:
    """Tell layers of torch.nn the sizes of their tensors."""
    for each in net.modules():
        module: Any = each
        weight = getattr(module, "weight", None)
        if isinstance(module, nn.Linear):
            module.out_features, module.in_features = module.weight.shape
        elif isinstance(module, nn.modules.conv._ConvTransposeNd):
            groups = _groups(module, module.in_channels // module.groups, module.weight.shape[0])
            module.groups, module.in_channels = groups, module.weight.shape[0]
            module.out_channels = module.weight.shape[1] * groups
        elif isinstance(module, nn.modules.conv._ConvNd):
            groups = _groups(module, module.out_channels // module.groups, module.weight.shape[0])
            module.groups, module.out_channels = groups, module.weight.shape[0]
            module.in_channels = module.weight.shape[1] * groups
        elif isinstance(module, nn.GroupNorm) and weight is not None:
            per_group = module.num_channels // module.num_groups
            module.num_channels, module.num_groups = len(weight), len(weight) // per_group
        elif isinstance(module, nn.Embedding):
            module.num_embeddings, module.embedding_dim = module.weight.shape
        elif isinstance(module, nn.LayerNorm | nn.RMSNorm) and weight is not None:
            module.normalized_shape = tuple(weight.shape)
        elif hasattr(module, "num_features"):
            tensor = weight if weight is not None else getattr(module, "running_mean", None)
            if isinstance(tensor, Tensor):
                module.num_features = len(tensor)
        elif isinstance(module, nn.PReLU):
            module.num_parameters = len(module.weight)
        elif type(module).__name__ == "Conv1D" and hasattr(module, "nf"):
            module.nx, module.nf = module.weight.shape


def _groups(module: Any, per_group: int, channels: int) -> int:
    return 1 if module.groups == 1 else int(channels // per_group)


def release_attention(net: nn.Module) -> None:
    """Have attention that has kept all its heads be an ``nn.MultiheadAttention`` again, in place.

    Not where a layer has been replaced by several: PyTorch's fast path would look for its weights.
    """
    if any(isinstance(module, ChannelScale | ChannelGather | ChannelScatter) for module in net.modules()):
        return
    for module in list(net.modules()):
        if isinstance(module, HeadwiseAttention) and module.is_whole:
            module.release()
