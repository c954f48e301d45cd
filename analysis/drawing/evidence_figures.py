"""Pictures of predicted against true evidence, and of how often decisions are those of the truth."""

import math
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np

import pyro_bmrs as bmrs
from pyro_bmrs.svi.free_form import FreeFormEvidence

__all__ = ["draw_evidence", "draw_pair"]

_SHOWN = ("BMRS_N", "BMRS_U(4, p2=None)", "free form", "free form, one pair", "free form, from training")
_LINE = -math.log(3)


def draw_evidence(cases: list[dict[str, Any]], output: Path) -> None:
    """Write predicted.png and decisions.png into the folder ``output``."""
    mpl.use("Agg")
    for name, figure in (("predicted", _predicted(cases)), ("decisions", _decisions(cases))):
        figure.savefig(output / f"{name}.png", dpi=130)
        plt.close(figure)


def draw_pair(guide: bmrs.FlatGuide, free_form: FreeFormEvidence, path: Path) -> None:
    """Draw posterior, free-form factor and prior of the clearest structure to go, and of one that stays.

    Args:
        guide: A fitted guide, none of whose structures has been removed.
        free_form: Its free-form evidence.
        path: File of the picture.
    """
    mpl.use("Agg")
    site, delta_f = next(iter(free_form.delta_f.items()))
    order = delta_f.argsort(descending=True).tolist()
    posterior: Any = guide.posterior()[site]
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.6), layout="constrained")
    for ax, index, verb in zip(axes, (order[0], order[3 * len(order) // 4]), ("goes", "stays"), strict=True):
        parameters = {name: getattr(posterior, name).detach()[index] for name in posterior.arg_constraints}
        own = bmrs.TruncatedLogNormal(**parameters)
        prior = bmrs.LogUniform(own.log_low, own.log_high)
        factor = free_form.factors[site].structure(index)
        name = f"structure {index} of {site.removesuffix('_noise.theta')} {verb}"
        bmrs.plot_reduction(own, prior, bmrs.spike(prior), ax, name, factor)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _predicted(cases: list[dict[str, Any]]) -> Any:
    """Draw predicted against true evidence: a row per case, a panel per prediction."""
    shown = [[name for name in _SHOWN if name in case["predictions"]] for case in cases]
    columns = max(map(len, shown))
    size = (3.2 * columns, 3.0 * len(cases))
    figure, axes = plt.subplots(len(cases), columns, figsize=size, squeeze=False, layout="constrained")
    for row, case, names in zip(axes, cases, shown, strict=True):
        truth = np.array(case["truth"])
        for ax in row[len(names) :]:
            ax.set_visible(False)
        for ax, name in zip(row, names, strict=False):
            ax.scatter(truth, case["predictions"][name]["values"], s=6, alpha=0.5, color="#0072B2")
            low = min(float(truth.min()), -10.0)
            ax.plot([low, 5], [low, 5], color="#555555", linewidth=0.8)
            for draw in (ax.axhline, ax.axvline):
                draw(_LINE, color="#D55E00", linewidth=0.8, linestyle="--")
            ax.set_xscale("symlog", linthresh=3)
            ax.set_yscale("symlog", linthresh=3)
            ax.set_title(name, fontsize=9)
            ax.tick_params(labelsize=7)
        row[0].set_ylabel(case["name"].split(";")[0], fontsize=8)
    figure.supxlabel(r"true $\Delta F$ (nats); dashed: $-\log 3$")
    figure.supylabel(r"predicted $\Delta F$ (nats)")
    return figure


def _decisions(cases: list[dict[str, Any]]) -> Any:
    """Draw the part of decisions that agree with the truth's, along the prior log-odds."""
    figure, axes = plt.subplots(1, len(cases), figsize=(3.6 * len(cases), 3.4), squeeze=False, layout="constrained")
    odds = np.linspace(0, 4, 41)
    for ax, case in zip(axes[0], cases, strict=True):
        truth = np.array(case["truth"])
        for name in _SHOWN:
            if name in case["predictions"]:
                values = np.array(case["predictions"][name]["values"])
                agrees = [((values + each >= 0) == (truth + each >= 0)).mean() for each in odds]
                ax.plot(odds, 100 * np.array(agrees), label=name)
        ax.axvline(math.log(3), color="#555555", linestyle=":", linewidth=1)
        ax.set_title(case["name"].split(";")[0], fontsize=9)
        ax.legend(frameon=False, fontsize=7)
    figure.supxlabel("prior log-odds of absence (nats); dotted: log 3")
    figure.supylabel("decisions that agree (%)")
    return figure
