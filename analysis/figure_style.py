"""How figures look: one colour and marker a method, the same in all of them, told apart by everyone."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
from matplotlib.figure import Figure

__all__ = ["DATASETS", "METHODS", "NETWORKS", "WIDTH", "Look", "figure_style", "save_figure", "title"]

WIDTH = 7.0  # inches, of a page's text


@dataclass(frozen=True)
class Look:
    """A method's name in legends, its colour and its marker."""

    label: str
    colour: str
    marker: str


# Okabe and Ito's palette and two greys; peers share one colour and differ by marker. In the order of legends.
METHODS = {
    "none": Look("none (dense)", "#000000", "*"),
    "L2": Look(r"$L_2$ norm", "#999999", "s"),
    "gradient": Look("gradient norm", "#F0E442", "p"),
    "E[theta]": Look(r"$\mathrm{E}[\theta]$", "#E69F00", "^"),
    "SNR": Look("SNR", "#CC79A7", "v"),
    "BMRS_N": Look(r"BMRS$_\mathcal{N}$", "#0072B2", "o"),
    "BMRS_U-8": Look(r"BMRS$_\mathcal{U}$-8", "#56B4E9", "D"),
    "BMRS_U-4": Look(r"BMRS$_\mathcal{U}$-4", "#009E73", "P"),
    "tp_magnitude": Look("torch-pruning, magnitude", "#D55E00", "<"),
    "tp_taylor": Look("torch-pruning, Taylor", "#D55E00", ">"),
    "tp_group_norm": Look("torch-pruning, group norm", "#D55E00", "X"),
    "scratch": Look("pruned size from scratch", "#555555", "d"),
    "SBP": Look("SBP", "#555555", "h"),
    "BC-GNJ": Look("BC, normal-Jeffreys", "#555555", "8"),
    "BC-GHS": Look("BC, horseshoe", "#555555", "s"),
    "L0": Look(r"$L_0$", "#555555", "^"),
}
NETWORKS = {
    "mlp": "MLP",
    "mlp_inputs": "MLP, noise on inputs too",
    "lenet5": "LeNet-5",
    "lenet5_caffe": "LeNet-5-Caffe",
}
DATASETS = {"mnist": "MNIST", "fashion_mnist": "Fashion-MNIST", "cifar10": "CIFAR-10", "digits": "digits"}


def title(network: str, dataset: str) -> str:
    """Return the title of a panel."""
    return f"{NETWORKS.get(network, network)}, {DATASETS.get(dataset, dataset)}"


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
