"""What a network is, in words that JSON can hold: the tree of its modules."""

from typing import Any

from torch import nn

from pyro_bmrs.io.torch_layers import CONTAINERS, arguments_of, build, is_size, kind_of, plain_attributes

__all__ = ["class_name", "describe"]


def describe(net: nn.Module) -> dict[str, Any]:
    """Return the tree of a network's modules, which of its parameters are frozen, and which are one and the same.

    Layers of torch.nn are described by name and arguments. Modules of other classes, and layers with hooks or with
    parameters of their own, are ``custom``: an instance is needed to load them.

    Raises:
        ValueError: If a module is one that cannot be loaded again; names it.
    """
    parameters: dict[int, str] = {}
    ties, frozen = {}, []
    for name, parameter in net.named_parameters(remove_duplicate=False):
        first = parameters.setdefault(id(parameter), name)
        if first != name:
            ties[name] = first
        elif not parameter.requires_grad:
            frozen.append(name)
    return {"module": _describe(net, "", {}), "ties": ties, "frozen": frozen}


def class_name(kind: type) -> str:
    """Return the qualified name of a class."""
    return f"{kind.__module__}.{kind.__qualname__}"


def _describe(module: nn.Module, name: str, seen: dict[int, str]) -> dict[str, Any]:
    seen[id(module)] = name
    children: dict[str, Any] = {}
    for child, part in module._modules.items():
        path = f"{name}.{child}".lstrip(".")
        if part is None:
            children[child] = None
        elif id(part) in seen:
            children[child] = {"same": seen[id(part)]}
        else:
            children[child] = _describe(part, path, seen)
    kind = kind_of(module)
    if kind in CONTAINERS and not _is_special(module):
        return {"type": kind, "children": children}
    attributes = plain_attributes(module)
    if kind is not None and kind not in CONTAINERS and _is_rebuilt(module, kind, name):
        return {"type": kind, "arguments": arguments_of(module), "attributes": attributes, "children": children}
    sizes = {key: value for key, value in attributes.items() if is_size(key, value)}
    return {"type": class_name(type(module)), "custom": True, "attributes": sizes, "children": children}


def _is_special(module: nn.Module) -> bool:
    """Return whether a module is more than its class says: by hooks, or tensors that it was given."""
    own = (*module._parameters, *module._buffers)
    return bool(module._forward_hooks or module._forward_pre_hooks) or (kind_of(module) in CONTAINERS and bool(own))


def _is_rebuilt(module: nn.Module, kind: str, name: str) -> bool:
    """Return whether the layer's arguments make one with the same tensors of its own."""
    if _is_special(module):
        return False
    try:
        again = build(kind, arguments_of(module), name, limit=10**6)
    except (ValueError, AttributeError, IndexError, TypeError):
        return False
    tensors = [
        {
            key: None if value is None else tuple(value.shape)
            for key, value in {**each._parameters, **each._buffers}.items()
        }
        for each in (module, again)
    ]
    return tensors[0] == tensors[1]
