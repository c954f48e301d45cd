"""Which structures remain: checking what a caller says."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pyro_bmrs.checks import described
from pyro_bmrs.structures.points import NoisePoint

__all__ = ["check_mapping", "check_masks"]


def check_masks(
    masks: Mapping[str, Tensor] | None, points: Mapping[str, NoisePoint], sizes: Mapping[str, int]
) -> dict[str, Tensor]:
    """Return one mask for each of ``sizes``, in the numbering of the structures that are physically there.

    Args:
        masks: For each site a bool tensor, True = keep, of shape ``(size,)``, or ``(original_size,)`` where structures
            have been cut out. Sites left out keep what has not been removed so far.
        points: The noise layers by site.
        sizes: Number of structures of each site.

    Raises:
        TypeError: If ``masks`` are no mapping.
        ValueError: If one does not fit; names its site.
    """
    check_mapping(masks)
    masks = {} if masks is None else masks
    for site in masks:
        if site not in sizes:
            raise ValueError(f"there is no site {site!r} to mask; the model's sites are {list(sizes)}")
    return {site: _checked(site, masks.get(site), points.get(site), size) for site, size in sizes.items()}


def check_mapping(masks: Any) -> None:
    """Raise ``TypeError`` unless ``masks`` is None or a mapping."""
    if not (masks is None or isinstance(masks, Mapping)):
        hint = "pass its .masks" if hasattr(masks, "masks") else "for instance the masks of a FitResult"
        raise TypeError(f"masks must map sites to bool tensors, but got {described(masks)}; {hint}")


def _checked(site: str, mask: Any, point: NoisePoint | None, size: int) -> Tensor:
    if mask is None:
        return torch.ones(size, dtype=torch.bool) if point is None else point.keep.clone()
    original = size if point is None else point.original_size
    if not (isinstance(mask, Tensor) and mask.dtype == torch.bool and mask.shape in ((size,), (original,))):
        found = f"{mask.dtype} of shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(
            f"the mask of site {site!r} must be a bool tensor of shape ({original},), True = keep, but got {found}"
        )
    if point is None:
        return mask
    mask = mask.to(point.keep.device)
    if mask.shape == (size,):
        return mask
    missing = mask & ~point.in_original(torch.ones_like(point.keep), False)
    if bool(missing.any()):
        raise ValueError(
            f"the mask of site {site!r} keeps structures {missing.nonzero().flatten()[:5].tolist()}, which have been "
            "cut out of the network"
        )
    return mask[point.index]
