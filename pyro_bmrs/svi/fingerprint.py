"""Fingerprints: short strings that differ where two values do, whatever their ``repr`` says."""

import hashlib
import types
from collections.abc import Iterator, Mapping, Sequence, Set
from functools import partial, singledispatch
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

__all__ = ["fingerprint", "network_fingerprint"]

_PLAIN = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size)
_LIBRARIES = {"builtins", "typing", "abc", "functools", "collections", "math", "torch", "pyro", "pyro_bmrs", "numpy"}

Seen = dict[int, Any]


def fingerprint(value: Any) -> str:
    """Return 16 hexadecimal digits that are the same for equal values, in any process.

    Tensors count by dtype, shape and every element. Functions and classes count by their code and the values that it
    refers to, those of libraries by name. Other objects count by their class and attributes. Modules count by class,
    settings and shapes, not by the values of their parameters, which training changes.
    """
    digest = hashlib.sha256()
    for token in _tokens(value, {}):
        digest.update(token)
        digest.update(b"\0")
    return digest.hexdigest()[:16]


def network_fingerprint(net: nn.Module) -> dict[str, str]:
    """Return a fingerprint of each module of a network by name: class, settings, shapes, and what is frozen."""
    return {name: fingerprint(list(_of_module(module, {}))) for name, module in net.named_modules()}


def _tokens(value: Any, seen: Seen) -> Iterator[bytes]:
    """Iterate over what ``value`` is made of, in a fixed order; what has been seen is not entered again."""
    yield type(value).__qualname__.encode()
    if isinstance(value, _PLAIN):
        yield repr(value).encode()
    elif id(value) not in seen:
        seen[id(value)] = value
        yield from _parts(value, seen)


@singledispatch
def _parts(value: Any, seen: Seen) -> Iterator[bytes]:
    slots = [name for kind in type(value).__mro__ for name in getattr(kind, "__slots__", ()) if hasattr(value, name)]
    attributes = {**getattr(value, "__dict__", {}), **{name: getattr(value, name) for name in slots}}
    yield from _of_class(type(value), seen)
    yield from _tokens(attributes, seen)


@_parts.register(Mapping)
def _of_mapping(value: Mapping[Any, Any], seen: Seen) -> Iterator[bytes]:
    for key in sorted(value, key=repr):
        yield from _tokens(key, seen)
        yield from _tokens(value[key], seen)


@_parts.register(Set)
def _of_set(value: Set[Any], seen: Seen) -> Iterator[bytes]:
    yield from sorted(fingerprint(each).encode() for each in value)


@_parts.register(Sequence)
def _of_sequence(value: Sequence[Any], seen: Seen) -> Iterator[bytes]:
    for each in value:
        yield from _tokens(each, seen)


@_parts.register(Tensor)
def _of_tensor(value: Tensor, seen: Seen) -> Iterator[bytes]:
    yield f"{value.dtype} {tuple(value.shape)}".encode()
    if value.numel():
        yield value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


@_parts.register(np.ndarray)
def _of_array(value: "np.ndarray[Any, Any]", seen: Seen) -> Iterator[bytes]:
    yield f"{value.dtype} {value.shape}".encode()
    yield np.ascontiguousarray(value).tobytes()


@_parts.register(nn.Module)
def _of_modules(value: nn.Module, seen: Seen) -> Iterator[bytes]:
    for name, module in value.named_modules():
        yield name.encode()
        yield from _of_module(module, seen)


def _of_module(module: nn.Module, seen: Seen) -> Iterator[bytes]:
    """Iterate over what a module is without its children."""
    yield f"{type(module).__module__}.{type(module).__qualname__} {module.extra_repr()}".encode()
    plain = {name: value for name, value in vars(module).items() if isinstance(value, _PLAIN) and name != "training"}
    yield from _tokens(plain, seen)
    for name, parameter in module.named_parameters(recurse=False):
        yield f"{name} {parameter.dtype} {tuple(parameter.shape)} {parameter.requires_grad}".encode()
    for name, buffer in module.named_buffers(recurse=False):
        yield f"{name} {buffer.dtype} {tuple(buffer.shape)}".encode()


@_parts.register(types.CodeType)
def _of_code(value: types.CodeType, seen: Seen) -> Iterator[bytes]:
    yield value.co_code
    yield from _tokens((value.co_names, value.co_varnames, value.co_consts), seen)


@_parts.register(types.FunctionType)
def _of_function(value: types.FunctionType, seen: Seen) -> Iterator[bytes]:
    yield value.__qualname__.encode()
    if _is_of_library(value.__module__):
        return
    cells = [cell.cell_contents for cell in value.__closure__ or () if cell != types.CellType()]
    yield from _tokens((value.__code__, value.__defaults__, value.__kwdefaults__, cells), seen)
    for name in value.__code__.co_names:
        known = value.__globals__.get(name)
        if isinstance(known, (*_PLAIN, Tensor, types.FunctionType)):
            yield from _tokens(known, seen)


@_parts.register(types.MethodType)
def _of_method(value: types.MethodType, seen: Seen) -> Iterator[bytes]:
    yield from _tokens((value.__func__, value.__self__), seen)


@_parts.register(partial)
def _of_partial(value: "partial[Any]", seen: Seen) -> Iterator[bytes]:
    yield from _tokens((value.func, value.args, value.keywords), seen)


@_parts.register(type)
def _of_class(value: type, seen: Seen) -> Iterator[bytes]:
    """Iterate over a class's name and, where it is not a library's, its methods and values."""
    for kind in value.__mro__:
        yield f"{kind.__module__}.{kind.__qualname__}".encode()
        if not _is_of_library(kind.__module__):
            for name, each in sorted(vars(kind).items()):
                own = each.fget if isinstance(each, property) else getattr(each, "__func__", each)
                if isinstance(own, types.FunctionType) or (isinstance(own, (*_PLAIN, Tensor)) and name[:2] != "__"):
                    yield from _tokens((name, own), seen)


def _is_of_library(module: str | None) -> bool:
    return (module or "").partition(".")[0] in _LIBRARIES
