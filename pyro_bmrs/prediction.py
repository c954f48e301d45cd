"""The network with every noise at its posterior mean: what is fine-tuned, evaluated and, at last, compacted."""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.func import functional_call

from pyro_bmrs.data import to_input
from pyro_bmrs.guide import FlatGuide
from pyro_bmrs.model import NoisyNetwork
from pyro_bmrs.modes import evaluating
from pyro_bmrs.noise import MultiplicativeNoise, fix_noise

__all__ = ["check_masks", "predict"]


def predict(
    model: NoisyNetwork,
    guide: FlatGuide,
    x: Tensor,
    masks: Mapping[str, Tensor] | None = None,
    batch_size: int = 1024,
) -> Tensor:
    r"""Return the network's outputs in eval mode with every :math:`\theta` at its posterior mean.

    Args:
        model: The model.
        guide: Its guide.
        x: Inputs, of shape ``(n, ...)``; moved to the guide's device, and divided by 255 if of dtype uint8.
        masks: For each site a bool tensor of shape ``(size,)``, True = keep; None, and sites left out, keep what
            has not been removed so far. Structures that are not kept have :math:`\theta = 0`.
        batch_size: Number of examples run at once.

    Returns:
        Outputs of shape ``(n, ...)``, without gradients.

    Raises:
        ValueError: If a mask names no site, or has the wrong shape or dtype.
    """
    masks = check_masks(model, masks)
    kept = {f"{name}.keep": torch.ones_like(layer.keep) for name, layer in _layer_names(model).items()}
    values = {site: mean * masks[site] for site, mean in guide.mean().items()}
    batches = x.to(guide.device).split(batch_size)
    with evaluating(model), torch.no_grad(), fix_noise(values):
        return torch.cat([functional_call(model.net, kept, (batch,)) for batch in map(to_input, batches)])


def _layer_names(model: NoisyNetwork) -> dict[str, MultiplicativeNoise]:
    return {site.removesuffix("theta").removesuffix("."): layer for site, layer in model.noise.items()}


def check_masks(model: NoisyNetwork, masks: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    """Return one mask for every site of the model, or raise ``ValueError`` naming the one that does not fit."""
    masks = {} if masks is None else masks
    sizes = model.sizes
    for site, mask in masks.items():
        if site not in sizes:
            raise ValueError(f"there is no site {site!r} to mask; the model's sites are {list(sizes)}")
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.shape != (sizes[site],):
            found = f"{mask.dtype} of shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
            raise ValueError(
                f"the mask of site {site!r} must be a bool tensor of shape ({sizes[site]},), True = keep, "
                f"but got {found}"
            )
    return {
        site: masks[site].to(layer.keep.device) if site in masks else layer.keep.clone()
        for site, layer in model.noise.items()
    }
