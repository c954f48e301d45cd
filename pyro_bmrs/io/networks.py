"""Networks on disk: tensors as safetensors, everything else as JSON, and no code in either.

A saved network is two files, ``NAME.safetensors`` and ``NAME.json``, each of which holds a checksum of the other. The
latter describes the tree of modules. Layers of ``torch.nn`` are rebuilt from it by name and arguments; modules of any
other class are described but never imported: to load those, hand ``load`` an instance, unpruned if you like.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialized
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from pyro_bmrs.checks import check_module, described
from pyro_bmrs.io.description import describe
from pyro_bmrs.io.files import PathLike, folder_lock, write_together
from pyro_bmrs.io.proof import check_same
from pyro_bmrs.io.rebuilding import rebuild, tensors_of
from pyro_bmrs.structures.copying import copied
from pyro_bmrs.structures.pair import NoisePosterior

__all__ = ["load", "save"]

_FORMAT = "pyro-bmrs/2"


def save(net: nn.Module, path: PathLike) -> None:
    """Save a network as ``path.safetensors`` and ``path.json``, both complete or as they were.

    What is written has been loaded again before, from memory, and found to be the same: settings, tensors of every
    dtype, tied and frozen parameters, shared modules.

    Args:
        net: Any module: a compacted network, or a model or guide, which ``load`` puts back into one of its class.
        path: Files to write, without their suffix.

    Raises:
        TypeError: If ``net`` is no module.
        ValueError: If it has something that could not be loaded again; names it, and says what to do.
        OSError: If the files cannot be written; those of before are left then.

    Example:
        >>> import tempfile
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     bmrs.save(net, f"{folder}/small")
        ...     again = bmrs.load(f"{folder}/small")
        >>> torch.equal(again[0].weight, net[0].weight)
        True
    """
    check_module("net", net)
    _check_savable(net)
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors_of(net).items()}
    description = (
        json.dumps({"format": _FORMAT, "network": describe(net), "tensors": _digest(tensors)}, indent=2) + "\n"
    )
    content = description.encode()
    try:
        body = serialized(tensors, {"format": _FORMAT, "description": hashlib.sha256(content).hexdigest()})
    except (SafetensorError, KeyError, ValueError, TypeError) as error:
        raise ValueError(f"the network has a tensor that cannot be saved: {error}") from error
    _prove(net, json.loads(content)["network"], tensors)
    json_file, tensor_file = _files(path)
    write_together({tensor_file: body, json_file: content})


def load(path: PathLike, module: nn.Module | None = None) -> nn.Module:
    """Load what ``save`` wrote.

    Args:
        path: The files, without their suffix.
        module: An instance of the class that was saved, whose layers and tensors are replaced in place; of a model or
            guide, one as it was made at first. Load a model before its guide. Not needed for networks that consist of
            layers of ``torch.nn`` alone.

    Returns:
        The network, in eval mode, on the CPU (or ``module``, on its device).

    Raises:
        FileNotFoundError: If a file is missing.
        TypeError: If ``module`` is no module.
        ValueError: If a file is damaged or was not written by ``save``, the two do not belong together, or they do not
            fit ``module``, which is left as it was. No code in them is run.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     bmrs.save(nn.Linear(4, 8), f"{folder}/small")
        ...     bmrs.load(f"{folder}/small")
        Linear(in_features=4, out_features=8, bias=True)
    """
    if not (module is None or isinstance(module, nn.Module)):
        raise TypeError(f"module must be an instance of the class that was saved, but got {described(module)}")
    json_file, tensor_file = _files(path)
    with folder_lock(json_file.parent, shared=True):
        content = _read(json_file)
        tensors, header = _read_tensors(tensor_file)
    try:
        saved = _parsed(content, json_file)
        tried = rebuild(saved["network"], tensors, None if module is None else copied(module))
    except RecursionError:
        raise ValueError(f"{json_file} is truncated or no description of a network: it is nested too deeply") from None
    expected = {"format": _FORMAT, "description": hashlib.sha256(content).hexdigest()}
    if header != expected or saved.get("tensors") != _digest(tensors):
        raise ValueError(f"{json_file} and {tensor_file.name} do not belong together, or one of them is damaged")
    return tried if module is None else rebuild(saved["network"], tensors, module)


def _files(path: PathLike) -> tuple[Path, Path]:
    try:
        base = Path(path)
    except TypeError:
        raise TypeError(f"path must be a path without suffix, but got {described(path)}") from None
    if not base.name:
        raise ValueError(f"path must name the files, without suffix, but got {str(path)!r}")
    return base.with_name(base.name + ".json"), base.with_name(base.name + ".safetensors")


def _check_savable(net: nn.Module) -> None:
    """Raise ``ValueError`` where a module holds what no file without code can."""
    for name, module in net.named_modules():
        kind = type(module).__name__
        where = f"{name or 'the network'} is a {kind}"
        if kind in ("OptimizedModule", "DataParallel", "DistributedDataParallel"):
            inner = "_orig_mod" if kind == "OptimizedModule" else "module"
            raise ValueError(f"{where}, a wrapper: save what it wraps, .{inner}")
        if any(each.__name__ == "ScriptModule" for each in type(module).__mro__):
            raise ValueError(f"{where}, which is compiled code: save it with torch.jit.save")
        if type(module).get_extra_state is not nn.Module.get_extra_state:
            raise ValueError(f"{where} with an extra state, which may be anything: save its state_dict with torch.save")
        if getattr(module, "latents", None) is not None and isinstance(module, NoisePosterior):
            raise ValueError(
                f"{where} with a guide of other latent sites, which is not among its layers: keep both by "
                "torch.save(guide.latents.module.state_dict(), ...) and torch.save(guide.state_dict(), ...)"
            )
    for name, tensor in (*net.named_parameters(), *net.named_buffers()):
        if is_lazy(tensor):
            raise ValueError(f"{name!r} has no shape yet: run the network once, then save it")
        if tensor.is_meta or tensor.layout != torch.strided or tensor.is_quantized:
            raise ValueError(f"{name!r} is a tensor of layout {tensor.layout} on {tensor.device}, without plain values")


def _prove(net: nn.Module, description: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Raise ``ValueError`` unless what is about to be written gives the same network again."""
    try:
        given = copied(net) if _needs_instance(description["module"]) else None
        check_same(rebuild(description, {name: each.clone() for name, each in tensors.items()}, given), net)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"the network could not be loaded again, so it is not saved: {error}") from error


def _needs_instance(description: Any) -> bool:
    children = (description or {}).get("children", {}).values()
    return bool(description) and (description.get("custom", False) or any(map(_needs_instance, children)))


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} is missing: a saved network is two files, .json and .safetensors") from None


def _parsed(content: bytes, path: Path) -> dict[str, Any]:
    try:
        saved = json.loads(content.decode())
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is truncated or no description of a network: {error}") from None
    if not (isinstance(saved, dict) and saved.get("format") == _FORMAT and isinstance(saved.get("network"), dict)):
        raise ValueError(f"{path} is no network saved by pyro-bmrs (its format is not {_FORMAT!r})")
    return saved


def _read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing: a saved network is two files, .json and .safetensors")
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (SafetensorError, ValueError, OSError, RuntimeError) as error:
        raise ValueError(f"{path} is truncated or no safetensors file: {error}") from None


def _digest(tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of names, dtypes, shapes and every element."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        digest.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        if tensor.numel():
            digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
