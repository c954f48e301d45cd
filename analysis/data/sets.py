"""Data sets as tensors, split into train, validation and test."""

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn.functional import interpolate

from analysis.data.cache import cache_folder, cached
from analysis.data.hub import ImageSet, image_set, locate

__all__ = ["Split", "count_classes", "digits", "load"]

_SPLIT_SEED = 0  # of the division into train, validation and test: the same for every run
_FORMAT = 1  # of cached files; one more whenever decoding changes

PathLike = str | os.PathLike[str]


@dataclass(frozen=True)
class Split:
    """Three disjoint parts of one data set, each a pair of images ``(n, c, h, w)`` and labels ``(n,)``."""

    train: tuple[Tensor, Tensor]
    validation: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]


def load(name: str, data_dir: PathLike | None = None, size: int | None = None, cache: PathLike | None = None) -> Split:
    """Return a data set of the hub, from a local folder or downloaded, decoded once and cached.

    One fifth of its images for training are for validation, the same ones in every run. Its test images (of
    tiny-imagenet those called valid, since its test images have no labels) are for testing, in their own order.

    Args:
        name: ``"mnist"``, ``"fashion_mnist"``, ``"cifar10"`` or ``"tiny-imagenet"``, or the name of the repository.
        data_dir: Folder of data sets, or of this one; by default ``BMRS_DATA``, or else the hub. See ``locate``.
        size: Height and width to which images are resized, bilinearly and with antialiasing; the paper has 32 for
            LeNet-5 and the MLP and 224 for the large networks. By default they stay as they are.
        cache: Folder for the decoded images, ``n * c * size * size`` bytes a data set; by default ``pyro-bmrs`` in
            ``XDG_CACHE_HOME`` or ``~/.cache``.

    Returns:
        Images as bytes, uint8, which ``fit`` and ``predict`` divide by 255, and labels, int64.

    Raises:
        ImportError: If a package of the extra ``data`` is needed and missing.
        FileNotFoundError: If there is no such folder or a file is missing.
        OSError: If the download fails.
        ValueError: If there is no such data set, ``size`` is not positive, or a file is not what it should be.
    """
    images = image_set(name)
    if size is not None and not (isinstance(size, int) and size > 0):
        raise ValueError(f"size must be a positive integer, the height and width of images, but got {size!r}")
    train, test = locate(images, data_dir)
    folder = cache_folder() if cache is None else Path(cache).expanduser()
    stem = f"{images.name}-{size or 'native'}-{_fingerprint(images, size, train + test)}"
    tensors = cached(folder / f"{stem}.safetensors", lambda: _decode(images, train, test, size))
    x, y = tensors["images"], tensors["labels"]
    held_out = len(x) // 5
    return Split(
        train=(x[held_out:], y[held_out:]),
        validation=(x[:held_out], y[:held_out]),
        test=(tensors["test_images"], tensors["test_labels"]),
    )


def _fingerprint(images: ImageSet, size: int | None, files: list[Path]) -> str:
    """Return a hash that changes with whatever changes the decoded images."""
    states = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    content = json.dumps([_FORMAT, _SPLIT_SEED, images.name, size, states])
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def _decode(images: ImageSet, train: list[Path], test: list[Path], size: int | None) -> dict[str, Tensor]:
    """Decode both splits, the images for training in the random order of which validation is the start."""
    try:
        from analysis.data.decoding import decode  # noqa: PLC0415  (optional packages, which cached images do not need)
    except ImportError as error:
        raise ImportError(f"decoding {images.name} needs {error.name}: pip install 'pyro-bmrs[data]'") from error
    x, y = decode(train, images, size, seed=_SPLIT_SEED)
    test_x, test_y = decode(test, images, size)
    if x.shape[1:] != test_x.shape[1:]:
        raise ValueError(
            f"{test[0]} has images of shape {tuple(test_x.shape[1:])}, but {train[0]} of {tuple(x.shape[1:])}; pass "
            "size to resize all to the same"
        )
    return {"images": x, "labels": y, "test_images": test_x, "test_labels": test_y}


def count_classes(name: str) -> int:
    """Return how many classes a data set has, the digits among them."""
    return 10 if name == "digits" else image_set(name).classes


def digits(size: int = 32) -> Split:
    """Return scikit-learn's 1,797 handwritten digits, in [0, 1], upsampled from 8x8 to ``size`` x ``size``.

    One fifth is for testing, and one fifth of the rest for validation.
    """
    bunch = load_digits()
    images = torch.tensor(bunch.images / 16.0, dtype=torch.float32).unsqueeze(1)
    images = interpolate(images, size=(size, size), mode="bilinear", align_corners=False)
    labels = torch.tensor(bunch.target, dtype=torch.long)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(_SPLIT_SEED))
    test, rest = order.tensor_split([len(order) // 5])
    validation, train = rest.tensor_split([len(rest) // 5])
    return Split(*((images[part], labels[part]) for part in (train, validation, test)))
