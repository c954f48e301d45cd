"""Calling any network: inputs as a tensor, a tuple or a dictionary, and outputs of any nesting."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from pyro_bmrs.checks import described
from pyro_bmrs.structures.points import NoiseError

__all__ = [
    "Inputs",
    "batch_size",
    "batches",
    "call",
    "call_example",
    "concatenated",
    "first_examples",
    "on_device",
    "output_tensors",
    "random_like",
    "refusing",
    "to_input",
    "to_network",
]

Inputs = Tensor | tuple[Any, ...] | list[Any] | Mapping[str, Any]


def call(net: nn.Module, inputs: Inputs) -> Any:
    """Run a network on a tensor, on a tuple of positional inputs, or on a mapping of named ones."""
    if isinstance(inputs, Mapping):
        return net(**inputs)
    if isinstance(inputs, tuple | list):
        return net(*inputs)
    return net(inputs)


def call_example(net: nn.Module, inputs: Inputs, name: str = "the example inputs") -> Any:
    """Run a network on inputs of the caller's, which may not be for it.

    Raises:
        ValueError: If the network does not run on them; says why.
    """
    first = next((each for each in tree_leaves(inputs) if isinstance(each, Tensor) and each.dim()), None)
    if first is not None and not len(first):
        raise ValueError(f"{name} are of no example: {described(first)}; give two of them")
    own = next((f", and parameters are of {p.dtype}" for p in net.parameters()), "")
    shown = " and ".join(described(each) for each in tree_leaves(inputs)[:3])
    with refusing(f"the network does not run on {name}, {shown}{own}"):
        return call(net, inputs)


@contextmanager
def refusing(what: str, remedy: str = "give inputs that it takes") -> Iterator[None]:
    """Turn whatever a caller's code raises inside into a ``ValueError`` that says ``what`` is wrong, and why."""
    try:
        yield
    except NoiseError:
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        raise ValueError(f"{what} ({reason}); {remedy}") from error


def batch_size(inputs: Inputs) -> int:
    """Return the number of examples in a network's inputs: the length of their first tensor."""
    if isinstance(inputs, Tensor) and inputs.dim() > 0:
        return len(inputs)
    first = next((each for each in tree_leaves(inputs) if isinstance(each, Tensor) and each.dim() > 0), None)
    if first is None:
        raise ValueError("the inputs hold no tensor with a batch dimension")
    return len(first)


def batches(inputs: Inputs, size: int) -> Iterator[Inputs]:
    """Iterate over inputs in batches of at most ``size`` examples; tensors of another length stay whole."""
    total = batch_size(inputs)
    for start in range(0, total, size):
        yield tree_map(
            lambda each, start=start: (
                each[start : start + size] if isinstance(each, Tensor) and each.dim() and len(each) == total else each
            ),
            inputs,
        )


def first_examples(inputs: Inputs, count: int) -> Inputs:
    """Return the first ``count`` examples of a network's inputs."""
    return next(batches(inputs, count))


def on_device(inputs: Inputs, device: torch.device, net: nn.Module) -> Inputs:
    """Return inputs on a device, as the network takes them."""
    moved: Inputs = tree_map(
        lambda each: to_input(each.to(device, non_blocking=True), net) if isinstance(each, Tensor) else each, inputs
    )
    return moved


def to_input(x: Any, net: nn.Module | None = None) -> Any:
    """Return what a network takes: bytes (images) become numbers in [0, 1] of its dtype; all else stays as it is."""
    if not (isinstance(x, Tensor) and x.dtype == torch.uint8):
        return x
    parameters = () if net is None else net.parameters()
    dtype = next((p.dtype for p in parameters if p.is_floating_point()), torch.get_default_dtype())
    return x.to(dtype).div_(255)


def output_tensors(output: Any) -> list[Tensor]:
    """Return the tensors in a network's output: a tensor, or any nesting of sequences, mappings and dataclasses."""
    if isinstance(output, Tensor):
        return [output]
    if isinstance(output, Mapping):
        return [tensor for value in output.values() for tensor in output_tensors(value)]
    if isinstance(output, tuple | list):
        return [tensor for value in output for tensor in output_tensors(value)]
    if hasattr(output, "__dataclass_fields__"):
        return [tensor for name in output.__dataclass_fields__ for tensor in output_tensors(getattr(output, name))]
    return []


def to_network(inputs: Inputs, net: nn.Module) -> Inputs:
    """Move inputs to a network's device, floating-point ones to its dtype; bytes become numbers in [0, 1]."""
    like = next((p for p in net.parameters() if p.is_floating_point()), torch.zeros(()))

    def moved(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if value.dtype == torch.uint8 and not isinstance(inputs, Mapping):
            return value.to(like.device, like.dtype) / 255
        return value.to(like.device, like.dtype) if value.is_floating_point() else value.to(like.device)

    moved_inputs: Inputs = tree_map(moved, dict(inputs) if isinstance(inputs, Mapping) else inputs)
    return moved_inputs


def concatenated(outputs: Sequence[Any]) -> Any:
    """Return the outputs of several batches as those of one: tensors are concatenated, whatever they are nested in."""
    first = outputs[0]
    if len(outputs) == 1 or first is None or isinstance(first, bool | int | float | str):
        return first
    if isinstance(first, Tensor):
        return torch.cat(list(outputs)) if first.dim() else torch.stack(list(outputs)).mean()
    if isinstance(first, Mapping):
        joined = {key: concatenated([each[key] for each in outputs]) for key in first}
        return type(first)(**joined) if is_dataclass(first) else joined
    if isinstance(first, tuple | list):
        parts = [concatenated(each) for each in zip(*outputs, strict=True)]
        return type(first)(*parts) if hasattr(first, "_fields") else type(first)(parts)
    if is_dataclass(first) and not isinstance(first, type):
        names = [each.name for each in fields(first)]
        return replace(first, **{name: concatenated([getattr(each, name) for each in outputs]) for name in names})
    raise TypeError(f"outputs of type {type(first).__name__} cannot be put together; run one batch, or return tensors")


def random_like(inputs: Inputs, generator: torch.Generator, plain: bool = False) -> Inputs:
    """Return random inputs of the same shapes and types.

    Floating-point numbers are drawn from those in the example and stretched, or with ``plain`` from a standard normal;
    so they are where the example has only one value. Integers with more than two values are drawn from their range;
    others, and bools, are masks and stay.
    """

    def drawn(value: Any) -> Any:
        if not isinstance(value, Tensor) or value.numel() == 0:
            return value
        flat = value.detach().reshape(-1).cpu()
        if value.is_floating_point():
            if plain or bool((flat == flat[0]).all()):
                new = torch.randn(flat.shape, generator=generator, dtype=torch.float64)
            else:
                picked = flat[torch.randint(len(flat), flat.shape, generator=generator)].double()
                new = picked * (0.5 + torch.rand(flat.shape, generator=generator, dtype=torch.float64))
        elif value.dtype != torch.bool and not value.is_complex() and len(flat.unique()) > 2:
            new = flat[torch.randint(len(flat), flat.shape, generator=generator)]
        else:
            return value
        return new.to(value.device, value.dtype).reshape(value.shape)

    return tree_map(drawn, inputs)
