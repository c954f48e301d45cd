"""The trade-off between size and accuracy: all methods, recipes and baselines, and the published points."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import NullLocator
from numpy.typing import ArrayLike, NDArray

from analysis.drawing.figure_style import METHODS, is_left, panel_grid, panel_order, panel_title
from analysis.drawing.published import Point, published
from analysis.runs.config import BASELINES
from analysis.runs.store import RunResult

__all__ = ["of_summary", "panels", "seed_groups", "summarise", "summary", "tradeoff"]

Results = Sequence[RunResult]
# Where ticks may be, the most welcome first: parameters left, and accuracy, in %.
_TICKS_LEFT = [[100, 10, 1, 0.1], [50, 20, 5, 2, 0.5, 0.2]]
_TICKS_ACCURACY = [[number * step for number in range(round(100 / step))] for step in (10, 5, 1, 0.5, 0.2, 0.1)]
_STRIP = 0.12  # of a panel's height, for networks that have collapsed


def summary(results: Results) -> Figure:
    """Draw one message: BMRS_N by our recipe beside baselines and the published point, where there are all three.

    Raises:
        ValueError: If there is no network and data set of which all three are known.
    """
    return tradeoff(of_summary(results), only=("none", "BMRS_N"))


def of_summary(results: Results) -> Results:
    """Return the results that ``summary`` shows."""
    chosen = [
        result
        for result in results
        if result["config"]["method"] in BASELINES or (result["config"].get("recipe") == "ours" and _is_shown(result))
    ]
    complete = []
    for cell, members in panels(chosen).items():
        methods = {member["config"]["method"] for member in members}
        if "BMRS_N" in methods and methods & set(BASELINES) and "BMRS_N" in published(*cell):
            complete += members
    return complete


def _is_shown(result: RunResult) -> bool:
    return result["config"]["method"] in ("none", "BMRS_N")


def tradeoff(results: Results, only: Sequence[str] = ()) -> Figure:
    """Draw test accuracy against the parameters left, a panel for each network and data set.

    Networks below half of the panel's best accuracy, less a standard deviation, have collapsed and stand in a strip at
    the bottom, called fail, at its right end if they are smaller than all others. Runs that differ only by a setting
    (for our recipe the weight of the KL) are points of one line. Of what is published only the methods ``only`` are
    drawn, if it names some.

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
    alone = len(cells) == 1
    figure, grid = panel_grid(len(cells), height=3.4 if alone else 2.3)
    seen, recipes = set[str](), set[str]()
    for (ax,), (cell, members) in zip(grid, cells.items(), strict=True):
        known = {method: point for method, point in published(*cell).items() if not only or method in only}
        seen |= set(known) | {result["config"]["method"] for result in members}
        recipes |= {result["config"].get("recipe", "") for result in members} | ({"published"} if known else set())
        _panel(ax, members, known)
        ax.set_title(panel_title(*cell))
        if is_left(ax):
            ax.set_ylabel("test accuracy (%),\nerror on a log scale")
    shown = [looks for recipe, looks in _LOOKS.items() if recipe in recipes and looks["label"]]
    _legend(figure, [method for method in METHODS if method in seen], shown, columns=2 if alone else 4)
    return figure


def panels(results: Iterable[RunResult]) -> dict[tuple[str, str], list[RunResult]]:
    """Return the results of each network on each data set."""
    cells: dict[tuple[str, str], list[RunResult]] = {}
    for result in results:
        cells.setdefault((result["config"]["network"], result["config"]["dataset"]), []).append(result)
    return {cell: cells[cell] for cell in sorted(cells, key=panel_order)}


def seed_groups(results: Iterable[RunResult]) -> list[list[RunResult]]:
    """Return the results in groups that differ by nothing but their seed, and what is each seed's own."""
    groups: dict[str, list[RunResult]] = {}
    for result in results:
        config = {name: value for name, value in result["config"].items() if name not in ("seed", "widths")}
        groups.setdefault(json.dumps(config, sort_keys=True), []).append(result)
    return list(groups.values())


def summarise(group: Results) -> Point:
    """Return the mean of a group's compressions and accuracies, and their standard deviations where it has several."""
    compressions, accuracies = ([100 * result[key] for result in group] for key in ("compression", "accuracy_test"))
    sds = [float(np.std(values, ddof=1)) if len(group) > 1 else 0.0 for values in (compressions, accuracies)]
    return Point(float(np.mean(compressions)), float(np.mean(accuracies)), *sds)


def _panel(ax: Axes, results: Results, known: Mapping[str, Point]) -> None:
    lines: dict[tuple[str, str, str], list[Point]] = {}
    for group in seed_groups(results):
        config = group[0]["config"]
        key = config["method"], config.get("recipe", ""), config.get("ranking", "layer")
        lines.setdefault(key, []).append(summarise(group))
    points = [*known.values(), *(point for line in lines.values() for point in line)]
    _scales(ax, points)
    half = max(point.accuracy for point in points) / 2
    for method, point in known.items():
        _draw(ax, [point], half, METHODS[method].colour, METHODS[method].marker, "published")
    for (method, recipe, _), line in lines.items():
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
    working = [point for point in points if not _has_collapsed(point, half)] or points
    ax.set_xlim(115, min(0.8 * min(_left(point) for point in working), 40))
    ticks = _spaced(_TICKS_LEFT, ax.get_xlim(), np.log10, gap=0.13)
    ax.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    ax.set_xlabel("parameters left (%, log scale)")

    ax.set_yscale("function", functions=(_from_accuracy, _to_accuracy))
    bars = [(p.accuracy, p.accuracy_sd if p.accuracy_sd < 5 else 0) for p in working]
    ends = _from_accuracy(np.array([mean + sign * sd for mean, sd in bars for sign in (-1, 1)]))
    middle, room = (ends.max() + ends.min()) / 2, max(ends.max() - ends.min(), 0.02)
    low, high = middle - 0.58 * room, middle + 0.58 * room
    ticks = _spaced(_TICKS_ACCURACY, _to_accuracy(np.array([low, high])), _from_accuracy, gap=0.11)
    labels = [f"{tick:g}" for tick in ticks]
    if len(working) < len(points):
        ax.axhline(float(_to_accuracy(low)), color="0.6", linewidth=0.6, dashes=(4, 3))
        low -= _STRIP / (1 - _STRIP) * (high - low)
        ticks.append(float(_to_accuracy(low + _STRIP / 2 * (high - low))))
        labels.append("fail")
    ax.set_ylim(float(_to_accuracy(low)), float(_to_accuracy(high)))
    ax.set_yticks(ticks, labels)
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_minor_locator(NullLocator())


def _spaced(candidates: Iterable[Sequence[float]], ends: Any, scale: Callable[[Any], Any], gap: float) -> list[float]:
    """Return candidates within two ends that keep a distance, a fraction of the axis; finer ones only if there are few.

    Args:
        candidates: From coarse to fine.
        ends: Of the axis.
        scale: From values to places on the axis.
        gap: The distance.
    """
    start, end = (float(scale(each)) for each in ends)
    chosen: dict[float, float] = {}
    for ticks in candidates:
        if len(chosen) >= 4:
            break
        for tick in ticks:
            place = (float(scale(tick)) - start) / (end - start)
            if 0.02 <= place <= 1 and all(abs(place - other) >= gap for other in chosen.values()):
                chosen[tick] = place
    return list(chosen)


def _from_accuracy(accuracy: ArrayLike) -> NDArray[np.float64]:
    return -np.log10(np.clip(100 - np.asarray(accuracy, dtype=float), 0.01, None))


def _to_accuracy(value: ArrayLike) -> NDArray[np.float64]:
    return 100 - 10 ** -np.asarray(value)


def _draw(ax: Axes, line: Sequence[Point], half: float, colour: str, marker: str, recipe: str) -> None:
    looks = _LOOKS.get(recipe, _LOOKS["baselines"])
    alive = sorted((p for p in line if not _has_collapsed(p, half)), key=lambda point: point.compression)
    for point in (point for point in line if _has_collapsed(point, half)):
        ax.plot(
            max(_left(point), 1.1 * ax.get_xlim()[1]), _STRIP / 2, color=colour, marker=marker, linestyle="none",
            zorder=3, transform=ax.get_xaxis_transform(), **_face(colour, looks),
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
    "baselines": {"filled": True, "edge": None, "size": 5, "zorder": 3, "label": ""},  # known by their markers
}


def _face(colour: str, looks: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "markersize": looks["size"],
        "markerfacecolor": colour if looks["filled"] else "white",
        "markeredgecolor": looks["edge"] or colour,
        "markeredgewidth": 0.9,
    }


def _legend(figure: Figure, methods: Sequence[str], recipes: Sequence[Mapping[str, Any]], columns: int) -> None:
    """Explain markers by method, and their filling by recipe, below the panels."""
    handles = [
        Line2D([], [], color=look.colour, marker=look.marker, linestyle="none", label=look.label)
        for look in (METHODS[method] for method in methods)
    ]
    handles += [
        Line2D([], [], marker="o", linestyle="none", label=looks["label"], **_face("0.6", looks)) for looks in recipes
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, columnspacing=1.4, handletextpad=0.4)
