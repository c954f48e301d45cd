"""Results of the study as tables beside the paper's numbers, in Markdown and LaTeX: python -m analysis.tables."""

import re
import statistics
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, get_args

import tyro

from analysis.drawing.published import paper_numbers
from analysis.drawing.typeset import Table, latex, markdown
from analysis.runs.config import BASELINES, METHODS, PretrainedName, RecipeName, RunConfig, read_config
from analysis.runs.recipes import dense_of, make_config
from analysis.runs.store import RunResult, Store

__all__ = ["Tables", "main", "tabulate", "write_tables"]

_RESULTS = Path(__file__).parent / "results" / "study"
_TITLES = {
    "mnist": "MNIST",
    "fashion_mnist": "Fashion-MNIST",
    "cifar10": "CIFAR-10",
    "digits": "digits",
    "mlp": "MLP",
    "mlp_inputs": "MLP with noise on its inputs too",
    "lenet5": "LeNet-5",
    "tiny-imagenet": "Tiny ImageNet",
    "resnet18": "ResNet-18",
    "resnet50": "ResNet-50",
    "vit_s": "ViT, small",
    "vit_b16": "ViT-B/16",
    "lenet5_caffe": "LeNet-5-Caffe, with noise on the inputs of its first dense layer too",
}
_LEGEND = (
    "Parameters removed % / test accuracy %: mean ± standard deviation over seeds, whose number stands in brackets. "
    "Runs were on a CPU, with † on a GPU, with ‡ on both. The paper's are of 10 seeds. "
    "Accuracy against none: points of test accuracy % that pruning costs or gains, here within pairs of one seed. "
    "The paper's code never removes those inputs of a dense layer that flattened filters leave behind, so that its "
    "figures of LeNet-5 are of more than they say: as the paper counts, ours are beside them in a table of their own. "
    "The paper's recipe less the paper: how far from what was published that is, and accuracy against none."
)

# What rows do not name: settings that follow from the number of epochs, and those that are a seed's own.
_UNNAMED = ("kl_warmup_epochs", "prune_from", "prune_until", "widths")

_WITHOUT_DEFAULT = ("pruning", "budget", "widths")  # no recipe has a value of these

Result = RunResult
Point = tuple[float, float]  # parameters removed and test accuracy, in %


def tabulate(results: Iterable[Result]) -> list[Table]:
    """Return a table for each network and way of pruning: a row for each recipe and method, data sets side by side.

    Runs after training count at the level where their criterion stops; those of criteria that do not stop are left out.
    Where there are dense networks too, a second table says what pruning while training has done to their accuracy:
    where the data are not quite the paper's, its accuracies are comparable no other way. A third has what is
    removed as the paper's code counts it, and a fourth how far the paper's recipe is from the paper.
    """
    paper = paper_numbers()
    groups: dict[tuple[str, bool], list[Result]] = {}
    for result in results:
        after = result["config"].get("pruning") == "post-training"
        groups.setdefault((result["config"]["network"], after), []).append(result)
    networks = list(_TITLES)
    tables = []
    for network, after in sorted(groups, key=lambda group: (group[1], networks.index(group[0]))):
        group, title = groups[network, after], _TITLES[network]
        if not after:  # as the published tables are
            make = _of_second_table if network in get_args(PretrainedName) else _beside_published
            tables += make(title, group, paper.get(network, {}))
        else:
            stopped = [result for result in group if _point(result)]
            tables.append(_table(f"{title}, pruned after training", stopped, {}, _measured, _published))
    return [table for table in tables if table.rows]


def _of_second_table(title: str, group: Sequence[Result], paper: Mapping[str, Any]) -> list[Table]:
    """Return the accuracies of a network trained before, and for each data set what removal saves."""
    tables = [_table(title, group, paper, _measured, _published)]
    head = ["recipe", "method", "removed %", "counted where only masked %", "validation accuracy %", "FLOPs", "time"]
    for dataset in dict.fromkeys(result["config"]["dataset"] for result in group):
        own = [result for result in group if result["config"]["dataset"] == dataset]
        rows = [[*label, *_savings(results)] for label, results in _by_row(own)]
        tables.append(Table(f"{title}, {_TITLES[dataset]}: what is removed, and what it saves", head, rows))
    return tables


def _by_row(results: Sequence[Result]) -> list[tuple[list[str], list[Result]]]:
    """Return the recipe and method of each row, in order, with its results."""
    rows: dict[tuple[str, str, str], list[Result]] = {}
    for result in results:
        config = read_config(result["config"])
        rows.setdefault((config.recipe, config.method, _changes(config)), []).append(result)
    return [
        ([recipe, f"{method} ({changes})" if changes else method], rows[recipe, method, changes])
        for recipe, method, changes in sorted(rows, key=lambda row: _rank(*row))
    ]


def _savings(results: Sequence[Result]) -> list[str]:
    """Return the cells of some seeds: both counts, validation accuracy, times fewer operations and times faster."""
    counted = [100 * result["compression_reference"] for result in results if "compression_reference" in result]
    return [
        _mean_and_sd([100 * result["compression"] for result in results]),
        _mean_and_sd(counted) if counted else "",
        _mean_and_sd([100 * result["accuracy_validation"] for result in results]),
        f"1/{statistics.fmean(result['flops_dense'] / result['flops_pruned'] for result in results):.1f}",
        f"1/{statistics.fmean(result['latency_dense_ms'] / result['latency_pruned_ms'] for result in results):.1f}",
    ]


def _beside_published(title: str, group: Sequence[Result], paper: Mapping[str, Any]) -> list[Table]:
    differences = _against_dense(group)
    counted = [result for result in group if paper and "compression_reference" in result]
    known = [result for result in differences if _is_published(result, paper)]
    less = partial(_less_published, paper)
    return [
        _table(title, group, paper, _measured, _published),
        _table(f"{title}, accuracy against none", differences, paper, _changed, _published_change),
        _table(f"{title}, removed as the paper counts", counted, paper, _counted, _published_removed),
        _table(f"{title}, the paper's recipe less the paper", known, {}, less, _published),
    ]


def _table(
    title: str,
    results: Sequence[Result],
    paper: Mapping[str, Any],
    here: Callable[[Sequence[Result]], str],
    there: Callable[[Mapping[str, Any], str], str],
) -> Table:
    """Return one table.

    Args:
        title: Its title.
        results: Runs of one network.
        paper: The network's published numbers, by data set and method.
        here: Returns a cell of results of one row on one data set.
        there: Returns that beside it, where there are results, of a data set's published numbers and a method.
    """
    datasets = [name for name in _TITLES if any(result["config"]["dataset"] == name for result in results)]
    head = ["recipe", "method"]
    for name in datasets:
        head += [_TITLES[name], f"{_TITLES[name]}, paper"] if name in paper else [_TITLES[name]]
    rows = []
    for label, group in _by_row(results):
        line = list(label)
        for name in datasets:
            known = [result for result in group if result["config"]["dataset"] == name]
            line.append(here(known))
            if name in paper:
                line.append(there(paper[name], group[0]["config"]["method"]) if known else "")
        rows.append(line)
    return Table(title, head, rows)


def _rank(recipe: str, method: str, changes: str) -> tuple[Any, ...]:
    methods = (*METHODS, *BASELINES)
    place = methods.index(method) if method in methods else len(methods)
    return get_args(RecipeName).index(recipe), place, _by_number(method), _by_number(changes)


def _by_number(text: str) -> list[str | float]:
    """Return what sorts a text by the numbers in it, 45 in front of 280."""
    return [float(part) if i % 2 else part for i, part in enumerate(re.split(r"(\d+(?:\.\d+)?)", text))]


def _changes(config: RunConfig) -> str:
    """Return the settings in which a run differs from its recipe."""
    names = (config.dataset, config.network, config.method, config.recipe)
    settings = config.all_settings
    given = {name: settings[name] for name in _WITHOUT_DEFAULT if name in settings}
    default = make_config(*names, config.seed, **given).all_settings
    changed = [name for name in settings if name == "budget" or settings[name] != default[name]]
    return ", ".join(f"{name} {_short(settings[name])}" for name in changed if name not in _UNNAMED)


def _short(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _measured(results: Sequence[Result]) -> str:
    points = [point for result in results if (point := _point(result))]
    if not points:
        return ""
    on_gpu = [result["device"].startswith("cuda") for result in results]
    mark = "†" if all(on_gpu) else "‡" if any(on_gpu) else ""
    removed, accuracy = (_mean_and_sd([point[i] for point in points]) for i in (0, 1))
    return f"{removed} / {accuracy} ({len(points)}){mark}"


def _point(result: Result) -> Point | None:
    """Return what a run stands for in a table."""
    curve = result.get("curve")
    if curve is None:
        return 100 * result["compression"], 100 * result["accuracy_test"]
    if result["stop_level"] not in curve["level"]:
        return None
    i = curve["level"].index(result["stop_level"])
    return 100 * curve["compression"][i], 100 * curve["accuracy_test"][i]


def _mean_and_sd(values: Sequence[float], sign: str = "") -> str:
    mean = f"{statistics.fmean(values):{sign}.2f}"
    return f"{mean} ± {statistics.stdev(values):.2f}" if len(values) > 1 else mean


def _published(numbers: Mapping[str, Any], method: str) -> str:
    if method not in numbers:
        return ""
    removed, removed_sd, accuracy, accuracy_sd = numbers[method]
    pairs = ((removed, removed_sd), (accuracy, accuracy_sd))
    return " / ".join(f"{mean:.2f}" if sd is None else f"{mean:.2f} ± {sd:.2f}" for mean, sd in pairs)


def _against_dense(results: Sequence[Result]) -> list[Result]:
    """Return results of the paper's recipe and ours that have a dense network of their seed, with the difference."""
    dense = {read_config(result["config"]): result for result in results if result["config"]["method"] == "none"}
    found = []
    for result in results:
        config = read_config(result["config"])
        if config.recipe != "baselines" and config.method != "none" and (other := dense.get(dense_of(config))):
            changed: Result = {**result, "change": 100 * (result["accuracy_test"] - other["accuracy_test"])}
            found.append(changed)
    return found


def _changed(results: Sequence[Result]) -> str:
    return f"{_mean_and_sd([result['change'] for result in results], '+')} ({len(results)})" if results else ""


def _published_change(numbers: Mapping[str, Any], method: str) -> str:
    return f"{numbers[method][2] - numbers['none'][2]:+.2f}" if method in numbers else ""


def _counted(results: Sequence[Result]) -> str:
    return f"{_mean_and_sd([100 * r['compression_reference'] for r in results])} ({len(results)})" if results else ""


def _published_removed(numbers: Mapping[str, Any], method: str) -> str:
    return _published(numbers, method).partition(" / ")[0]


def _is_published(result: Result, paper: Mapping[str, Any]) -> bool:
    config = result["config"]
    known = config["recipe"] == "paper" and config["method"] in paper.get(config["dataset"], {})
    return known and "compression_reference" in result


def _less_published(paper: Mapping[str, Any], results: Sequence[Result]) -> str:
    """Return by how much more is removed and gained than what a network's published numbers say."""
    if not results:
        return ""
    config = results[0]["config"]
    numbers = paper[config["dataset"]]
    removed = (
        statistics.fmean(100 * result["compression_reference"] for result in results) - numbers[config["method"]][0]
    )
    change = statistics.fmean(result["change"] for result in results)
    change -= numbers[config["method"]][2] - numbers["none"][2]
    return f"{removed:+.2f} / {change:+.2f} ({len(results)})"


def write_tables(results: Sequence[Result], folder: Path, name: str) -> str:
    """Write the tables of some results as ``name.md`` and ``name.tex``, and return the former."""
    tables = tabulate(results)
    folder.mkdir(parents=True, exist_ok=True)
    about = _provenance(results)
    text = f"{markdown(tables)}\n\n{_LEGEND}\n\n{about}\n"
    (folder / f"{name}.md").write_text(text, encoding="utf-8")
    comments = "\n".join(f"% {line}" for line in (_LEGEND, *about.splitlines()))
    (folder / f"{name}.tex").write_text(f"{latex(tables)}\n\n{_latex_comment(comments)}\n", encoding="utf-8")
    return text


def _latex_comment(text: str) -> str:
    return text.replace("±", "+-").replace("†", "dagger").replace("‡", "double dagger")


def _provenance(results: Sequence[Result]) -> str:
    """Return on what machines, with what versions, when and by which commands the results were made."""
    if not results:
        return "No results yet."
    dates = sorted(result["date"][:10] for result in results)
    lines = [f"{len(results)} runs, {dates[0]} to {dates[-1]}."]
    for what, values in (
        ("Machines", (result["device"] for result in results)),
        ("Versions", (", ".join(f"{k} {v}" for k, v in result["versions"].items()) for result in results)),
    ):
        lines.append(f"{what}: {'; '.join(dict.fromkeys(values))}.")
    commands = sorted({result["command"] for result in results})
    return "\n\n".join([*lines, "Commands:", "\n".join(f"- `{command}`" for command in commands)])


@dataclass(frozen=True)
class Tables:
    """Render every result there is, of whatever grid."""

    results: Path = _RESULTS
    """Folder of runs/ID.json and of the tables."""


def main(tables: Tables) -> None:
    """Write and print the tables of all results."""
    print(write_tables(Store(tables.results / "runs").read_all(), tables.results, "all"))


if __name__ == "__main__":
    try:
        main(tyro.cli(Tables))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
