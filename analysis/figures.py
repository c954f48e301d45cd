"""The study's figures, from the results of its runs: python -m analysis.figures [--results FOLDER]."""

import json
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import tyro
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from analysis.figure_style import METHODS, WIDTH, figure_style, save_figure, title
from analysis.tradeoff import panels, seed_groups, summarise, tradeoff

__all__ = ["Figures", "draw", "load_results", "main", "post_training", "precision_sweep", "rank_heatmaps"]

Results = Sequence[Mapping[str, Any]]
_RESULTS = Path(__file__).parent / "results" / "study"
_BITS = re.compile(r"BMRS_U-(\d+)")


@dataclass(frozen=True)
class Figures:
    """Draw every figure that the study's results suffice for, as PDF, SVG and PNG."""

    results: Path = _RESULTS / "runs"
    """Folder of the runs' JSON files; those in folders below count too."""
    output: Path = _RESULTS / "figures"


def main(config: Figures) -> list[Path]:
    """Draw what there are results for and return the paths."""
    paths = draw(load_results(config.results), config.output)
    print("\n".join(map(str, paths)))
    return paths


def load_results(folder: Path) -> list[dict[str, Any]]:
    """Return the results of all runs in a folder and those below, in the order of their paths.

    A run is a JSON file with ``compression``, ``accuracy_test`` and a ``config`` of data set, network, method and seed.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If a file is not JSON.
    """
    found = []
    for path in sorted(folder.rglob("*.json")):
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path} is no result of a run ({error}); delete it and run it again") from None
        if _is_result(content):
            found.append(content)
    if not found:
        raise FileNotFoundError(f"there are no results of runs in {folder}: run analysis.study first")
    return found


def _is_result(content: Any) -> bool:
    if not (isinstance(content, dict) and isinstance(content.get("config"), dict)):
        return False
    return {"compression", "accuracy_test"} <= set(content) and {"dataset", "network", "method", "seed"} <= set(
        content["config"]
    )


def draw(results: Results, folder: Path) -> list[Path]:
    """Draw every figure that there are results for into ``folder`` and return the paths."""
    mpl.use("Agg")
    continuous = [result for result in results if result["config"].get("pruning", "continuous") == "continuous"]
    chosen = {
        "tradeoff": (tradeoff, [result for result in continuous if result["config"]["method"] in METHODS]),
        "post_training": (post_training, [result for result in results if "curve" in result]),
        "rank_correlation": (rank_heatmaps, [result for result in results if "rank_correlation" in result]),
        "precision": (
            precision_sweep,
            [result for result in continuous if _BITS.fullmatch(result["config"]["method"])],
        ),
    }
    paths = []
    with figure_style():
        for name, (make, of_kind) in chosen.items():
            if of_kind:
                paths += save_figure(make(of_kind), folder, name)
    return paths


def post_training(results: Results) -> Figure:
    """Draw accuracy against compression of networks pruned after training (the paper's figures 2 and 5).

    A line is the mean over seeds at each level, its band a standard deviation; a marker the mean of the points where
    the criterion stops, the small ones around it those of single seeds.

    Args:
        results: Those with a ``curve`` (columns ``level``, ``compression`` and ``accuracy_test``) and a
            ``stop_level``, at which the curve has a point, or None where the criterion does not stop.
    """
    cells = panels(results)
    figure, axes = _row_of_panels(len(cells), height=2.4)
    methods = set()
    for ax, ((network, dataset), members) in zip(axes, cells.items(), strict=False):
        for group in seed_groups(members):
            methods.add(group[0]["config"]["method"])
            _curve(ax, group)
        ax.set_title(title(network, dataset))
        ax.set_xlabel("parameters removed (%)")
        ax.set_xlim(0, 100)
        ax.set_ylim(0, 102 if ax.get_ylim()[1] > 80 else None)
    _label_first_of_rows(axes, "test accuracy (%)")
    handles = [
        Line2D([], [], color=look.colour, marker=look.marker, label=look.label)
        for method, look in METHODS.items()
        if method in methods
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), 7), columnspacing=1.4)
    return figure


def _curve(ax: Axes, group: Results) -> None:
    look = METHODS[group[0]["config"]["method"]]
    curves = [{key: np.array(values) for key, values in result["curve"].items()} for result in group]
    shared = sorted(set.intersection(*(set(curve["level"].tolist()) for curve in curves)))
    at = [np.isin(curve["level"], shared) for curve in curves]
    removed, accuracy = (
        100 * np.array([curve[key][chosen] for curve, chosen in zip(curves, at, strict=True)])
        for key in ("compression", "accuracy_test")
    )
    mean, sd = accuracy.mean(0), accuracy.std(0, ddof=1) if len(group) > 1 else 0.0
    ax.plot(removed.mean(0), mean, color=look.colour)
    ax.fill_between(removed.mean(0), mean - sd, mean + sd, color=look.colour, alpha=0.18, linewidth=0)
    stops = np.array(
        [
            [100 * curve[key][curve["level"] == result["stop_level"]][0] for key in ("compression", "accuracy_test")]
            for result, curve in zip(group, curves, strict=True)
            if result["stop_level"]  # neither None nor 0: the curve begins with the first structure that goes
        ]
    )
    if len(stops):
        ax.plot(*stops.T, linestyle="none", marker=look.marker, markersize=2.5, color=look.colour, alpha=0.6, zorder=4)
        ax.plot(
            *stops.mean(0), marker=look.marker, markersize=7, color=look.colour, markeredgecolor="black",
            markeredgewidth=0.8, zorder=5,
        )  # fmt: skip


def rank_heatmaps(results: Results) -> Figure:
    """Draw Spearman's correlations between the criteria's orderings, mean over runs (the paper's figures 3, 6 and 7).

    Args:
        results: Those with a ``rank_correlation``: ``methods`` and the matrix ``spearman`` between them. Runs of one
            posterior, which differ only in method, say the same and count once.

    Raises:
        ValueError: If two matrices of one panel are of different methods.
    """
    cells = panels(results)
    figure, axes = _row_of_panels(len(cells), height=2.75, sharey=False)
    image = None
    for ax, ((network, dataset), members) in zip(axes, cells.items(), strict=False):
        once = {result["config"]["seed"]: result["rank_correlation"] for result in members}
        methods = next(iter(once.values()))["methods"]
        if any(each["methods"] != methods for each in once.values()):
            raise ValueError(f"the rank correlations of {title(network, dataset)} are not all of {methods}")
        matrix = np.mean([each["spearman"] for each in once.values()], axis=0)
        image = ax.imshow(matrix, vmin=-1, vmax=1, cmap="PuOr_r")
        labels = [METHODS[method].label for method in methods]
        ax.set_xticks(range(len(labels)), labels, rotation=45, ha="right", rotation_mode="anchor")
        ax.set_yticks(range(len(labels)), labels)
        ax.grid(visible=False)
        ax.tick_params(length=0)
        ax.spines[:].set_visible(False)
        ax.set_title(f"{title(network, dataset)} ({len(once)} seed{'s' * (len(once) > 1)})")
        for (row, column), value in np.ndenumerate(matrix):
            ink = "white" if abs(value) > 0.6 else "black"
            ax.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=5.5, color=ink)
    assert image is not None
    figure.colorbar(image, ax=axes, label="Spearman's rank correlation", shrink=0.6, pad=0.01)
    return figure


def precision_sweep(results: Results) -> Figure:
    """Draw compression and accuracy against p1 of BMRS_U, with standard deviations over seeds (the paper's figure 4).

    Args:
        results: Those whose method is ``"BMRS_U-p1"``; the paper's two values of p1 have their usual markers.
    """
    cells = panels(results)
    figure, grid = plt.subplots(2, len(cells), figsize=(WIDTH, 3.4), squeeze=False, sharex=True)
    for column, ((network, dataset), members) in zip(grid.T, cells.items(), strict=True):
        found = sorted((_bits(group), summarise(group)) for group in seed_groups(members))
        bits = [p1 for p1, _ in found]
        means = ([point.accuracy for _, point in found], [point.compression for _, point in found])
        sds = ([point.accuracy_sd for _, point in found], [point.compression_sd for _, point in found])
        for ax, mean, sd in zip(column, means, sds, strict=True):
            ax.errorbar(bits, mean, yerr=sd, color="0.35", marker=".", markersize=4, elinewidth=0.7, zorder=3)
            for p1, value in zip(bits, mean, strict=True):
                if look := METHODS.get(f"BMRS_U-{p1}"):
                    ax.plot(p1, value, marker=look.marker, color=look.colour, markersize=6.5, zorder=4)
            ax.margins(y=0.12)
            ax.yaxis.set_major_locator(MaxNLocator(5))
        column[0].set_title(title(network, dataset))
        column[1].set_xlim(max(bits) + 1, min(bits) - 1)
        column[1].xaxis.set_major_locator(MaxNLocator(6, integer=True))
        column[1].set_xlabel("$p_1$ (bits)")
    grid[0, 0].set_ylabel("test accuracy (%)")
    grid[1, 0].set_ylabel("parameters removed (%)")
    figure.align_ylabels(grid[:, 0])
    used = {result["config"]["method"] for result in results}
    handles = [
        Line2D([], [], color=look.colour, marker=look.marker, linestyle="none", label=look.label)
        for method, look in METHODS.items()
        if method in used
    ]
    if handles:
        figure.legend(handles=handles, loc="outside lower center", ncols=len(handles))
    return figure


def _bits(group: Results) -> int:
    match = _BITS.fullmatch(group[0]["config"]["method"])
    assert match is not None
    return int(match[1])


def _row_of_panels(count: int, height: float, sharey: bool = False) -> tuple[Figure, list[Axes]]:
    """Return a figure of so many panels, at most three in a row, ``height`` inches each."""
    columns = min(count, 3)
    rows = -(-count // columns)
    figure, grid = plt.subplots(rows, columns, figsize=(WIDTH, 0.5 + height * rows), squeeze=False, sharey=sharey)
    axes = list(grid.flat)
    for ax in axes[count:]:
        ax.remove()
    return figure, axes[:count]


def _label_first_of_rows(axes: Sequence[Axes], label: str) -> None:
    for ax in axes[::3]:
        ax.set_ylabel(label)


if __name__ == "__main__":
    try:
        main(tyro.cli(Figures))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
