"""Whether a network that has been loaded is the one that was saved."""

from typing import Any

import torch
from torch import Tensor, nn

from pyro_bmrs.io.torch_layers import kind_of, plain_attributes

__all__ = ["check_same"]


def check_same(loaded: nn.Module, net: nn.Module) -> None:
    """Raise ``ValueError`` naming the module or tensor in which ``loaded`` is not ``net``."""
    modules = [dict(each.named_modules(remove_duplicate=False)) for each in (loaded, net)]
    for name in modules[1].keys() ^ modules[0].keys():
        raise ValueError(f"module {name!r} would be lost; save its state_dict, and load that into an instance")
    for name, module in modules[1].items():
        again = modules[0][name]
        same = type(again) is type(module) and again.extra_repr() == module.extra_repr()
        if same and kind_of(module) is not None:
            same = plain_attributes(again) == plain_attributes(module)
        if not same:
            raise ValueError(
                f"module {name!r}, a {type(module).__name__}, would be {again!r} with other settings; save its "
                "state_dict, and load that into an instance"
            )
    slots = [_tensors(each) for each in (loaded, net)]
    for name in slots[1].keys() ^ slots[0].keys():
        raise ValueError(f"tensor {name!r} would be lost; save its state_dict, and load that into an instance")
    for name, tensor in slots[1].items():
        again, frozen = slots[0][name], tensor.requires_grad
        if not (_equal(again, tensor) and again.requires_grad == frozen):
            raise ValueError(f"tensor {name!r} would be another; save its state_dict, and load that into an instance")
    if _partition(slots[0]) != _partition(slots[1]):
        raise ValueError("parameters that are one and the same would no longer be; save the state_dict instead")


def _tensors(net: nn.Module) -> dict[str, Any]:
    named: Any = (*net.named_parameters(remove_duplicate=False), *net.named_buffers(remove_duplicate=False))
    return dict(named)


def _equal(one: Tensor, other: Tensor) -> bool:
    """Return whether two tensors are the same to the bit, NaN included."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    first, second = (each.detach().cpu().contiguous().reshape(-1) for each in (one, other))
    return not len(first) or torch.equal(first.view(torch.uint8), second.view(torch.uint8))


def _partition(tensors: dict[str, Tensor]) -> set[tuple[str, ...]]:
    """Return which names stand for one and the same parameter."""
    groups: dict[int, list[str]] = {}
    for name, tensor in tensors.items():
        if isinstance(tensor, nn.Parameter):
            groups.setdefault(id(tensor), []).append(name)
    return {tuple(sorted(names)) for names in groups.values() if len(names) > 1}
