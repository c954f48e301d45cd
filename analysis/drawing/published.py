"""Numbers that others have published, to stand beside ours; accuracies and compressions in per cent."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["Point", "paper_numbers", "published"]


@dataclass(frozen=True)
class Point:
    """A point of the trade-off: means and, where known, standard deviations over seeds.

    Attributes:
        compression: Percentage of the trainable parameters that is removed.
        accuracy: Percentage of the test set that is classified correctly.
        compression_sd: Standard deviation of the former; 0 where unknown.
        accuracy_sd: Its standard deviation.
    """

    compression: float
    accuracy: float
    compression_sd: float = 0.0
    accuracy_sd: float = 0.0


def paper_numbers() -> dict[str, dict[str, Any]]:
    """Return the paper's tables 1 and 2: by network and data set, for each method four numbers.

    They are the compression, its standard deviation, the accuracy and its standard deviation, in per cent.
    """
    tables = json.loads((Path(__file__).parent / "paper_numbers.json").read_text(encoding="utf-8"))
    numbers: dict[str, dict[str, Any]] = tables["table1"] | tables["table2"]
    return numbers


def published(network: str, dataset: str) -> dict[str, Point]:
    """Return what is known of a network on a data set, by method: the paper's table 1, and LeNet-5-Caffe on MNIST.

    Nothing is known of noise on an MLP's inputs, so that its points are those of the plain MLP.
    """
    if (network, dataset) == ("lenet5_caffe", "mnist"):
        return _LENET5_CAFFE
    rows = paper_numbers().get(network.removesuffix("_inputs"), {}).get(dataset, {})
    return {
        method: Point(compression, accuracy, compression_sd or 0.0, accuracy_sd or 0.0)
        for method, (compression, compression_sd, accuracy, accuracy_sd) in rows.items()
    }


def _caffe(filters1: int, filters2: int, inputs: int, neurons: int, error: float) -> Point:
    """Return the point of a LeNet-5-Caffe with so many filters, filters, inputs of its dense layer, and neurons."""
    kept = 26 * filters1 + (25 * filters1 + 1) * filters2 + (inputs + 1) * neurons + 10 * (neurons + 1)
    return Point(100 * (1 - kept / 431_080), 100 - error)


# Neklyudov et al., 2017; Louizos et al., 2017 (group normal-Jeffreys and group horseshoe); Louizos et al., 2018.
_LENET5_CAFFE = {
    "SBP": _caffe(3, 18, 284, 283, 0.86),
    "BC-GNJ": _caffe(8, 13, 88, 13, 1.0),
    "BC-GHS": _caffe(5, 10, 76, 16, 1.0),
    "L0": _caffe(9, 18, 65, 25, 1.0),
}
