"""Giving the noise layers of a network the values that a forward pass multiplies by."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from pyro_bmrs.model.noise import MultiplicativeNoise, PendingPass
from pyro_bmrs.numerics import can_branch_on

__all__ = ["supply_noise"]


@contextmanager
def supply_noise(
    layers: Mapping[str, MultiplicativeNoise], values: Mapping[str, Tensor], masked: bool = True
) -> Iterator[None]:
    """Have ``layers``, by site, use ``values`` in the forward pass inside.

    Example:
        >>> model = bmrs.NoisyNetwork(nn.Sequential(nn.Linear(2, 3), bmrs.MultiplicativeNoise(3)), num_data=10)
        >>> with supply_noise(model.noise, {"1.theta": torch.zeros(3)}):
        ...     model.net(torch.ones(1, 2)).norm().item()
        0.0

    Args:
        layers: The noise layers.
        values: For each site a tensor of shape ``(*leading, size)``.
        masked: Whether structures that have been removed are to be at 0 whatever the values.
    """
    known: dict[int, tuple[Tensor, PendingPass | None]] = {}  # one for all noise that was drawn as one tensor
    try:
        for site, layer in layers.items():
            theta = values[site]
            whole = theta._base if theta._is_view() else None
            drawn = theta if whole is None or whole.grad_fn is None else whole  # a parameter would keep the pass alive
            if id(drawn) not in known:
                known[id(drawn)] = drawn, _waiting_for(drawn)
            layer.hold(theta, masked, known[id(drawn)][1])
        yield
    finally:
        for layer in layers.values():
            layer.release()


def _waiting_for(theta: Tensor) -> PendingPass | None:
    """Return a pass that lives as long as its noise and knows when that has its gradient; None if it will have none."""
    if not (theta.requires_grad and torch.is_grad_enabled() and can_branch_on(theta, on_device=True)):
        return None
    if torch._C._functorch.peek_interpreter_stack() is not None:  # mapped over replicas
        return None
    waiting = PendingPass()
    theta.register_hook(waiting)
    return waiting
