"""The trade-off between size and accuracy: all methods, recipes and peers, and the published points."""

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator
from numpy.typing import NDArray

from analysis.figure_style import METHODS, WIDTH, title
from analysis.published import Point, published

__all__ = ["panels", "seed_groups", "summarise", "tradeoff"]

Results = Sequence[Mapping[str, Any]]
_TICKS = (100, 50, 20, 10, 5, 2, 1, 0.5, 0.2, 0.1)  # % of the parameters left
_STRIP = 0.12  # of a panel's height, for networks that have collapsed


def tradeoff(results: Results) -> Figure:
    """Draw test accuracy against the parameters left, a panel for each network and data set.

    Networks below half of the panel's best accuracy, less a standard deviation, have collapsed and stand in a strip at
    the bottom. Runs that differ only by a setting (of ours the KL's weight) are points of one line.

    Raises:
        ValueError: If none of the results is of pruning while training.
    """
    results = [
        result
        for result in results
        if result["config"].get("pruning", "continuous") == "continuous" and result["config"]["method"] in METHODS
    ]
    cells = panels(results)
    if not cells:
        raise ValueError("no result is of a method that prunes while training, so there is no trade-off to draw")
    figure, grid = _grid(list(cells))
    seen: set[str] = set()
    for (network, dataset), members in cells.items():
        ax, known = grid[network, dataset], published(network, dataset)
        seen |= set(known) | {result["config"]["method"] for result in members}
        _panel(ax, members, known)
        ax.set_title(title(network, dataset))
    _legend(figure, [method for method in METHODS if method in seen])
    return figure


def panels(results: Iterable[Mapping[str, Any]]) -> dict[tuple[str, str], list[Mapping[str, Any]]]:
    """Return the results of each network on each data set."""
    cells: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for result in results:
        cells.setdefault((result["config"]["network"], result["config"]["dataset"]), []).append(result)
    return dict(sorted(cells.items()))


def seed_groups(results: Iterable[Mapping[str, Any]]) -> list[list[Mapping[str, Any]]]:
    """Return the results in groups that differ by nothing but their seed."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for result in results:
        config = {name: value for name, value in result["config"].items() if name != "seed"}
        groups.setdefault(json.dumps(config, sort_keys=True), []).append(result)
    return list(groups.values())


def summarise(group: Results) -> Point:
    """Return the mean of a group's compressions and accuracies, and their standard deviations where it has several."""
    compressions, accuracies = ([100 * result[key] for result in group] for key in ("compression", "accuracy_test"))
    sds = [float(np.std(values, ddof=1)) if len(group) > 1 else 0.0 for values in (compressions, accuracies)]
    return Point(float(np.mean(compressions)), float(np.mean(accuracies)), *sds)


def _grid(cells: Sequence[tuple[str, str]]) -> tuple[Figure, dict[tuple[str, str], Axes]]:
    """Return axes for each cell, networks below each other and data sets side by side."""
    networks, datasets = (sorted({cell[i] for cell in cells}) for i in (0, 1))
    height = 0.6 + 2.3 * len(networks)
    figure, axes = plt.subplots(len(networks), len(datasets), figsize=(WIDTH, height), squeeze=False)
    found = {}
    for i, network in enumerate(networks):
        for j, dataset in enumerate(datasets):
            if (network, dataset) in cells:
                found[network, dataset] = axes[i, j]
            else:
                axes[i, j].remove()
        next(found[network, name] for name in datasets if (network, name) in cells).set_ylabel("test accuracy (%)")
    return figure, found


def _panel(ax: Axes, results: Results, known: Mapping[str, Point]) -> None:
    lines: dict[tuple[str, str], list[Point]] = {}
    for group in seed_groups(results):
        config = group[0]["config"]
        lines.setdefault((config["method"], config.get("recipe", "")), []).append(summarise(group))
    points = [*known.values(), *(point for line in lines.values() for point in line)]
    _scales(ax, points)
    half = max(point.accuracy for point in points) / 2
    for method, point in known.items():
        _draw(ax, [point], half, METHODS[method].colour, METHODS[method].marker, "published")
    for (method, recipe), line in lines.items():
        _draw(ax, line, half, METHODS[method].colour, METHODS[method].marker, recipe)


def _left(point: Point) -> float:
    """Return the percentage of parameters that is left, 0.01 at least: a logarithm has no 0."""
    return max(100 - point.compression, 0.01)


def _has_collapsed(point: Point, half: float) -> bool:
    return point.accuracy - point.accuracy_sd < half


def _scales(ax: Axes, points: Sequence[Point]) -> None:
    """Set a logarithmic scale of the parameters left, falling, and one of the test error, with a strip below it."""
    half = max(point.accuracy for point in points) / 2
    ax.set_xscale("log")
    fewest = min(_left(point) for point in points)
    ax.set_xlim(115, min(0.8 * fewest, 40))
    ax.set_xticks([tick for tick in _TICKS if tick >= ax.get_xlim()[1]])
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.set_xlabel("parameters left (%, log scale)")

    ax.set_yscale("function", functions=(_from_accuracy, _to_accuracy))
    ends = [
        accuracy
        for point in points
        if not _has_collapsed(point, half)
        for accuracy in (point.accuracy - point.accuracy_sd, point.accuracy + point.accuracy_sd)
    ]
    low, high = (float(_from_accuracy(np.array(end))) for end in (min(ends), max(ends)))
    room = max(high - low, 0.02)
    low, high = low - 0.08 * room, high + 0.08 * room
    if any(_has_collapsed(point, half) for point in points):
        low -= _STRIP / (1 - _STRIP) * (high - low)
        ax.axhline(
            float(_to_accuracy(np.array(low + _STRIP * (high - low)))), color="0.6", linewidth=0.6, dashes=(4, 3)
        )
        ax.annotate("collapsed", (0.02, 0.02), xycoords="axes fraction", fontsize=6.5, color="0.4", va="bottom")
    ax.set_ylim(*(float(_to_accuracy(np.array(end))) for end in (low, high)))
    ax.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    ax.yaxis.set_minor_locator(NullLocator())


def _from_accuracy(accuracy: NDArray[np.float64]) -> NDArray[np.float64]:
    return -np.log10(np.clip(100 - accuracy, 0.01, None))


def _to_accuracy(value: NDArray[np.float64]) -> NDArray[np.float64]:
    return 100 - 10 ** -np.asarray(value)


def _draw(ax: Axes, line: Sequence[Point], half: float, colour: str, marker: str, recipe: str) -> None:
    looks = _LOOKS.get(recipe, _LOOKS[""])
    alive = sorted((p for p in line if not _has_collapsed(p, half)), key=lambda point: point.compression)
    for point in (point for point in line if _has_collapsed(point, half)):
        ax.plot(
            _left(point), _STRIP / 2, transform=ax.get_xaxis_transform(), marker=marker, linestyle="none", zorder=3,
            **_face(colour, looks),
        )  # fmt: skip
    if not alive:
        return
    ax.errorbar(
        [_left(point) for point in alive],
        [point.accuracy for point in alive],
        xerr=np.array([_left_error(point) for point in alive]).T,
        yerr=[point.accuracy_sd for point in alive],
        color=colour, marker=marker, linestyle="-" if len(alive) > 1 else "none", linewidth=0.9, elinewidth=0.7,
        zorder=looks["zorder"], **_face(colour, looks),
    )  # fmt: skip


def _left_error(point: Point) -> tuple[float, float]:
    """Return how far the error bar reaches on either side, so that it stays on a logarithmic axis."""
    return min(point.compression_sd, 0.9 * _left(point)), min(point.compression_sd, point.compression)


# By recipe: whether filled, colour of the edge (None: the method's own), size, and what lies above what.
_LOOKS: dict[str, dict[str, Any]] = {
    "published": {"filled": False, "edge": None, "size": 4.5, "zorder": 2, "label": "published"},
    "paper": {"filled": True, "edge": None, "size": 4.5, "zorder": 3, "label": "paper's recipe, run here"},
    "ours": {"filled": True, "edge": "black", "size": 6.5, "zorder": 4, "label": "our recipe"},
    "": {"filled": True, "edge": None, "size": 5, "zorder": 3, "label": "peers"},
}


def _face(colour: str, looks: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "markersize": looks["size"],
        "markerfacecolor": colour if looks["filled"] else "white",
        "markeredgecolor": looks["edge"] or colour,
        "markeredgewidth": 0.9,
    }


def _legend(figure: Figure, methods: Sequence[str]) -> None:
    """Explain markers by method, and their filling by recipe, below the panels."""
    handles = [
        Line2D([], [], color=look.colour, marker=look.marker, linestyle="none", label=look.label)
        for look in (METHODS[method] for method in methods)
    ]
    handles += [
        Line2D([], [], marker="o", linestyle="none", label=looks["label"], **_face("0.6", looks))
        for name, looks in _LOOKS.items()
        if name
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=4, columnspacing=1.4, handletextpad=0.4)
