"""The study's figures, from the results of its runs: python -m analysis.figures [--results FOLDER]."""

import json
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl
import numpy as np
import tyro
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from analysis.drawing.figure_style import METHODS, figure_style, is_left, panel_grid, panel_title, save_figure
from analysis.drawing.tradeoff import of_summary, panels, seed_groups, summarise, summary, tradeoff
from analysis.runs.config import METHODS as STUDIED
from analysis.runs.recipes import make_config
from analysis.runs.store import RunResult, read_results

__all__ = [
    "Figures",
    "draw",
    "main",
    "of_current_prior",
    "post_training",
    "precision_sweep",
    "rank_heatmaps",
]

Results = Sequence[RunResult]
_RESULTS = Path(__file__).parent / "results" / "study"
_SWEEP = "#4D4D4D"
_BITS = re.compile(r"BMRS_U-(\d+)")


@dataclass(frozen=True)
class Figures:
    """Draw every figure that the study's results suffice for, as PDF, SVG and PNG."""

    results: Path = _RESULTS / "runs"
    """Folder of the runs' JSON files; those in folders below count too."""
    output: Path = _RESULTS / "figures"


def main(config: Figures) -> list[Path]:
    """Draw what there are results for and return the paths."""
    results = read_results(config.results)
    if not results:
        raise FileNotFoundError(f"there are no results of runs in {config.results}: run analysis.study first")
    paths = draw(results, config.output)
    print("\n".join(map(str, paths)))
    return paths


def draw(results: Results, folder: Path) -> list[Path]:
    """Draw every figure that there are results for into ``folder`` and return the paths.

    The trade-off has all recipes; the other figures are drawn for each recipe, which their files' names end with.
    """
    mpl.use("Agg")
    chosen: dict[str, tuple[Callable[[Results], Figure], Results]] = {}
    continuous: Results = [each for each in results if each["config"].get("pruning", "continuous") == "continuous"]
    continuous = of_current_prior(continuous)
    chosen["tradeoff"] = tradeoff, [result for result in continuous if result["config"]["method"] in METHODS]
    chosen["summary"] = summary, of_summary(continuous)
    for recipe in sorted({result["config"].get("recipe", "") for result in results}):
        own = [result for result in results if result["config"].get("recipe", "") == recipe]
        known = [result for result in own if result["config"]["method"] in METHODS]  # not BMRS_U of any p1
        chosen[f"post_training_{recipe}"] = post_training, [result for result in known if "curve" in result]
        # Those of a method that other runs do not have say the rest of them again.
        with_correlations = [each for each in known if "rank_correlation" in each]
        correlated = [each for each in with_correlations if set(each["rank_correlation"]["methods"]) <= set(STUDIED)]
        chosen[f"rank_correlation_{recipe}"] = rank_heatmaps, correlated
        chosen[f"precision_{recipe}"] = precision_sweep, _swept([result for result in own if result in continuous])
    paths = []
    with figure_style():
        for name, (make, of_kind) in chosen.items():
            if of_kind:
                paths += save_figure(make(of_kind), folder, name)
    return paths


def of_current_prior(results: Results) -> Results:
    """Return the results without those of our recipe with another prior than it has now, where both have been run."""

    def kind(result: RunResult) -> tuple[str, str, float]:
        config = result["config"]
        return config["dataset"], config["network"], config.get("log_high", 0.0)

    own = [result for result in results if result["config"].get("recipe") == "ours" and _has_noise(result)]
    wanted = {}
    for dataset, network, _ in map(kind, own):
        log_high = make_config(dataset, network, "BMRS_N", "ours", 0).all_settings["log_high"]
        if any(kind(result) == (dataset, network, log_high) for result in own):
            wanted[dataset, network] = log_high
    return [
        result
        for result in results
        if result not in own or kind(result)[2] == wanted.get(kind(result)[:2], kind(result)[2])
    ]


def _has_noise(result: RunResult) -> bool:
    return result["config"]["method"] != "none"


def _swept(results: Results) -> Results:
    """Return the runs of BMRS_U on those networks and data sets for which it has run with three p1 or more."""
    cells = panels([result for result in results if _BITS.fullmatch(result["config"]["method"])]).values()
    return [result for cell in cells if len({each["config"]["method"] for each in cell}) >= 3 for result in cell]


def post_training(results: Results) -> Figure:
    """Draw accuracy against compression of networks pruned after training (the paper's figures 2 and 5).

    A line is the mean over seeds at each level, its band a standard deviation; a marker the mean of the points where
    the criterion stops, the small ones around it those of single seeds. Below, the same where criteria stop, without
    those that stop at less than half of the best accuracy.

    Args:
        results: Those with a ``curve`` (columns ``level``, ``compression`` and ``accuracy_test``) and a
            ``stop_level``, at or near which the curve has a point, or None where the criterion does not stop.
    """
    cells = panels(results)
    figure, grid = panel_grid(len(cells), height=3.6, rows_each=2)
    methods = set()
    for (whole, knee), (cell, members) in zip(grid, cells.items(), strict=True):
        for group in seed_groups(members):
            methods.add(group[0]["config"]["method"])
            for ax in (whole, knee):
                _curve(ax, group)
        whole.set_title(panel_title(*cell))
        whole.set_xlim(0, 101)
        whole.set_ylim(0, 102 if whole.get_ylim()[1] > 80 else None)
        _close_in(knee, members)
        knee.set_xlabel("parameters removed (%)")
        if is_left(whole):
            for ax in (whole, knee):
                ax.set_ylabel("test accuracy (%)")
    handles = [
        Line2D([], [], color=look.colour, marker=look.marker, label=look.label)
        for method, look in METHODS.items()
        if method in methods
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=7 if len(grid) > 1 else 4, columnspacing=1.4)
    return figure


def _curve(ax: Axes, group: Results) -> None:
    look, columns = METHODS[group[0]["config"]["method"]], ("compression", "accuracy_test")
    curves = [{key: np.array(values) for key, values in result["curve"].items()} for result in group]
    shared = sorted(set.intersection(*(set(curve["level"].tolist()) for curve in curves)))
    at = [np.isin(curve["level"], shared) for curve in curves]
    removed, accuracy = (
        100 * np.array([curve[key][chosen] for curve, chosen in zip(curves, at, strict=True)]) for key in columns
    )
    mean, sd = accuracy.mean(0), accuracy.std(0, ddof=1) if len(group) > 1 else 0.0
    ax.plot(removed.mean(0), mean, color=look.colour)
    band = np.clip([mean - sd, mean + sd], 0, 100)
    ax.fill_between(removed.mean(0), *band, color=look.colour, alpha=0.18, linewidth=0)
    stops = _stops(group)
    if len(stops):
        ax.plot(*stops.T, linestyle="none", marker=look.marker, markersize=2.5, color=look.colour, alpha=0.6, zorder=4)
        ax.plot(
            *stops.mean(0), marker=look.marker, markersize=7, color=look.colour, markeredgecolor="black",
            markeredgewidth=0.8, zorder=5,
        )  # fmt: skip


def _stops(results: Results) -> NDArray[np.float64]:
    """Return where runs stop, ``(n, 2)``: % removed and accuracy, of those whose criterion does."""
    found = []
    for result in results:
        if level := result["stop_level"]:  # neither None nor 0: the curve begins with the first structure that goes
            curve = result["curve"]
            nearest = np.abs(np.array(curve["level"]) - level).argmin()
            found.append([100 * curve["compression"][nearest], 100 * curve["accuracy_test"][nearest]])
    return np.array(found).reshape(-1, 2)


def _close_in(ax: Axes, results: Results) -> None:
    """Set limits around the points where criteria stop that work; if there are none, the curves' own remain."""
    stops, best = _stops(results), max(100 * max(result["curve"]["accuracy_test"]) for result in results)
    stops = stops[stops[:, 1] >= best / 2]
    if len(stops):
        (left, low), (right, high) = stops.min(0), stops.max(0)
        ax.set_xlim(max(left - 4, 0), min(right + 4, 101))
        room = max(0.4 * (high - low), 0.3)
        ax.set_ylim(low - room, min(high + room, 101))


def rank_heatmaps(results: Results) -> Figure:
    """Draw Spearman's correlations between the criteria's orderings, mean over fits (the paper's figures 3, 6 and 7).

    Args:
        results: Those with a ``rank_correlation``: ``methods`` and the matrix ``spearman`` between them. Runs of one
            fit, which differ only in their criterion, say the same and count once.

    Raises:
        ValueError: If two matrices are of different methods.
    """
    methods = results[0]["rank_correlation"]["methods"]
    cells = panels(results)
    figure, grid = panel_grid(len(cells), height=2.0 if len(cells) > 1 else 2.6)
    columns = -(-len(cells) // sum(is_left(ax) for (ax,) in grid))
    counts = set()
    for i, ((ax,), (cell, members)) in enumerate(zip(grid, cells.items(), strict=True)):
        if any(result["rank_correlation"]["methods"] != methods for result in members):
            raise ValueError(f"the rank correlations of {panel_title(*cell)} are not all between {', '.join(methods)}")
        fits = {_fit_of(result): result["rank_correlation"]["spearman"] for result in members}
        counts.add(len(fits))
        image = _heatmap(ax, np.mean(list(fits.values()), axis=0))
        labels = [METHODS[method].label for method in methods]
        ax.set_xticks(range(len(labels)), labels if i + columns >= len(cells) else [], rotation=90)
        ax.set_yticks(range(len(labels)), labels if is_left(ax) else [])
        ax.set_title(panel_title(*cell))
    label = r"Spearman's $\rho$"
    if max(counts) > 1:
        label += f",\nmean of {' or '.join(map(str, sorted(counts)))} fits"
    figure.colorbar(image, ax=[ax for (ax,) in grid], label=label, fraction=0.03, pad=0.01, aspect=35)
    return figure


def _fit_of(result: RunResult) -> str:
    criterion = ("method", "prior_log_odds", "p2")
    return json.dumps(
        {name: value for name, value in result["config"].items() if name not in criterion}, sort_keys=True
    )


def _heatmap(ax: Axes, matrix: NDArray[np.float64]) -> AxesImage:
    image = ax.imshow(matrix, vmin=-1, vmax=1, cmap="PuOr_r", aspect="auto")
    ax.grid(visible=False)
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    for (row, column), value in np.ndenumerate(matrix):
        text = f"{value:.2f}".replace("0.", ".", 1).replace("1.00", "1")
        ink = "white" if abs(value) > 0.6 else "black"
        ax.text(column, row, text, ha="center", va="center", fontsize=6, color=ink)
    return image


def precision_sweep(results: Results) -> Figure:
    """Draw compression and accuracy against p1 of BMRS_U, with standard deviations over seeds (the paper's figure 4).

    Args:
        results: Those whose method is ``"BMRS_U-p1"``; the paper's two values of p1 have their usual markers.
    """
    cells = panels(results)
    figure, grid = panel_grid(len(cells), height=3.0, rows_each=2)
    for axes, (cell, members) in zip(grid, cells.items(), strict=True):
        found = sorted(((_bits(group), summarise(group)) for group in seed_groups(members)), key=lambda each: each[0])
        bits = [p1 for p1, _ in found]
        _against_bits(axes[0], bits, [(point.accuracy, point.accuracy_sd) for _, point in found])
        _against_bits(axes[1], bits, [(point.compression, point.compression_sd) for _, point in found])
        axes[0].set_title(panel_title(*cell), fontsize=8)
        axes[0].tick_params(labelbottom=False)
        axes[1].set_xlabel("$p_1$ (bits)")
        if is_left(axes[0]):
            axes[0].set_ylabel("test accuracy (%)")
            axes[1].set_ylabel("parameters removed (%)")
    figure.align_ylabels()
    used = {result["config"]["method"] for result in results}
    handles = [
        Line2D([], [], color=look.colour, marker=look.marker, linestyle="none", label=look.label)
        for method, look in METHODS.items()
        if method in used
    ]
    handles.append(Line2D([], [], color=_SWEEP, marker=".", label=r"BMRS$_\mathcal{U}$ of other $p_1$"))
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), columnspacing=1.2, handletextpad=0.5)
    return figure


def _against_bits(ax: Axes, bits: Sequence[int], values: Sequence[tuple[float, float]]) -> None:
    means, sds = zip(*values, strict=True)
    ax.errorbar(bits, means, yerr=sds, color=_SWEEP, marker=".", markersize=4, elinewidth=0.7, zorder=3)
    for p1, mean in zip(bits, means, strict=True):
        if look := METHODS.get(f"BMRS_U-{p1}"):
            ax.plot(p1, mean, marker=look.marker, color=look.colour, markersize=5.5, zorder=4)
    ax.margins(y=0.12)
    ax.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
    ax.set_xlim(max(bits) + 1, min(bits) - 1)
    ax.set_xticks([p1 for p1 in (20, 15, 10, 5, 1) if min(bits) <= p1 <= max(bits)])


def _bits(group: Results) -> int:
    match = _BITS.fullmatch(group[0]["config"]["method"])
    assert match is not None
    return int(match[1])


if __name__ == "__main__":
    try:
        main(tyro.cli(Figures))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
