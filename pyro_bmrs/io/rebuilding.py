"""From a description and its tensors back to a network: built anew, or an instance refitted in place."""

import copy
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from pyro_bmrs.io.torch_layers import build, is_plain, is_size
from pyro_bmrs.structures.attention import HeadwiseAttention
from pyro_bmrs.structures.pair import NoisePosterior
from pyro_bmrs.structures.points import Attachment, NoisePoint

__all__ = ["rebuild", "tensors_of"]

_BROKEN = "the file is not ours or not whole"
_HEADWISE = f"{HeadwiseAttention.__module__}.{HeadwiseAttention.__qualname__}"


def tensors_of(net: nn.Module) -> dict[str, Tensor]:
    """Return all parameters and buffers by name, those that are not persistent too; tied ones by their first name."""
    tensors: dict[str, Tensor] = dict(net.named_parameters())
    return {**tensors, **dict(net.named_buffers(remove_duplicate=False))}


def rebuild(description: Mapping[str, Any], tensors: Mapping[str, Tensor], given: nn.Module | None) -> nn.Module:
    """Return the described network with these tensors: ``given``, refitted in place, or one built anew.

    Raises:
        ValueError: If the description is none, needs an instance that is not given, or does not fit it or the tensors.
    """
    ties, frozen = _checked_names(description, "ties", dict), _checked_names(description, "frozen", list)
    net = _Builder(len(tensors) + len(ties)).module(description.get("module"), given, "")
    _assign(net, {**tensors, **{name: _known(tensors, first, name) for name, first in ties.items()}}, ties)
    for name, parameter in net.named_parameters():
        if parameter.is_floating_point() or parameter.is_complex():
            parameter.requires_grad_(name not in frozen)
    for module in net.modules():
        if isinstance(module, NoisePoint | Attachment | NoisePosterior):
            module.after_loading()
    return net.eval()


class _Builder:
    """Builds modules, or refits those of an instance, from a description that is not trusted.

    Args:
        limit: How many layers a stack may have at most.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.made: dict[str, nn.Module] = {}

    def module(self, description: Any, given: nn.Module | None, name: str) -> nn.Module:
        attributes, children, same = _parts(description, name)
        if same is not None:
            if same not in self.made:
                raise ValueError(f"module {name!r} is said to be {same!r}, which is none before it")
            return self.made[same]
        if any(given is other for other in self.made.values()):
            given = copy.deepcopy(given)  # one module under two names, where the saved network has two
        custom = description.get("custom") is True
        module = self._custom(description, given, name) if custom else self._layer(description, given, name)
        _set_attributes(module, attributes, name, custom)
        parts = {}
        for child, part in children.items():
            path = f"{name}.{child}".lstrip(".")
            if custom and child not in module._modules:
                raise ValueError(
                    f"the module passed to load has no part {path!r}; the saved {description.get('type')} has"
                )
            parts[child] = None if part is None else self.module(part, _given(given, module, child, part), path)
        if custom:
            module._modules.update(parts)
        else:  # all of its parts, in their order
            for child in list(module._modules):
                del module._modules[child]
            for child, each in parts.items():
                vars(module).pop(child, None)  # where the constructor has put a None, say
                module.add_module(child, each)
        self.made[name] = module
        return module

    def _custom(self, description: Mapping[str, Any], given: nn.Module | None, name: str) -> nn.Module:
        kind = description.get("type")
        if given is None:
            raise ValueError(
                f"the network's {name or 'root'} is a {kind}, which is not a torch.nn layer: make one and pass it, "
                "load(path, module); classes named in files are never imported"
            )
        if kind == _HEADWISE and type(given) is nn.MultiheadAttention:
            HeadwiseAttention.adopt(given)
        return given

    def _layer(self, description: Mapping[str, Any], given: nn.Module | None, name: str) -> nn.Module:
        fresh = build(description.get("type"), description.get("arguments", {}), name, self.limit)
        return given if given is not None and _is_like(given, fresh) else fresh


def _given(given: nn.Module | None, module: nn.Module, child: str, description: Any) -> nn.Module | None:
    """Return the instance for one part of a module.

    Where the file has a module between others that surgery has put in front of it or behind, it is the one given.
    """
    custom = isinstance(description, Mapping) and description.get("custom") is True
    if type(module) is nn.Sequential and type(given) is not nn.Sequential and custom:
        return given
    return module._modules.get(child)


def _parts(description: Any, name: str) -> tuple[Mapping[str, Any], Mapping[str, Any], str | None]:
    """Return attributes and children of a module, and the name of the one that it is the same as, if any."""
    known = description if isinstance(description, Mapping) else {"attributes": None}
    attributes, children, same = known.get("attributes", {}), known.get("children", {}), known.get("same")
    if isinstance(attributes, Mapping) and isinstance(children, Mapping) and isinstance(same, str | None):
        return attributes, children, same
    raise ValueError(f"module {name!r} is described by {description!r}: {_BROKEN}")


def _is_like(given: nn.Module, fresh: nn.Module) -> bool:
    """Return whether a layer differs from one that has just been built in nothing but sizes and values.

    Attributes that others have put on it, as transformers does, do not count.
    """
    if type(given) is not type(fresh):
        return False
    tensors = [
        {key for key, value in {**each._parameters, **each._buffers}.items() if value is not None}
        for each in (given, fresh)
    ]
    own = vars(fresh)
    settings = [
        {key: value for key, value in vars(each).items() if key in own and is_plain(value) and type(value) is not int}
        for each in (given, fresh)
    ]
    return tensors[0] == tensors[1] and {**settings[0], "training": 0} == {**settings[1], "training": 0}


def _set_attributes(module: nn.Module, attributes: Mapping[str, Any], name: str, custom: bool) -> None:
    """Set a layer's settings; of a class of the user's own only integers, its sizes, which it has already."""
    for key, value in attributes.items():
        if not (isinstance(key, str) and is_plain(value)):
            raise ValueError(
                f"module {name!r} has an attribute {key!r} of {value!r}: the file is not ours or not whole"
            )
        current = vars(module).get(key)
        settable = is_size(key, current) if custom else key in vars(module) and is_plain(current)
        if settable and key[:1] != "_":
            setattr(module, key, tuple(value) if isinstance(value, list) else value)


def _checked_names(description: Any, key: str, kind: type) -> Any:
    names = description.get(key)
    each = names.items() if isinstance(names, Mapping) else [(name, name) for name in names or ()]
    if not (isinstance(names, kind) and all(isinstance(a, str) and isinstance(b, str) for a, b in each)):
        raise ValueError(f"the {key} of the network are described by {names!r}: {_BROKEN}")
    return names


def _known(tensors: Mapping[str, Tensor], first: str, name: str) -> Tensor:
    if first not in tensors:
        raise ValueError(f"parameter {name!r} is said to be {first!r}, which the tensors do not fit")
    return tensors[first]


def _assign(net: nn.Module, tensors: Mapping[str, Tensor], ties: Mapping[str, str]) -> None:
    """Give every parameter and buffer its tensor, and make those one that are tied."""
    slots = {**dict(net.named_parameters(remove_duplicate=False)), **dict(net.named_buffers(remove_duplicate=False))}
    missing = [f"{name!r} is missing" for name in slots if name not in tensors]
    foreign = [f"{name!r} is of no module" for name in tensors if name not in slots]
    if missing or foreign:
        raise ValueError(
            f"the tensors do not fit the network described beside them: {', '.join([*missing, *foreign][:5])}"
        )
    for name, slot in slots.items():
        if slot.is_meta and slot.shape != tensors[name].shape:
            raise ValueError(
                f"the tensors do not fit the network described beside them: {name!r} is of shape "
                f"{tuple(tensors[name].shape)}, but its layer's is {tuple(slot.shape)}"
            )
    placed: dict[str, nn.Parameter] = {}
    used: set[int] = set()
    for name, slot in slots.items():
        owner, _, key = name.rpartition(".")
        module = net.get_submodule(owner)
        if name in ties:
            if ties[name] not in placed:
                raise ValueError(f"parameter {name!r} is said to be {ties[name]!r}, which is no parameter before it")
            setattr(module, key, placed[ties[name]])
            continue
        value = tensors[name] if slot.is_meta else tensors[name].to(slot.device)
        if isinstance(slot, nn.Parameter):
            placed[name] = _parameter(module, key, slot, value, anew=slot.is_meta or id(slot) in used)
            used.add(id(slot))
        else:
            setattr(module, key, value)


def _parameter(module: nn.Module, key: str, slot: nn.Parameter, value: Tensor, anew: bool) -> nn.Parameter:
    """Give a parameter its value; ``anew`` in a new object, where it has none or another name has it already."""
    if not anew:
        if slot.shape != value.shape or slot.dtype != value.dtype:
            slot.grad = None
        slot.data = value
        return slot
    new = nn.Parameter(value, requires_grad=False)
    setattr(module, key, new)  # some modules keep lists of their parameters
    return new
