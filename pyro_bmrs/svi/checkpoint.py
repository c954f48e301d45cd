"""Checkpoints: the whole state of a fit in one file that is always complete, and holds no code.

A checkpoint is a single safetensors file, tensors in its body and everything else as JSON in its header. It is written
beside the last good one, flushed to disk and then moved over it, so that whatever happens a complete one is there.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.optim import Optimizer

from pyro_bmrs.io.files import AtomicFile
from pyro_bmrs.svi.fingerprint import fingerprint

__all__ = [
    "State",
    "join",
    "optimizer_tensors",
    "part",
    "read_checkpoint",
    "restore_optimizer",
    "write_checkpoint",
]

_FORMAT = "pyro-bmrs-checkpoint/2"


@dataclass(frozen=True)
class State:
    """What an object needs to go on from where it was.

    Attributes:
        tensors: By name.
        info: Numbers and strings, to be kept as JSON.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    info: dict[str, Any] = field(default_factory=dict)


def join(states: Mapping[str, State]) -> State:
    """Return the states of several objects as one."""
    tensors = {f"{name}/{key}": tensor for name, state in states.items() for key, tensor in state.tensors.items()}
    return State(tensors, {name: state.info for name, state in states.items()})


def part(state: State, name: str) -> State:
    """Return the state of the object called ``name`` from what ``join`` returned.

    Raises:
        ValueError: If it holds none.
    """
    if name not in state.info:
        raise ValueError(f"it has lost the state of the {name}")
    prefix = f"{name}/"
    tensors = {key.removeprefix(prefix): tensor for key, tensor in state.tensors.items() if key.startswith(prefix)}
    return State(tensors, state.info[name])


def optimizer_tensors(optimizer: Optimizer) -> dict[str, Tensor]:
    """Return what an optimiser remembers, named after the positions of its parameters."""
    remembered = (optimizer.state.get(parameter, {}) for parameter in _parameters(optimizer))
    return {f"optimizer.{i}.{name}": value for i, each in enumerate(remembered) for name, value in each.items()}


def restore_optimizer(optimizer: Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Give an optimiser back what ``optimizer_tensors`` returned, where its parameters are and laid out like them.

    Layout matters: fused optimisers walk through memory.

    Raises:
        ValueError: If it is of other parameters.
    """
    memory: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        if key.startswith("optimizer."):
            _, position, name = key.split(".")
            memory.setdefault(int(position), {})[name] = value
    parameters = _parameters(optimizer)
    for i, values in memory.items():
        if i >= len(parameters) or any(each.dim() and each.shape != parameters[i].shape for each in values.values()):
            raise ValueError(f"what the optimiser remembers of parameter {i} does not fit that parameter")
    for i, parameter in enumerate(parameters):
        if i in memory:
            optimizer.state[parameter] = {
                name: torch.empty_like(parameter).copy_(value)
                if value.dim() and value.shape == parameter.shape
                else value.to(parameter.device)
                for name, value in memory[i].items()
            }


def _parameters(optimizer: Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def write_checkpoint(path: Path, state: State) -> None:
    """Write a checkpoint, complete or not at all.

    Raises:
        OSError: If it cannot be written (a full disk, a folder that has become unwritable); the last good one is left
            as it was, and the message says where.
    """
    tensors = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in state.tensors.items()}
    info = json.dumps(state.info)
    header = {"format": _FORMAT, "info": info, "sha256": _digest(tensors, info)}
    try:
        with AtomicFile(path) as temporary:
            save_file(tensors, temporary, header)
            _flush(temporary)
        _flush(path.parent)
    except (OSError, SafetensorError) as error:
        last = f"the last good one, {path}, is left" if path.exists() else "there is none before it"
        raise OSError(f"the checkpoint {path} cannot be written ({error}); {last}") from error


def read_checkpoint(path: Path) -> State:
    """Read what ``write_checkpoint`` wrote; no code in it is run.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If it is no checkpoint of this version, or damaged.
    """
    if not path.exists():
        raise FileNotFoundError(f"there is no checkpoint {path}")
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            if header.get("format") != _FORMAT:
                raise ValueError(f"{path} is no checkpoint of this version (its format is not {_FORMAT!r})")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is no checkpoint: {error}") from None
    info = header.get("info", "")
    if len(header) != 3 or header.get("sha256") != _digest(tensors, info):
        raise ValueError(f"{path} is damaged: its contents do not match its checksum; start again in another folder")
    return State(tensors, json.loads(info))


def _digest(tensors: Mapping[str, Tensor], info: str) -> str:
    return fingerprint([info, *sorted(tensors), *(tensors[name] for name in sorted(tensors))])


def _flush(path: Path) -> None:
    """Have the disk, and not only the operating system, hold what was written."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
