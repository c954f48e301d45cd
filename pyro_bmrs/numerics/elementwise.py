"""Functions with gradients of their own that work element by element: what they do under ``torch.func.vmap``."""

import inspect
from typing import Any

import torch
from torch import Tensor

__all__ = ["Elementwise"]


class Elementwise(torch.autograd.Function):
    """A function of tensors that broadcast, whose outputs have a batch dimension in front if its inputs have.

    Under ``vmap`` it is simply called with one more dimension, on plain tensors, so that it may look at values and work
    in place; a generated rule could do neither. Inputs that are not mapped are expanded, so that those that had equal
    shapes still have.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        # torch looks this up at every call, which takes longer than most of what a function does.
        cls.forward.__signature__ = inspect.signature(cls.forward)  # type: ignore[attr-defined]

        def rule(info: Any, in_dims: tuple[int | None, ...], *inputs: Tensor) -> tuple[Any, Any]:
            outputs = cls.apply(*_in_front(info.batch_size, in_dims, inputs))
            return outputs, 0 if isinstance(outputs, Tensor) else (0,) * len(outputs)

        cls.vmap = staticmethod(rule)  # type: ignore[method-assign]


def _in_front(size: int, in_dims: tuple[int | None, ...], inputs: tuple[Tensor, ...]) -> list[Tensor]:
    """Return the inputs with the mapped dimension first, and behind it as many others each."""
    rank = max(x.dim() - (dim is not None) for x, dim in zip(inputs, in_dims, strict=True))
    moved = []
    for x, dim in zip(inputs, in_dims, strict=True):
        front = x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)
        moved.append(front.reshape(size, *(1,) * (rank + 1 - front.dim()), *front.shape[1:]))
    return moved
