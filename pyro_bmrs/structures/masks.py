"""Which structures remain: checking what a caller says."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from pyro_bmrs.model.network import NoisyNetwork

__all__ = ["check_masks"]


def check_masks(model: "NoisyNetwork", masks: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
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
