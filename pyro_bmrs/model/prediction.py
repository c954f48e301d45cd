"""The network with every noise at its posterior mean: what is fine-tuned, evaluated and, at last, compacted."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from pyro_bmrs.checks import check_integer, described
from pyro_bmrs.eval_mode import evaluating
from pyro_bmrs.model.network import NoisyNetwork
from pyro_bmrs.structures.any_guide import noise_posterior
from pyro_bmrs.structures.inputs import Inputs, batches, concatenated, refusing, to_input
from pyro_bmrs.structures.inputs import batch_size as examples
from pyro_bmrs.structures.masks import check_masks
from pyro_bmrs.structures.pair import check_model

__all__ = ["predict"]


def predict(
    model: NoisyNetwork,
    guide: Any,
    x: Inputs,
    masks: Mapping[str, Tensor] | None = None,
    batch_size: int = 1024,
) -> Any:
    r"""Return the network's outputs in eval mode with every :math:`\theta` at its posterior mean.

    Each call computes these means and multiplies by them: for inference again and again, ``compact`` once, and use the
    plain network that it returns.

    Args:
        model: The model.
        guide: Its guide, of any kind; one that is a program is run on ``x``, see ``noise_posterior``.
        x: Inputs: a tensor of shape ``(n, ...)``, a tuple of positional inputs or a mapping of named ones; moved to the
            guide's device, and divided by 255 if of dtype uint8.
        masks: For each site a bool tensor of shape ``(size,)``, True = keep, in the numbering of the original network;
            None, and sites left out, keep what has not been removed so far. Structures that are not kept have
            :math:`\theta = 0`.
        batch_size: Number of examples run at once.

    Returns:
        What the network returns, for all examples, without gradients.

    Raises:
        TypeError: If an argument is of another type.
        ValueError: If the guide is another model's, a mask names no site or has the wrong shape or dtype, or the
            network cannot take ``x``.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), bmrs.MultiplicativeNoise(8), nn.Linear(8, 3))
        >>> model = bmrs.NoisyNetwork(net)
        >>> guide = bmrs.TruncatedLogNormalGuide(model)
        >>> bmrs.predict(model, guide, torch.randn(5, 4)).shape
        torch.Size([5, 3])
    """
    check_model(model)
    check_integer("batch_size", batch_size, low=1)
    if not examples(x):
        raise ValueError(f"x holds no examples: it is {described(x)}")
    guide = noise_posterior(model, guide, x)
    masks = check_masks(masks, model.noise, model.sizes)
    with evaluating(model), torch.no_grad():
        values = {site: point * masks[site] if site in masks else point for site, point in guide.points().items()}
        outputs = []
        for batch in batches(tree_map(lambda each: _moved(each, guide.device), x), batch_size):
            inputs = tree_map(lambda each: to_input(each, model.net), batch)
            with refusing(f"the network does not run on inputs x, {described(x)}"):
                outputs.append(model.run(inputs, values, masked=False))
    return concatenated(outputs)


def _moved(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value
