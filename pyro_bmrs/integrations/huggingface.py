"""Pruned networks of transformers in folders and on the Hugging Face Hub (extra ``hf``).

``from_pretrained`` of transformers itself cannot say that one layer is narrower than its neighbour. Here a folder has
the configuration of the whole network, and beside it what ``pyro_bmrs.save`` writes: the sizes that are left, which
are replayed onto a whole network made from the configuration.
"""

import copy
import tempfile
from pathlib import Path
from typing import Any

from torch import nn

from pyro_bmrs.checks import check_module, described
from pyro_bmrs.io.files import PathLike
from pyro_bmrs.io.networks import load, save

__all__ = ["from_pretrained", "push_to_hub", "save_pretrained"]

_NAME = "pruned"
_FILES = ("config.json", f"{_NAME}.json", f"{_NAME}.safetensors")


def save_pretrained(net: nn.Module, folder: PathLike) -> None:
    """Write a pruned network of transformers into a folder, which is made if it does not exist.

    Args:
        net: What ``compact`` or ``prune`` has returned, of a class of transformers.
        folder: It gets ``config.json``, ``pruned.json`` and ``pruned.safetensors``.

    Raises:
        TypeError: If ``net`` is no module, or has no configuration of transformers.
        ValueError: If it cannot be saved, see ``pyro_bmrs.save``.
        OSError: If the folder cannot be written.
    """
    check_module("net", net)
    config: Any = getattr(net, "config", None)
    if not hasattr(config, "save_pretrained"):
        raise TypeError(
            f"net must be a network of transformers, with its config, but is a {type(net).__name__}; "
            "save(net, path) and load(path, module) are for any other"
        )
    folder = _folder(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save(net, folder / _NAME)
    config = copy.deepcopy(config)
    config.architectures = [type(net).__name__]
    config.save_pretrained(folder)


def from_pretrained(path: PathLike, model: nn.Module | None = None, **hub: Any) -> nn.Module:
    """Return the pruned network of a folder, or of a repository on the hub.

    Args:
        path: A folder that ``save_pretrained`` has written, or the name of a repository, ``"owner/name"``.
        model: A whole network of the class that was saved, to be refitted in place; by default one of transformers is
            made from the configuration. Needed for classes that transformers does not have.
        hub: Keywords of ``huggingface_hub.snapshot_download``, such as ``revision`` or ``token``.

    Returns:
        The network in eval mode, on the CPU (or ``model``, on its device).

    Raises:
        FileNotFoundError: If the folder or a file of it is missing.
        OSError: If the download fails.
        ValueError: If the files are damaged, or transformers has no such class.
    """
    folder = _folder(path)
    if not folder.is_dir():
        if folder.is_absolute() or len(folder.parts) != 2:
            raise FileNotFoundError(f"there is no folder {str(path)!r}, nor can that be a repository, 'owner/name'")
        from huggingface_hub import snapshot_download  # noqa: PLC0415  (optional, and slow to import)

        folder = Path(snapshot_download(str(path), allow_patterns=list(_FILES), **hub))
    return load(folder / _NAME, _whole(folder) if model is None else model)


def push_to_hub(net: nn.Module, repo_id: str, *, private: bool = False, **hub: Any) -> str:
    """Write a pruned network of transformers to a repository on the hub, which is made if it does not exist.

    Args:
        net: As for ``save_pretrained``.
        repo_id: Name of the repository, ``"owner/name"``.
        private: Whether a new repository is private.
        hub: Keywords of ``huggingface_hub.HfApi.upload_folder``, such as ``token`` or ``commit_message``.

    Returns:
        The address of the commit.

    Raises:
        TypeError, ValueError: As for ``save_pretrained``.
        OSError: If the hub refuses, or there is no network.
    """
    from huggingface_hub import HfApi  # noqa: PLC0415  (optional, and slow to import)

    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(net, folder)  # first, so that nothing is made for what cannot be saved
        api = HfApi()
        api.create_repo(repo_id, private=private, exist_ok=True, token=hub.get("token"))
        return str(api.upload_folder(repo_id=repo_id, folder_path=folder, allow_patterns=list(_FILES), **hub))


def _folder(path: PathLike) -> Path:
    try:
        return Path(path).expanduser()
    except TypeError:
        raise TypeError(f"the folder must be a path, but got {described(path)}") from None


def _whole(folder: Path) -> nn.Module:
    """Return a network with random weights made from a folder's configuration."""
    import transformers  # noqa: PLC0415  (optional, and slow to import)

    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder} has no config.json: it is no folder that save_pretrained has written")
    config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    names = config.architectures or ["none"]
    kind = getattr(transformers, names[0], None)
    if not (isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)):
        raise ValueError(f"transformers has no class {names[0]!r}: make a whole network and pass it as model")
    net: nn.Module = kind(config)
    return net
