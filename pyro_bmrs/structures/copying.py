"""Copies of networks to try things on, and the state in which they are run."""

import copy
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from pyro_bmrs.randomness import local_seed

__all__ = ["copied", "no_fast_path", "undisturbed"]

Module = TypeVar("Module", bound=nn.Module | tuple[nn.Module, ...])


def copied(net: Module) -> Module:
    """Return a deep copy, also of modules that keep an activation on themselves, which tensors refuse to copy.

    Of several modules at once, what they refer to in common is copied once.
    """
    memo: dict[int, Any] = {}
    together = net if isinstance(net, tuple) else (net,)
    for module in (each for root in together for each in root.modules()):
        for value in tree_leaves(dict(vars(module))):
            if isinstance(value, Tensor) and not value.is_leaf:
                memo[id(value)] = value.detach().clone()
    return copy.deepcopy(net, memo)


@contextmanager
def no_fast_path() -> Iterator[None]:
    """Have ``nn.TransformerEncoderLayer`` run its submodules, which its fast path skips, and with them their noise."""
    before = torch.backends.mha.get_fastpath_enabled()
    if not before:
        yield
        return
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


@contextmanager
def undisturbed(net: nn.Module) -> Iterator[None]:
    """Run networks without gradients, autocast or PyTorch's fast path of attention, leaving the random state alone."""
    device = next((p.device for p in net.parameters()), torch.device("cpu"))
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(local_seed(devices=[device]))
        stack.enter_context(torch.autocast(device.type, enabled=False))
        stack.enter_context(no_fast_path())
        if any(type(module).__name__ == "OptimizedModule" for module in net.modules()):
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        yield
