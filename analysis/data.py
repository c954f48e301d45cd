"""Data sets as tensors, split into train, validation and test."""

from dataclasses import dataclass

import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn.functional import interpolate

__all__ = ["Split", "digits"]

_SPLIT_SEED = 0  # of the division into train, validation and test: the same for every run


@dataclass(frozen=True)
class Split:
    """Three disjoint parts of one data set, each a pair of images ``(n, c, h, w)`` and labels ``(n,)``."""

    train: tuple[Tensor, Tensor]
    validation: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]


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
