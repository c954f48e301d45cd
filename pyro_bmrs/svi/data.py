"""What training data must be, checked once before anything starts."""

from typing import Any

import numpy as np
import torch
from pyro.distributions import Categorical
from torch import Tensor
from torch.utils.data import TensorDataset

from pyro_bmrs.checks import described
from pyro_bmrs.model.network import NoisyNetwork
from pyro_bmrs.modes import evaluating
from pyro_bmrs.structures.inputs import refusing, to_input

__all__ = ["Data", "check_data", "check_observations"]

Array = Tensor | np.ndarray[Any, Any]
Data = tuple[Array, Array] | TensorDataset


def check_data(data: Data, name: str, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Return inputs and observations as tensors, or raise naming what is wrong with the data set called ``name``.

    Args:
        data: A pair of tensors or arrays, or a ``TensorDataset`` of two.
        name: What to call it.
        dtype: The network's. Arrays of float64, which NumPy makes unless told otherwise, become this.

    Raises:
        TypeError: If it is something else.
        ValueError: If it is empty, its halves differ in length, or a number in it is not finite.
    """
    pair = data.tensors if isinstance(data, TensorDataset) else data
    if not (
        isinstance(pair, tuple | list) and len(pair) == 2 and all(isinstance(t, Tensor | np.ndarray) for t in pair)
    ):
        found = f"({', '.join(map(described, pair))})" if isinstance(pair, tuple | list) else described(pair)
        raise TypeError(
            f"{name} must be a pair of tensors (inputs, observations) or a TensorDataset of two, but got {found}"
        )
    x, y = _as_tensor(pair[0], f"inputs of {name}", dtype), _as_tensor(pair[1], f"observations of {name}", dtype)
    if x.dim() == 0 or y.dim() == 0 or len(x) != len(y):
        raise ValueError(
            f"{name} needs one observation per input, but they have shapes {tuple(x.shape)} and {tuple(y.shape)}"
        )
    if x.numel() == 0 or y.numel() == 0:
        raise ValueError(f"{name} is empty: inputs have shape {tuple(x.shape)}, observations {tuple(y.shape)}")
    for part, tensor in (("input", x), ("observation", y)):
        if not (tensor.is_floating_point() or tensor.is_complex()):
            continue
        bad_rows = (~torch.isfinite(tensor)).reshape(len(tensor), -1).any(1).nonzero()
        if len(bad_rows):
            row = int(bad_rows[0])
            raise ValueError(f"{name} has a NaN or infinite {part} in row {row}; remove or impute such rows first")
    return x, y


def _as_tensor(values: Array, name: str, dtype: torch.dtype) -> Tensor:
    """Return an array as a tensor, and a tensor as it is but without a gradient."""
    if isinstance(values, Tensor):
        if values.layout != torch.strided or values.device.type == "meta":
            raise TypeError(
                f"{name} must be ordinary tensors with values, but their layout is {values.layout}, on "
                f"device {values.device}: use .to_dense()"
            )
        return values.detach()
    try:
        tensor = torch.from_numpy(np.ascontiguousarray(values))
    except TypeError:
        raise TypeError(f"{name} must hold numbers, but are an array of dtype {values.dtype}") from None
    return tensor.to(dtype) if tensor.dtype == torch.float64 else tensor


@torch.no_grad()
def check_observations(model: NoisyNetwork, x: Tensor, y: Tensor, name: str) -> None:
    """Raise ``ValueError`` unless the network takes ``x`` and every observation lies in its likelihood's support."""
    observed = _likelihood_of(model, x, y, name)
    y = y.to(next(iter(model.noise.values())).keep.device)
    if isinstance(observed, Categorical) and (y.is_floating_point() or y.is_complex() or y.dtype == torch.bool):
        raise ValueError(
            f"{name} has observations of {y.dtype}, but a Categorical likelihood needs class indices: use y.long()"
        )
    inside = observed.support.check(y)
    if inside.shape != (len(y),):
        raise ValueError(
            f"{name} has observations of shape {tuple(y.shape)}, but the likelihood is a {type(observed).__name__} "
            f"over events of shape {tuple(observed.event_shape)}; reshape the observations, or the likelihood with "
            ".to_event(k)"
        )
    if not bool(inside.all()):
        row = int((~inside).nonzero()[0])
        allowed = (
            f"the {observed.logits.shape[-1]} classes 0 to {observed.logits.shape[-1] - 1}"
            if isinstance(observed, Categorical)
            else (f"the support {observed.support} of the likelihood")
        )
        raise ValueError(f"{name} has observation {y[row].tolist()} in row {row}, outside {allowed}")
    try:
        log_prob = observed.log_prob(y)
    except Exception as error:  # distributions refuse a dtype as they like
        raise ValueError(
            f"{name} has observations of {y.dtype}, which the likelihood, a {type(observed).__name__}, cannot score "
            f"({_first_line(error)})"
        ) from error
    if log_prob.shape != (len(y),):
        raise ValueError(
            f"the likelihood scores {name}'s {len(y)} observations with a tensor of shape {tuple(log_prob.shape)}, not "
            f"({len(y)},): reshape the observations"
        )


def _likelihood_of(model: NoisyNetwork, x: Tensor, y: Tensor, name: str) -> Any:
    """Return the distribution of as many observations as there are in ``y``, from the network's first output."""
    device = next(iter(model.noise.values())).keep.device
    ones = {site: torch.ones(size, device=device) for site, size in model.sizes.items()}
    own = next((f", and parameters are of {p.dtype}" for p in model.net.parameters()), "")
    found = f"they are of shape {tuple(x.shape)} and {x.dtype}{own}"
    with evaluating(model), refusing(f"the network cannot take the inputs of {name}: {found}"):
        output = model.run(to_input(x[:1].to(device), model.net), ones)
    try:
        if isinstance(output, Tensor) and output.dim():
            return model.observed(output.expand(len(y), *output.shape[1:]), len(y))
        first = model.observed(output, 1)
        return first.expand((len(y), *first.batch_shape[1:]))
    except NotImplementedError as error:
        raise ValueError(f"the likelihood cannot be expanded to {len(y)} examples: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
