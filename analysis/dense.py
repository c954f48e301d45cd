"""The point of comparison: the same network trained as long, without noise."""

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

__all__ = ["accuracy", "train_dense"]


def train_dense(
    net: nn.Module, data: tuple[Tensor, Tensor], epochs: int, batch_size: int, lr: float, seed: int
) -> nn.Module:
    """Train ``net`` in place by Adam with cosine decay, as ``pyro_bmrs.fit`` trains weights, and return it."""
    x, y = data
    steps = math.ceil(len(x) / batch_size)
    optimizer = torch.optim.Adam(net.parameters(), lr, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * steps)
    generator = torch.Generator().manual_seed(seed)
    net.train()
    for _ in range(epochs):
        for batch in torch.randperm(len(x), generator=generator).to(x.device).tensor_split(steps):
            optimizer.zero_grad()
            cross_entropy(net(x[batch]), y[batch]).backward()
            optimizer.step()
            schedule.step()
    return net.eval()


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """Return the fraction of examples whose largest logit is the label's."""
    return (logits.argmax(-1) == labels).double().mean().item()
