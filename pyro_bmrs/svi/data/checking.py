"""What training data must be, checked once before anything starts."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from pyro.distributions import Categorical
from torch import Tensor
from torch.distributions.constraints import is_dependent
from torch.distributions.utils import lazy_property
from torch.utils._pytree import tree_leaves, tree_map

from pyro_bmrs.checks import described
from pyro_bmrs.eval_mode import evaluating
from pyro_bmrs.model.network import NoisyNetwork
from pyro_bmrs.structures.inputs import Inputs, batches, refusing, to_input

__all__ = ["as_tensors", "check_observations", "holds_arrays"]


def holds_arrays(value: Any) -> bool:
    """Return whether ``value`` is a tensor or array, or a tuple or mapping of nothing else."""
    if isinstance(value, Mapping):
        return bool(value) and all(map(holds_arrays, value.values()))
    if isinstance(value, tuple | list):
        return bool(value) and all(map(holds_arrays, value))
    return isinstance(value, Tensor | np.ndarray)


def as_tensors(inputs: Any, observations: Any, name: str, dtype: torch.dtype) -> tuple[Inputs, Tensor]:
    """Return inputs and observations as tensors, or raise naming what is wrong with the data called ``name``.

    Args:
        inputs: A tensor or array of shape ``(n, ...)``, or a tuple or mapping of such.
        observations: A tensor or array of shape ``(n, ...)``.
        name: What to call them.
        dtype: The network's. Arrays of float64, NumPy's default, become this.

    Raises:
        TypeError: If they are something else.
        ValueError: If they are empty, differ in length, or a number in them is not finite.
    """
    if not (holds_arrays(inputs) and isinstance(observations, Tensor | np.ndarray)):
        raise TypeError(
            f"{name} must be a pair of tensors (inputs, observations), where inputs may be a tuple or a mapping of "
            f"tensors, a Dataset, a DataLoader or a sized iterable of batches, but got ({described(inputs)}, "
            f"{described(observations)})"
        )
    x: Any = tree_map(lambda each: _as_tensor(each, f"inputs of {name}", dtype), _plain(inputs))
    y = _as_tensor(observations, f"observations of {name}", dtype)
    shapes = [tuple(each.shape) for each in tree_leaves(x)]
    shown = shapes[0] if len(shapes) == 1 else shapes
    hint = "" if y.dim() else ": stack single examples into one tensor, or give a Dataset of them"
    if y.dim() == 0 or any(not shape or shape[0] != len(y) for shape in shapes):
        raise ValueError(
            f"{name} needs one observation per input, but they have shapes {shown} and {tuple(y.shape)}{hint}"
        )
    if y.numel() == 0 or not all(map(torch.Size.numel, map(torch.Size, shapes))):
        raise ValueError(f"{name} is empty: inputs have shape {shown}, observations {tuple(y.shape)}")
    for part, tensor in [*(("input", each) for each in tree_leaves(x)), ("observation", y)]:
        if not (tensor.is_floating_point() or tensor.is_complex()):
            continue
        bad_rows = (~torch.isfinite(tensor)).reshape(len(tensor), -1).any(1).nonzero()
        if len(bad_rows):
            row = int(bad_rows[0])
            raise ValueError(f"{name} has a NaN or infinite {part} in row {row}; remove or impute such rows first")
    return x, y


def _plain(inputs: Any) -> Any:
    """Return mappings of any kind as dictionaries, which is what torch knows how to walk through."""
    if isinstance(inputs, Mapping):
        return {key: _plain(value) for key, value in inputs.items()}
    return tuple(map(_plain, inputs)) if isinstance(inputs, tuple | list) else inputs


def _as_tensor(values: Any, name: str, dtype: torch.dtype) -> Tensor:
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
def check_observations(model: NoisyNetwork, x: Inputs, y: Tensor, name: str) -> None:
    """Raise ``ValueError`` unless the network takes ``x`` and every observation lies in its likelihood's support."""
    observed = _likelihood_of(model, x, y, name)
    _check_parameters(observed)
    y = y.to(next(iter(model.noise.values())).keep.device)
    if isinstance(observed, Categorical) and (y.is_floating_point() or y.is_complex() or y.dtype == torch.bool):
        raise ValueError(
            f"{name} has observations of {y.dtype}, but a Categorical likelihood needs class indices: use y.long()"
        )
    inside = observed.support.check(y)
    if inside.shape != (len(y),) or y.shape != (len(y), *observed.event_shape):
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


def _check_parameters(observed: Any) -> None:
    """Raise ``ValueError`` if a likelihood was given a finite parameter that its class does not allow."""
    base = observed
    while hasattr(base, "base_dist"):  # Independent, masked, expanded, transformed
        base = base.base_dist
    for name, constraint in base.arg_constraints.items():
        if name not in base.__dict__ and isinstance(getattr(type(base), name, None), lazy_property):
            continue  # follows from another parameter, up to rounding
        value = getattr(base, name, None)
        if not isinstance(value, Tensor) or is_dependent(constraint) or not bool(value.isfinite().all()):
            continue
        if not bool(constraint.check(value).all()):
            raise ValueError(
                f"the likelihood is a {type(base).__name__} whose {name} must satisfy {constraint}, but is "
                f"{described(value)} from {float(value.min()):.3g} to {float(value.max()):.3g}"
            )


def _likelihood_of(model: NoisyNetwork, x: Inputs, y: Tensor, name: str) -> Any:
    """Return the distribution of as many observations as there are in ``y``, from the network's first output."""
    device = next(iter(model.noise.values())).keep.device
    ones = {site: torch.ones(size, device=device) for site, size in model.sizes.items()}
    own = next((f", and parameters are of {p.dtype}" for p in model.net.parameters()), "")
    shown = (f"shape {tuple(each.shape)} and {each.dtype}" for each in tree_leaves(x))
    found = f"they are of {', '.join(shown)}{own}"
    with evaluating(model), refusing(f"the network cannot take the inputs of {name}: {found}"):
        one = tree_map(lambda each: to_input(each.to(device), model.net), next(batches(x, 1)))
        output = model.run(one, ones)
    try:
        if isinstance(output, Tensor) and output.dim():
            return model.observed(output.expand(len(y), *output.shape[1:]), len(y))
        first = model.observed(output, 1)
        return first.expand((len(y), *first.batch_shape[1:]))
    except NotImplementedError as error:
        raise ValueError(f"the likelihood cannot be expanded to {len(y)} examples: {_first_line(error)}") from error
    except (RuntimeError, LookupError, AttributeError) as error:  # of the caller's own function
        reason = f"{type(error).__name__}: {_first_line(error)}"
        raise ValueError(
            f"the likelihood does not take what the network returns, {described(output)} ({reason})"
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
