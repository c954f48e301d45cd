"""Parquet files of encoded images, as the hub has them, into one tensor of pixels and one of labels."""

import io
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from analysis.data.hub import ImageSet

__all__ = ["decode"]

_LABEL = "label"
_CORRUPT = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)  # what Pillow raises for bad bytes


class _Row(NamedTuple):
    file: Path
    number: int
    image: bytes | None
    label: int | None

    def error(self, reason: object) -> ValueError:
        return ValueError(f"{self.file}, row {self.number} (counted from 0): {reason}")


def decode(
    files: Sequence[Path], images: ImageSet, size: int | None = None, seed: int | None = None
) -> tuple[Tensor, Tensor]:
    """Decode every image of some parquet files.

    One thread does it: with images this small most of the time goes into Python, and two took as long as one.

    Args:
        files: Parquet files with a column of images ``{bytes, path}`` and a column of labels.
        images: The data set that they should be.
        size: Height and width to which images are resized, bilinearly and with antialiasing; by default they stay as
            they are.
        seed: Of the random order into which the rows are put; by default they stay in that of the files.

    Returns:
        Pixels ``(n, c, h, w)``, uint8, and labels ``(n,)``, int64.

    Raises:
        ValueError: If a file is truncated, has other columns, or has a row that is no such image or label; the message
            names file and row.
    """
    opened = [_open(file, images) for file in files]
    n = sum(parquet.metadata.num_rows for parquet in opened)
    if n == 0:
        raise ValueError(f"{', '.join(map(str, files))}: no rows; get complete files of {images.repo}")
    # Each row is written to where the order wants it, since sorting afterwards would need the memory twice.
    places = range(n) if seed is None else torch.randperm(n, generator=torch.Generator().manual_seed(seed)).argsort()
    labels = np.empty(n, dtype=np.int64)
    pixels: NDArray[np.uint8] = np.empty((0, 0, 0, 0), dtype=np.uint8)
    rows = chain.from_iterable(map(_rows, files, opened, [images] * len(files)))
    for i, (place, row) in enumerate(zip(map(int, places), rows, strict=True)):
        decoded = _pixels(row, images, size)
        if i == 0:
            pixels = np.empty((n, *decoded.shape), dtype=np.uint8)
        if decoded.shape != pixels.shape[1:]:
            raise row.error(
                f"the image is {decoded.shape[2]} wide and {decoded.shape[1]} high, but the first one is "
                f"{pixels.shape[3]} wide and {pixels.shape[2]} high; pass size to resize all to the same"
            )
        if row.label is None or not 0 <= row.label < images.classes:
            raise row.error(f"the label is {row.label}, but {images.name} has 0 to {images.classes - 1}")
        pixels[place], labels[place] = decoded, row.label
    return torch.from_numpy(pixels), torch.from_numpy(labels)


def _open(file: Path, images: ImageSet) -> Any:
    try:
        parquet = pq.ParquetFile(file)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{file} is truncated or no parquet file, get it again: {error}") from None
    schema = parquet.schema_arrow
    for column in (images.column, _LABEL):
        if column not in schema.names:
            raise ValueError(
                f"{file} has no column {column!r}, which {images.name} needs, but {', '.join(schema.names)}; is it a "
                "file of another data set?"
            )
    image, label = schema.field(images.column).type, schema.field(_LABEL).type
    if not (pa.types.is_struct(image) and image.get_field_index("bytes") >= 0):
        raise ValueError(f"{file}: column {images.column!r} must have images as {{bytes, path}}, but is {image}")
    if not pa.types.is_integer(label):
        raise ValueError(f"{file}: column {_LABEL!r} must have whole numbers, but is {label}")
    return parquet


def _rows(file: Path, parquet: Any, images: ImageSet) -> Iterator[_Row]:
    """Yield the rows of one file, a group of them in memory at a time."""
    start = 0
    for group in range(parquet.metadata.num_row_groups):
        stop = start + parquet.metadata.row_group(group).num_rows
        try:
            table = parquet.read_row_group(group, columns=[images.column, _LABEL])
        except (pa.ArrowException, OSError) as error:
            raise ValueError(
                f"{file}, rows {start} to {stop - 1} (counted from 0): truncated or corrupt, get it again: {error}"
            ) from None
        encoded = pc.struct_field(table.column(images.column), "bytes").to_pylist()
        for number, image, label in zip(range(start, stop), encoded, table.column(_LABEL).to_pylist(), strict=True):
            yield _Row(file, number, image, label)
        start = stop


def _pixels(row: _Row, images: ImageSet, size: int | None) -> NDArray[np.uint8]:
    """Return one image as ``(c, h, w)``."""
    if row.image is None:
        raise row.error("there are no bytes of an image")
    try:
        with Image.open(io.BytesIO(row.image), formats=("PNG", "JPEG")) as image:
            image.load()
    except _CORRUPT as error:
        raise row.error(f"the image is corrupt or neither PNG nor JPEG: {error}") from None
    if image.mode not in (images.mode, "L"):  # a grey image among coloured ones is taken, not the reverse
        raise row.error(f"the image has mode {image.mode}, but those of {images.name} have {images.mode}")
    colours = image.convert(images.mode)
    if size is not None:
        colours = colours.resize((size, size), Image.Resampling.BILINEAR)
    pixels: NDArray[np.uint8] = np.asarray(colours)
    return pixels.reshape(colours.height, colours.width, -1).transpose(2, 0, 1)
