"""The one place that knows which ArviZ is installed: 0.x or 1.x."""

import importlib
import warnings
from collections.abc import Mapping
from typing import Any, TypeAlias

import numpy as np

with warnings.catch_warnings():
    warnings.simplefilter("ignore", FutureWarning)  # 0.23 announces 1.x on import
    import arviz

__all__ = ["from_dict", "pareto_k"]

Array: TypeAlias = "np.ndarray[Any, Any]"
Groups = Mapping[str, Mapping[str, Array]]


_LEGACY = int(arviz.__version__.split(".")[0]) < 1


def from_dict(
    groups: Groups, coords: Mapping[str, Any], dims: Mapping[str, list[str]], attributes: Mapping[str, Any]
) -> Any:
    """Return ArviZ's own container of ``groups``, each from variable to array of shape ``(chain, draw, *dims)``.

    InferenceData in 0.x, a DataTree in 1.x; ``attributes`` are those of the whole.
    """
    if _LEGACY:
        data = arviz.from_dict(**groups, coords=dict(coords), dims=dict(dims))
    else:
        data = arviz.from_dict(groups, coords=dict(coords), dims=dict(dims))
    data.attrs.update(attributes)
    return data


def pareto_k(log_weights: Array) -> Array:
    """Return the Pareto k-hat of each row of ``log_weights``, of shape ``(rows, draws)`` and finite.

    ``psislw`` takes log weights in 0.x and their negative in 1.x. A fit that fails gives NaN or infinity.
    """
    with np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a failed fit shows in its value
        if _LEGACY:
            return np.asarray(arviz.psislw(log_weights, normalize=False)[1])
        statistics = importlib.import_module("arviz_stats.base").array_stats  # a package of 1.x
        return np.asarray(statistics.psislw(-log_weights, axis=-1)[1])
