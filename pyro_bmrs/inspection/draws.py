"""A network under one draw of its noise after the other, batch by batch."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributions import Distribution

from pyro_bmrs.model.network import NoisyNetwork
from pyro_bmrs.modes import evaluating
from pyro_bmrs.structures.inputs import batch_size, on_device
from pyro_bmrs.svi.data.source import Source

__all__ = ["each_draw", "on_host"]


@torch.no_grad()
def each_draw(
    model: NoisyNetwork, thetas: Mapping[str, Tensor], source: Source, device: torch.device
) -> Iterator[tuple[Tensor, Iterator[Distribution]]]:
    """Iterate over batches: observations, and the distribution of them that each draw of the noise gives.

    Args:
        model: The model; it runs in eval mode.
        thetas: For each site draws of shape ``(draws, size)``. Removed structures are at 0 whatever they say.
        source: The examples.
        device: Where the model is.
    """
    draws = len(next(iter(thetas.values())))
    with evaluating(model):
        for x, y in source.ordered():
            inputs = on_device(x, device, model.net)
            one_by_one = ({site: theta[i] for site, theta in thetas.items()} for i in range(draws))
            examples = batch_size(inputs)
            yield y.to(device), (model.observed(model.run(inputs, noise), examples) for noise in one_by_one)


def on_host(tensor: Tensor) -> "np.ndarray[Any, Any]":
    """Return a tensor as an array."""
    return tensor.detach().cpu().numpy()
