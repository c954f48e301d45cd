"""How figures look: one colour and marker per method, the same in all figures."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

__all__ = ["METHODS", "Look", "figure_style", "is_left", "panel_grid", "panel_order", "panel_title", "save_figure"]

_WIDTH = 7.0  # inches, of a page's text


@dataclass(frozen=True)
class Look:
    """A method's name in legends, its colour and its marker."""

    label: str
    colour: str
    marker: str


# Okabe and Ito's palette, its yellow darkened to be seen on white, and two greys; baselines share one colour and
# differ by marker; a purple for the free form. In the order of legends.
METHODS = {
    "none": Look("none (dense)", "#000000", "*"),
    "L2": Look(r"$L_2$ norm", "#999999", "s"),
    "gradient": Look("gradient norm", "#B8A800", "p"),
    "E[theta]": Look(r"$\mathrm{E}[\theta]$", "#E69F00", "^"),
    "SNR": Look("SNR", "#CC79A7", "v"),
    "BMRS_N": Look(r"BMRS$_\mathcal{N}$", "#0072B2", "o"),
    "BMRS_U-8": Look(r"BMRS$_\mathcal{U}$-8", "#56B4E9", "D"),
    "BMRS_U-4": Look(r"BMRS$_\mathcal{U}$-4", "#009E73", "P"),
    "free_form": Look("free form", "#6A3D9A", "H"),
    "random": Look("random", "#BBBBBB", "x"),
    "tp_magnitude": Look("torch-pruning, magnitude", "#D55E00", "<"),
    "tp_taylor": Look("torch-pruning, Taylor", "#D55E00", ">"),
    "tp_group_norm": Look("torch-pruning, group norm", "#D55E00", "X"),
    "scratch": Look("pruned size from scratch", "#555555", "d"),
    "SBP": Look("SBP", "#555555", "h"),
    "BC-GNJ": Look("BC, normal-Jeffreys", "#555555", "8"),
    "BC-GHS": Look("BC, horseshoe", "#555555", "s"),
    "L0": Look(r"$L_0$", "#555555", "^"),
}
_NETWORKS = {
    "mlp": "MLP",
    "mlp_inputs": "MLP with input noise",
    "lenet5": "LeNet-5",
    "lenet5_caffe": "LeNet-5-Caffe",
    "resnet18": "ResNet-18, narrow",
    "resnet50": "ResNet-50",
    "vit_s": "ViT, small",
    "vit_b16": "ViT-B/16",
}
_DATASETS = {"mnist": "MNIST", "fashion_mnist": "Fashion-MNIST", "cifar10": "CIFAR-10", "digits": "digits"}
_AXES = (_NETWORKS, _DATASETS)


def panel_title(network: str, dataset: str) -> str:
    """Return the title of the panel of a network on a data set."""
    return f"{_NETWORKS.get(network, network)}, {_DATASETS.get(dataset, dataset)}"


def panel_order(cell: tuple[str, str]) -> tuple[int, int, tuple[str, str]]:
    """Return the key by which panels of networks on data sets are sorted: as the paper's tables have them."""
    places = [list(names).index(name) if name in names else 99 for name, names in zip(cell, _AXES, strict=True)]
    return places[0], places[1], cell


def panel_grid(count: int, height: float, rows_each: int = 1) -> tuple[Figure, list[list[Axes]]]:
    """Return a figure and the axes of each of ``count`` panels, three side by side, or two where that fills the rows.

    Args:
        count: Number of panels.
        height: Of each, in inches.
        rows_each: Axes of each panel, one below the other.
    """
    columns = {1: 1, 2: 2, 4: 2}.get(count, 3)
    rows = -(-count // columns)
    size = (_WIDTH * (0.55 if columns == 1 else 1), 0.5 + height * rows)
    figure, grid = plt.subplots(rows * rows_each, columns, figsize=size, squeeze=False)
    panels = [list(grid[row : row + rows_each, i]) for row in range(0, len(grid), rows_each) for i in range(columns)]
    for panel in panels[count:]:
        for ax in panel:
            ax.remove()
    return figure, panels[:count]


def is_left(ax: Any) -> bool:
    """Return whether axes stand in the first column of their figure."""
    return ax.get_subplotspec().is_first_col()


@contextmanager
def figure_style() -> Iterator[None]:
    """Set sizes for print, without a display, and back afterwards."""
    settings: Any = {
        "font.size": 8,
        "axes.titlesize": 9,
        "axes.labelsize": 8,
        "axes.linewidth": 0.7,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": "0.92",
        "grid.linewidth": 0.6,
        "legend.fontsize": 7.5,
        "legend.frameon": False,
        "lines.linewidth": 1.2,
        "lines.markersize": 5,
        "errorbar.capsize": 0,
        "mathtext.default": "regular",
        "pdf.fonttype": 42,  # text stays text
        "svg.hashsalt": "pyro-bmrs",
        "figure.constrained_layout.use": True,
    }
    with mpl.rc_context(settings):
        yield


def save_figure(figure: Figure, folder: Path, name: str) -> list[Path]:
    """Write a figure as PDF, SVG and PNG, close it, and return the paths; the same figure gives the same bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{name}.{suffix}" for suffix in ("pdf", "svg", "png")]
    undated = [{"CreationDate": None}, {"Date": None}, {}]
    for path, metadata in zip(paths, undated, strict=True):
        figure.savefig(path, dpi=200, metadata=metadata)
    plt.close(figure)
    return paths
