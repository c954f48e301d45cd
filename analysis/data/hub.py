"""The image data sets of the study: how the hub lays them out in parquet files, and where those files are."""

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

__all__ = ["ImageSet", "image_set", "locate"]

PathLike = str | os.PathLike[str]


@dataclass(frozen=True)
class ImageSet:
    """What the loader has to know about one data set.

    Attributes:
        name: Short name, and that of its local folder.
        repo: Repository on the hub.
        folder: Where the repository keeps its parquet files.
        column: Column of the images; labels are in the column ``label``.
        mode: Pillow's name for the images' colours.
        classes: Labels are 0 to ``classes - 1``.
        test: The split with labels that is not for training.
    """

    name: str
    repo: str
    folder: str
    column: str
    mode: Literal["L", "RGB"]
    classes: int
    test: str = "test"


_IMAGE_SETS = (
    ImageSet("mnist", "ylecun/mnist", "mnist", "image", "L", 10),
    ImageSet("fashion_mnist", "zalando-datasets/fashion_mnist", "fashion_mnist", "image", "L", 10),
    ImageSet("cifar10", "uoft-cs/cifar10", "plain_text", "img", "RGB", 10),
    ImageSet("tiny-imagenet", "zh-plus/tiny-imagenet", "data", "image", "RGB", 200, test="valid"),
)


def image_set(name: str) -> ImageSet:
    """Return the data set called ``name``, its short name or that of its repository.

    Raises:
        ValueError: If there is none.
    """
    for images in _IMAGE_SETS:
        if name in (images.name, images.repo):
            return images
    known = ", ".join(f"{images.name} ({images.repo})" for images in _IMAGE_SETS)
    raise ValueError(f"there is no data set {name!r}; choose one of {known}")


def locate(images: ImageSet, data_dir: PathLike | None = None) -> tuple[list[Path], list[Path]]:
    """Return the parquet files for training and for testing, each split complete and in order.

    Args:
        images: The data set.
        data_dir: A folder of data sets, each in one named after it, or the folder of this one; the files may also be in
            a folder of their own within, as in the hub's repositories. By default the environment variable
            ``BMRS_DATA`` names it, and without that the files are downloaded from the hub, once.

    Raises:
        FileNotFoundError: If a split or a part of it is missing.
        OSError: If the download fails.
    """
    root = data_dir or os.environ.get("BMRS_DATA")
    folders = _local_folders(images, Path(root).expanduser()) if root else [_download(images)]
    splits = ("train", images.test)
    for folder in folders:
        if any(_named(folder, split) for split in splits):
            return _complete(folder, "train"), _complete(folder, images.test)
    searched = ", ".join(str(folder) for folder in folders)
    raise FileNotFoundError(
        f"there is no {_pattern('train')} of {images.name} in any of {searched}; put the parquet files of "
        f"{images.repo} there, pass another data_dir, or pass none and unset BMRS_DATA to download them"
    )


def _local_folders(images: ImageSet, root: Path) -> list[Path]:
    others = {other.name for other in _IMAGE_SETS if other is not images}
    if not root.is_dir():
        raise FileNotFoundError(f"the data folder {root} does not exist; correct data_dir or BMRS_DATA")
    # MNIST's files would also pass for Fashion-MNIST's, so the folder of another set is never searched.
    roots = [root / images.name] if root.name in others else [root / images.name, root]
    return list(dict.fromkeys(folder / inner for folder in roots for inner in ("", images.folder, "data")))


def _download(images: ImageSet) -> Path:
    """Return the folder of the repository's parquet files, of which the hub's client keeps a copy in its own cache."""
    elsewhere = f"put the files into a folder {images.name} and pass the one above as data_dir or BMRS_DATA"
    try:
        from huggingface_hub import snapshot_download  # noqa: PLC0415  (optional, and slow to import)
    except ImportError as error:
        raise ImportError(
            f"downloading {images.repo} needs huggingface_hub: pip install 'pyro-bmrs[data]', or {elsewhere}"
        ) from error
    try:
        folder = snapshot_download(images.repo, repo_type="dataset", allow_patterns=[f"{images.folder}/*.parquet"])
    except OSError as error:  # what its errors of network, authorisation and missing repositories have in common
        raise OSError(f"cannot download {images.repo} from the hub; {elsewhere}. The reason: {error}") from error
    return Path(folder) / images.folder


def _pattern(split: str) -> str:
    return f"{split}-XXXXX-of-YYYYY.parquet"


def _named(folder: Path, split: str) -> list[tuple[int, int, Path]]:
    """Return number, total and path of the shards of ``split`` in ``folder``, which need not exist."""
    # Repositories pushed by older clients, tiny-imagenet's for one, have a hash at the end of each name.
    name = re.compile(rf"{split}-(\d{{5}})-of-(\d{{5}})(?:-[0-9a-f]+)?\.parquet")
    paths = sorted(folder.glob("*.parquet"))
    matches = ((name.fullmatch(path.name), path) for path in paths)
    return sorted((int(match[1]), int(match[2]), path) for match, path in matches if match)


def _complete(folder: Path, split: str) -> list[Path]:
    shards = _named(folder, split)
    if not shards:
        raise FileNotFoundError(
            f"there is no {_pattern(split)} in {folder}, though other splits are there; add the files of this split"
        )
    numbers, totals = [number for number, _, _ in shards], {total for _, total, _ in shards}
    total = max(totals)
    if missing := sorted(set(range(total)) - set(numbers)):
        names = ", ".join(f"{split}-{number:05d}-of-{total:05d}.parquet" for number in missing)
        raise FileNotFoundError(f"{folder} lacks {len(missing)} of {total} files of the split {split}: {names}")
    if len(shards) != total or len(totals) > 1:
        names = ", ".join(path.name for _, _, path in shards)
        raise FileNotFoundError(
            f"{folder} mixes files of several versions of the split {split}: {names}; keep those of one version"
        )
    return [path for _, _, path in shards]
