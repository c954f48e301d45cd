"""What training data must be, checked once before anything starts."""

import torch
from pyro.distributions import Categorical
from torch import Tensor
from torch.utils.data import TensorDataset

from pyro_bmrs.model.network import NoisyNetwork
from pyro_bmrs.modes import evaluating
from pyro_bmrs.structures.inputs import to_input

__all__ = ["Data", "check_data", "check_observations"]

Data = tuple[Tensor, Tensor] | TensorDataset


def check_data(data: Data, name: str) -> tuple[Tensor, Tensor]:
    """Return inputs and observations, or raise naming what is wrong with the data set called ``name``.

    Raises:
        TypeError: If it is not a pair of tensors or a ``TensorDataset`` of two.
        ValueError: If it is empty, its halves differ in length, or a number in it is not finite.
    """
    pair = data.tensors if isinstance(data, TensorDataset) else data
    if not (isinstance(pair, tuple | list) and len(pair) == 2 and all(isinstance(t, Tensor) for t in pair)):
        raise TypeError(
            f"{name} must be a pair of tensors (inputs, observations) or a TensorDataset of two, got {type(data)}"
        )
    x, y = pair
    if x.dim() == 0 or y.dim() == 0 or len(x) != len(y):
        raise ValueError(
            f"{name} needs one observation an input, but they have shapes {tuple(x.shape)} and {tuple(y.shape)}"
        )
    if len(x) == 0:
        raise ValueError(f"{name} is empty: inputs have shape {tuple(x.shape)}")
    for part, tensor in (("input", x), ("observation", y)):
        if not tensor.is_floating_point():
            continue
        bad_rows = (~torch.isfinite(tensor)).reshape(len(tensor), -1).any(1).nonzero()
        if len(bad_rows):
            row = int(bad_rows[0])
            raise ValueError(f"{name} has a NaN or infinite {part} in row {row}; remove or impute such rows first")
    return x, y


@torch.no_grad()
def check_observations(model: NoisyNetwork, x: Tensor, y: Tensor, name: str) -> None:
    """Raise ``ValueError`` unless the network takes ``x`` and every observation lies in its likelihood's support."""
    device = next(model.parameters()).device
    with evaluating(model):
        means = {site: torch.ones(size, device=device) for site, size in model.sizes.items()}
        output = model.run(to_input(x[:1].to(device), model.net), means)
    y = y.to(device)
    if isinstance(output, Tensor):
        observed = model.likelihood(output.expand(len(y), *output.shape[1:]))
    else:
        observed = model.likelihood(output)
        observed = observed.expand((len(y), *observed.batch_shape[1:]))
    if isinstance(observed, Categorical) and y.is_floating_point():
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
