"""torch.nn's own layers: which can be built again from numbers in a file, and how."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from pyro_bmrs.structures.layers import ChannelGather, ChannelScale, ChannelScatter, CountedLayerNorm

__all__ = ["CONTAINERS", "arguments_of", "build", "is_plain", "is_size", "kind_of", "plain_attributes"]

CONTAINERS: dict[str, type[nn.Module]] = {
    "Sequential": nn.Sequential, "ModuleList": nn.ModuleList, "ModuleDict": nn.ModuleDict,
}  # fmt: skip
_OURS: dict[str, type[nn.Module]] = {
    "ChannelGather": ChannelGather, "ChannelScale": ChannelScale, "ChannelScatter": ChannelScatter,
    "CountedLayerNorm": CountedLayerNorm,
}  # fmt: skip
_NOT_LAYERS = {"Module", "Container", "ParameterList", "ParameterDict", *CONTAINERS}
_LAYERS = {
    name: each
    for name, each in vars(nn).items()
    if isinstance(each, type) and issubclass(each, nn.Module) and each.__module__.startswith("torch.nn.modules")
    and name not in _NOT_LAYERS and not name.startswith("Lazy")
} | _OURS  # fmt: skip
_ACTIVATIONS = {functional.relu: "relu", functional.gelu: "gelu"}


def kind_of(module: nn.Module) -> str | None:
    """Return the name of a module's class if it is a layer or container that ``build`` can make, else None."""
    name = type(module).__name__
    return name if {**_LAYERS, **CONTAINERS}.get(name) is type(module) else None


def is_plain(value: Any) -> bool:
    """Return whether a value can be kept in JSON: a number, a string, None, or a flat tuple of numbers."""
    if isinstance(value, tuple | list):
        return all(isinstance(each, int | float) for each in value)
    return value is None or isinstance(value, bool | int | float | str)


def is_size(name: str, value: Any) -> bool:
    """Return whether removal may have changed an attribute of a class of the user's own: a size, or a norm's epsilon.

    An RMS norm that has lost channels has another one, see ``norms.py``.
    """
    return type(value) is int or (type(value) is float and "eps" in name)


def plain_attributes(module: nn.Module) -> dict[str, Any]:
    """Return the settings that a module keeps on itself."""
    own = vars(module).items()
    return {name: value for name, value in own if is_plain(value) and name[0] != "_" and name != "training"}


def arguments_of(module: nn.Module) -> dict[str, Any]:
    """Return the arguments that make a layer of the same class, settings and shapes.

    Raises:
        ValueError: If one of them cannot be kept in JSON.
    """
    special = _SPECIAL_ARGUMENTS.get(type(module))
    arguments = _own_arguments(module) if special is None else special(module)
    for name, value in arguments.items():
        if not is_plain(value):
            raise ValueError(f"its argument {name} is a {type(value).__name__}, which a file without code cannot hold")
    return arguments


def _own_arguments(module: nn.Module) -> dict[str, Any]:
    """Return the constructor's arguments, which most layers keep as attributes of the same name."""
    arguments = {}
    for name in _parameter_names(type(module)):
        if hasattr(module, name):
            value = getattr(module, name)
            arguments[name] = value is not None if name == "bias" and not isinstance(value, bool) else value
    return arguments


def _parameter_names(kind: type[nn.Module]) -> list[str]:
    """Return the names of a constructor's arguments: of the first class up the line that names them."""
    for each in kind.__mro__:
        parameters = inspect.signature(each).parameters.values()
        named = [p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
        if named:
            return [name for name in named if name not in ("device", "dtype", "mode")]
    return []


def _of_rnn(module: Any) -> dict[str, Any]:
    more = {"nonlinearity": module.nonlinearity} if isinstance(module, nn.RNN) else {}
    names = ("input_size", "hidden_size", "num_layers", "bias", "batch_first", "dropout", "bidirectional")
    if isinstance(module, nn.LSTM):
        more["proj_size"] = module.proj_size
    return {**{name: getattr(module, name) for name in names}, **more}


def _of_attention(module: Any) -> dict[str, Any]:
    names = ("embed_dim", "num_heads", "dropout", "add_zero_attn", "kdim", "vdim", "batch_first")
    plain = {name: getattr(module, name) for name in names}
    return {**plain, "bias": module.in_proj_bias is not None, "add_bias_kv": module.bias_k is not None}


def _of_transformer_layer(module: Any) -> dict[str, Any]:
    """Return arguments with one head, since the attention within may have lost some, and says so itself."""
    activation = module.activation
    return {
        "d_model": module.norm1.normalized_shape[0],
        "nhead": 1,
        "dim_feedforward": module.linear1.out_features,
        "dropout": module.dropout.p,
        "activation": "relu" if isinstance(activation, nn.Module) else _ACTIVATIONS.get(activation, activation),
        "layer_norm_eps": module.norm1.eps,
        "batch_first": module.self_attn.batch_first,
        "norm_first": module.norm_first,
        "bias": module.linear2.bias is not None,
    }


def _of_transformer_stack(module: Any) -> dict[str, Any]:
    first = module.layers[0]
    arguments = arguments_of(first) if type(first) in _SPECIAL_ARGUMENTS else {}
    return {**arguments, "num_layers": len(module.layers)}


def _of_counted_norm(module: Any) -> dict[str, Any]:
    sizes = {"size": len(module.scale), "count": module.count}
    return {**sizes, "eps": module.eps, "bias": module.bias is not None}


_SPECIAL_ARGUMENTS: dict[type[nn.Module], Callable[[nn.Module], dict[str, Any]]] = {
    nn.RNN: _of_rnn, nn.LSTM: _of_rnn, nn.GRU: _of_rnn,
    nn.MultiheadAttention: _of_attention,
    nn.TransformerEncoderLayer: _of_transformer_layer, nn.TransformerDecoderLayer: _of_transformer_layer,
    nn.TransformerEncoder: _of_transformer_stack, nn.TransformerDecoder: _of_transformer_stack,
    CountedLayerNorm: _of_counted_norm,
    ChannelScale: lambda module: {"size": len(module.scale), "dim": module.dim},  # type: ignore[arg-type]
    ChannelGather: lambda module: {"size": len(module.index), "dim": module.dim},  # type: ignore[arg-type]
    ChannelScatter: lambda module: {"count": len(module.index), "size": module.size, "dim": module.dim},  # type: ignore[arg-type]
}  # fmt: skip


def build(kind: Any, arguments: Any, name: str, limit: int) -> nn.Module:
    """Return a layer or container called ``kind``, on the meta device, where it takes no memory.

    Args:
        kind: Its name, from a file.
        arguments: Its arguments, from a file.
        name: What to call it in errors.
        limit: How many layers a stack may have at most.

    Raises:
        ValueError: If there is no such layer, or it does not take these arguments.
    """
    if isinstance(kind, str) and kind in CONTAINERS:
        return CONTAINERS[kind]()
    if not (isinstance(kind, str) and kind in _LAYERS):
        raise ValueError(
            f"{name!r} is described as {kind!r}, which is no layer of torch.nn; the file is not ours or not whole"
        )
    if not (isinstance(arguments, Mapping) and all(is_plain(value) for value in arguments.values())):
        raise ValueError(f"layer {name!r} has arguments {arguments!r}, which are no numbers, strings and tuples")
    stacked = arguments.get("num_layers", 1)
    if not (isinstance(stacked, int) and 0 < stacked <= max(1, limit)):
        raise ValueError(f"layer {name!r} has num_layers {stacked!r}, but the file holds {limit} tensors")
    values = {key: tuple(value) if isinstance(value, list) else value for key, value in arguments.items()}
    try:
        with torch.device("meta"):
            return _made(kind, values)
    except Exception as error:  # constructors refuse their arguments as they like
        raise ValueError(f"layer {name!r} cannot be a {kind} with arguments {arguments}: {error}") from None


def _made(kind: str, values: dict[str, Any]) -> nn.Module:
    if kind == "ChannelScale":
        return ChannelScale(torch.ones(values.pop("size")), **values)
    if kind == "ChannelGather":
        return ChannelGather(torch.ones(values.pop("size"), dtype=torch.long), **values)
    if kind == "ChannelScatter":
        return ChannelScatter(torch.ones(values.pop("count"), dtype=torch.long), **values)
    if kind == "CountedLayerNorm":
        size, bias = values.pop("size"), values.pop("bias")
        weights = [nn.Parameter(torch.ones(size)) if each else None for each in (True, bias)]
        return CountedLayerNorm(*weights, torch.ones(size), **values)  # type: ignore[arg-type, call-arg]
    if kind in ("TransformerEncoder", "TransformerDecoder"):
        count = values.pop("num_layers")
        more = {"enable_nested_tensor": False} if kind == "TransformerEncoder" else {}
        return _LAYERS[kind](_LAYERS[f"{kind}Layer"](**values), count, **more)
    return _LAYERS[kind](**values)
