"""The one place that knows which ArviZ is installed: 0.x makes InferenceData, 1.x a DataTree."""

import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np

with warnings.catch_warnings():
    warnings.simplefilter("ignore", FutureWarning)  # 0.23 announces 1.x on import
    import arviz

__all__ = ["from_dict"]

Groups = Mapping[str, Mapping[str, "np.ndarray[Any, Any]"]]


def from_dict(groups: Groups, coords: Mapping[str, Any], dims: Mapping[str, list[str]]) -> Any:
    """Return ArviZ's own container of ``groups``, each from variable to array of shape ``(chain, draw, *dims)``."""
    if int(arviz.__version__.split(".")[0]) < 1:
        return arviz.from_dict(**groups, coords=dict(coords), dims=dict(dims))
    return arviz.from_dict(groups, coords=dict(coords), dims=dict(dims))
