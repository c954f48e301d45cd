"""Pictures of the comparison of priors: trade-off, calibration, posteriors side by side, and ArviZ's comparison."""

import statistics
import textwrap
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import arviz as az
import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import NullFormatter, StrMethodFormatter

__all__ = ["draw_figures"]

_SHOWN = 12  # structures of the first layer


def draw_figures(report: dict[str, Any], posteriors: Mapping[str, Path], output: Path) -> None:
    """Write trade_off.png, calibration.png, and where there are posteriors compare.png and posteriors.png.

    Args:
        report: What ``analysis.compare_priors`` has found.
        posteriors: Files of ArviZ by the name of the prior.
        output: Folder of the pictures.
    """
    mpl.use("Agg")
    figures = {"trade_off": _trade_off(report), "calibration": _calibration(report)}
    known = {name: az.from_netcdf(path, engine="h5netcdf") for name, path in posteriors.items() if path.exists()}
    if len(known) > 1:
        figures |= {"compare": _comparison(known), "posteriors": _side_by_side(known)}
    for name, figure in figures.items():
        figure.savefig(output / f"{name}.png", dpi=130)
        plt.close(figure)


def _trade_off(report: dict[str, Any]) -> Any:
    """Draw error and negative log likelihood against size: a line per prior along the weight of the KL."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.8), layout="constrained")
    for name in dict.fromkeys(row["prior"] for row in report["rows"]):
        rows = [row for row in report["rows"] if row["prior"] == name]
        left = [100 * (1 - statistics.fmean(row["removed"])) for row in rows]
        errors = [100 * (1 - statistics.fmean(row["accuracy"])) for row in rows]
        for ax, values in ((axes[0], errors), (axes[1], [-statistics.fmean(row["log_likelihood"]) for row in rows])):
            ax.plot(left, values, marker="o", markersize=4, label=name)
    for ax, label in zip(axes, ("validation error (%)", "negative log likelihood (nats per example)"), strict=True):
        ax.set_xscale("log")
        ax.set_yscale("log")
        ax.invert_xaxis()
        ax.set_xlabel("parameters left (%, log scale)")
        ax.set_ylabel(label)
        for axis in (ax.xaxis, ax.yaxis):
            low, high = sorted(axis.get_view_interval())
            axis.set_major_formatter(StrMethodFormatter("{x:g}"))
            axis.set_minor_formatter(StrMethodFormatter("{x:.3g}") if high < 4 * low else NullFormatter())
    figure.legend(*axes[1].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    return figure


def _calibration(report: dict[str, Any]) -> Any:
    """Draw how often predictions come true by how sure they are: a panel per prior, a line per weight of the KL."""
    names = list(dict.fromkeys(row["prior"] for row in report["rows"]))
    columns = min(len(names), 4)
    rows_of = -(-len(names) // columns)
    size = (2.9 * columns, 3.1 * rows_of)
    figure, axes = plt.subplots(rows_of, columns, figsize=size, squeeze=False, sharex=True, sharey=True)
    figure.set_layout_engine("constrained")
    for ax in axes.flat[len(names) :]:
        ax.set_visible(False)
    for ax, name in zip(axes.flat, names, strict=False):
        ax.plot([0, 1], [0, 1], color="#555555", linestyle=":", linewidth=1)
        for row in (row for row in report["rows"] if row["prior"] == name):
            confidence, right = (np.array(row[key]) for key in ("confidence", "right"))
            known = confidence >= 0
            seeds = np.maximum(known.sum(0), 1)
            shown = known.any(0)
            line = [np.where(known, each, 0).sum(0) / seeds for each in (confidence, right)]
            ax.plot(line[0][shown], line[1][shown], marker="o", markersize=3, label=f"{row['kl_weight']:g}")
        ax.set_title(name, fontsize=8)
    axes[0, 0].legend(frameon=False, fontsize=7, title="kl_weight", title_fontsize=7)
    figure.supxlabel("probability of the predicted label")
    figure.supylabel("fraction of these that is right")
    return figure


def _comparison(posteriors: Mapping[str, Any]) -> Any:
    """Draw ArviZ's comparison by leave-one-out cross-validation."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Pareto tails: see column "warning"
        table = az.compare(dict(posteriors))
    ax = az.plot_compare(table, figsize=(9, 0.5 * len(table) + 1.5), textsize=9, title=False)
    figure = ax.figure
    figure.suptitle("expected log predictive density of training examples, each left out (nats)", fontsize=10)
    figure.set_layout_engine("constrained")
    return figure


def _side_by_side(posteriors: Mapping[str, Any]) -> Any:
    """Draw medians and intervals of the first layer's structures, a panel per prior."""
    figure, axes = plt.subplots(1, len(posteriors), figsize=(2.4 * len(posteriors), 4.5), sharey=True, squeeze=False)
    figure.set_layout_engine("constrained")
    for ax, (name, data) in zip(axes[0], posteriors.items(), strict=True):
        site = next(each for each in data.posterior.data_vars if each.endswith(".theta"))
        draws = data.posterior[site].values[0]
        chosen = draws[:, np.argsort(np.median(draws, 0))[:: max(draws.shape[1] // _SHOWN, 1)]]
        low, median, high = np.quantile(chosen, (0.03, 0.5, 0.97), axis=0)
        rows = np.arange(len(median))
        ax.hlines(rows, low, high, color="#0072B2", alpha=0.6)
        ax.scatter(median, rows, color="#0072B2", s=9)
        ax.set_title(textwrap.fill(name, 26), fontsize=8)
        ax.set_yticks([])
    figure.supxlabel(r"$\theta$: median and 94 % interval")
    figure.supylabel("structures of the first layer, by median")
    return figure
