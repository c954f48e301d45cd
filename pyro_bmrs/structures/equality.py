"""Whether two outputs are the same up to rounding."""

from typing import Any

import torch

from pyro_bmrs.structures.inputs import output_tensors

__all__ = ["difference"]


def difference(found: Any, expected: Any) -> float:
    """Return how far outputs are from the expected ones, relative to these outputs' spread over their elements.

    Outputs that hardly vary are compared at the precision of their own size. Other numbers of tensors or other shapes,
    integers that are not the same, NaN and infinity give infinity.
    """
    found, expected = output_tensors(found), output_tensors(expected)
    if [each.shape for each in found] != [each.shape for each in expected]:
        return float("inf")
    worst = 0.0
    for one, other in zip(found, expected, strict=True):
        if other.numel() == 0:
            continue
        if not (other.is_floating_point() or other.is_complex()):
            worst = worst if torch.equal(one, other) else float("inf")
            continue
        if other.is_complex():
            one, other = torch.view_as_real(one), torch.view_as_real(other)  # noqa: PLW2901
        ours, theirs = one.detach().double(), other.detach().double()
        if not bool(torch.isfinite(ours).all() and torch.isfinite(theirs).all()):
            return float("inf")
        spread = float(theirs.max() - theirs.min())
        size = float(theirs.abs().max())
        scale = max(spread, 1e-4 * size)
        error = float((ours - theirs).abs().max())
        if error:
            worst = max(worst, error / scale if scale else float("inf"))
    return worst
