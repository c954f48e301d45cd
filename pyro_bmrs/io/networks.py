"""Networks and runs on disk: tensors as safetensors, everything else as JSON, and no code in either.

A saved network is two files, ``NAME.safetensors`` and ``NAME.json``. The latter describes the tree of modules. Layers
of ``torch.nn`` are rebuilt from it by name and arguments; modules of any other class are described but never
imported: to load those, hand ``load`` an instance, unpruned if you like, whose layers are then replaced.
"""

import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pyro_bmrs.io.files import AtomicFile, PathLike, write_json
from pyro_bmrs.structures.attention import HeadwiseAttention
from pyro_bmrs.structures.layers import ChannelGather, ChannelScale, ChannelScatter

__all__ = ["load", "save"]

_FORMAT = "pyro-bmrs/1"
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def save(net: nn.Module, path: PathLike) -> None:
    """Save a network as ``path.safetensors`` and ``path.json``, each complete or not there at all.

    Args:
        net: Any module: a compacted network, or a model or guide whose state ``load`` puts back.
        path: Files to write, without their suffix.

    Raises:
        OSError: If they cannot be written.
    """
    path = Path(path)
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in net.state_dict().items()}
    with AtomicFile(path.with_name(path.name + ".safetensors")) as temporary:
        save_file(state, temporary)
    write_json(path.with_name(path.name + ".json"), {"format": _FORMAT, "network": _describe(net)})


def load(path: PathLike, module: nn.Module | None = None) -> nn.Module:
    """Load what ``save`` wrote.

    Args:
        path: The files, without their suffix.
        module: An instance of the class that was saved, whose layers and tensors are replaced in place. Not needed for
            networks made of ``torch.nn`` layers in ``nn.Sequential`` alone.

    Returns:
        The network, in eval mode, on the CPU (or ``module``).

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If a file is truncated, is no network of ours, or does not fit ``module``. No code in it is run.
    """
    path = Path(path)
    description = _read_description(path.with_name(path.name + ".json"))
    state = _read_tensors(path.with_name(path.name + ".safetensors"))
    net = _rebuild(description, module, "")
    try:
        net.load_state_dict(state, assign=module is None)
    except RuntimeError as error:
        raise ValueError(f"the tensors in {path} do not fit the network described beside them: {error}") from None
    return net.eval()


def _read_description(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is truncated or no description of a network: {error}") from None
    if not (
        isinstance(content, dict) and content.get("format") == _FORMAT and isinstance(content.get("network"), dict)
    ):
        raise ValueError(f"{path} is no network saved by pyro-bmrs (its format is not {_FORMAT!r})")
    network: dict[str, Any] = content["network"]
    return network


def _read_tensors(path: Path) -> dict[str, Tensor]:
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing: a saved network is two files, .json and .safetensors")
    try:
        return load_file(path)
    except (SafetensorError, ValueError, OSError) as error:
        raise ValueError(f"{path} is truncated or no safetensors file: {error}") from None


def _describe(module: nn.Module) -> dict[str, Any]:
    kind = type(module)
    children = {name: _describe(child) for name, child in module.named_children()}
    if isinstance(module, ChannelScale):
        return {"type": "ChannelScale", "arguments": {"size": len(module.scale), "dim": module.dim}}
    if isinstance(module, ChannelGather):
        return {"type": "ChannelGather", "arguments": {"size": len(module.index), "dim": module.dim}}
    if isinstance(module, ChannelScatter):
        arguments = {"count": len(module.index), "size": module.size, "dim": module.dim}
        return {"type": "ChannelScatter", "arguments": arguments}
    if kind in _CONTAINERS:
        return {"type": kind.__name__, "children": children}
    if not children and getattr(nn, kind.__name__, None) is kind:
        return {"type": kind.__name__, "arguments": _arguments(module)}
    own = {"sizes": _sizes(module), "shapes": _shapes(module)}
    return {"type": _class_name(kind), "custom": True, "children": children, **own}


def _class_name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _sizes(module: nn.Module) -> dict[str, int]:
    """Return the integers that a module keeps on itself, numbers of heads among them."""
    return {name: value for name, value in vars(module).items() if type(value) is int and not name.startswith("_")}


def _shapes(module: nn.Module) -> dict[str, list[int]]:
    """Return the shapes of a module's own parameters and buffers."""
    own = (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
    return {name: list(tensor.shape) for name, tensor in own}


def _arguments(module: nn.Module) -> dict[str, Any]:
    """Return the constructor's arguments, which torch.nn's layers keep as attributes of the same name."""
    arguments = {}
    for name in inspect.signature(type(module)).parameters:
        if name in ("device", "dtype") or not hasattr(module, name):
            continue
        value = getattr(module, name)
        arguments[name] = value is not None if name == "bias" else value
    return arguments


def _rebuild(description: Mapping[str, Any], given: nn.Module | None, name: str) -> nn.Module:
    """Build a module from its description, or where its class is not torch's, refit the ``given`` one."""
    kind, children = description.get("type"), description.get("children", {})
    if description.get("custom"):
        if given is None:
            raise ValueError(
                f"the network's {name or 'root'} is a {kind}, which is not a torch.nn layer: make one and pass it, "
                "load(path, module); classes named in files are never imported"
            )
        if kind == _class_name(HeadwiseAttention) and type(given) is nn.MultiheadAttention:
            HeadwiseAttention.adopt(given)
        _refit(given, description)
        for child, part in children.items():
            current = dict(given.named_children()).get(child)
            if current is None:
                raise ValueError(
                    f"the module passed to load has no part {f'{name}.{child}'.lstrip('.')!r}; the saved {kind} has"
                )
            rebuilt = _rebuild(part, current, f"{name}.{child}".lstrip("."))
            if rebuilt is not current:
                setattr(given, child, rebuilt)
        return given
    if kind in {container.__name__ for container in _CONTAINERS}:
        return _rebuild_container(kind, children, given, name)
    return _build_layer(kind, description.get("arguments", {}), name)


def _refit(module: nn.Module, description: Mapping[str, Any]) -> None:
    """Give a module of a class of the user's own the sizes that were saved, in place."""
    for name, value in description.get("sizes", {}).items():
        if type(vars(module).get(name)) is int:
            setattr(module, name, value)
    own = dict((*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)))
    for name, shape in description.get("shapes", {}).items():
        tensor = own.get(name)
        if tensor is not None and list(tensor.shape) != shape:
            tensor.data = tensor.data.new_empty(shape)


def _rebuild_container(kind: str, children: Mapping[str, Any], given: nn.Module | None, name: str) -> nn.Module:
    container: nn.Module = getattr(nn, kind)()
    parts = dict(given.named_children()) if given is not None else {}
    for child, part in children.items():
        container.add_module(child, _rebuild(part, parts.get(child), f"{name}.{child}".lstrip(".")))
    return container


def _build_layer(kind: Any, arguments: Any, name: str) -> nn.Module:
    layer = getattr(nn, kind, None) if isinstance(kind, str) else None
    if kind not in ("ChannelGather", "ChannelScale", "ChannelScatter") and not (
        isinstance(layer, type) and issubclass(layer, nn.Module)
    ):
        raise ValueError(
            f"{name!r} is described as {kind!r}, which is no layer of torch.nn; the file is not ours or not whole"
        )
    try:
        if kind == "ChannelScale":
            return ChannelScale(torch.ones(arguments["size"]), arguments["dim"])
        if kind == "ChannelGather":
            return ChannelGather(torch.arange(arguments["size"]), arguments["dim"])
        if kind == "ChannelScatter":
            return ChannelScatter(torch.arange(arguments["count"]), arguments["size"], arguments["dim"])
        return layer(**{key: tuple(v) if isinstance(v, list) else v for key, v in arguments.items()})  # type: ignore[misc]
    except (TypeError, ValueError, KeyError, AttributeError, RuntimeError) as error:
        raise ValueError(f"layer {name!r} cannot be a {kind} with arguments {arguments}: {error}") from None
