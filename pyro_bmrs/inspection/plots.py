"""Pictures of a posterior and of its reduction. Every function draws on axes that it is given, and returns them."""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from torch import Tensor
from torch.distributions import Distribution

from pyro_bmrs.bmr import evidence_change
from pyro_bmrs.bmr.free_form import FreeFormFactor
from pyro_bmrs.bmr.registry import check_distributions
from pyro_bmrs.checks import check_number, described
from pyro_bmrs.distributions import LogUniform, TruncatedLogNormal
from pyro_bmrs.inspection.drawing import (
    BY_ODDS,
    KEPT,
    LOG_THETA,
    NEUTRAL,
    REMOVED,
    axes_of,
    by_site,
    free_form_by_site,
    layer_name,
    legend,
    log_quantiles,
    on_cpu,
)
from pyro_bmrs.structures.any_guide import known_posterior
from pyro_bmrs.svi.free_form import FreeFormEvidence

__all__ = ["plot_evidence", "plot_evidence_snr", "plot_forest", "plot_forests", "plot_history", "plot_reduction"]

_BARE_MENTION = 1.1  # nats: "not worth more than a bare mention" (Kass and Raftery, 1995)
_DELTA_F = r"evidence change $\Delta F$ (nats, symmetric log)"


@torch.no_grad()
def plot_reduction(
    posterior: Distribution,
    prior: Distribution,
    reduced_prior: Distribution,
    ax: Axes | None = None,
    name: str = "",
    free_form: FreeFormFactor | None = None,
) -> Axes:
    r"""Draw posterior, prior and reduced prior of one structure, and what the evidence says (the paper's figure 1).

    Args:
        posterior: Posterior on theta, of ``batch_shape`` ``()``.
        prior: Its prior.
        reduced_prior: The prior that would remove the structure.
        ax: Axes to draw on; new ones by default.
        name: What to call the structure in the title.
        free_form: Its free-form factor, ``FreeFormEvidence.factors[site].structure(i)``, to draw beside the posterior.

    Raises:
        TypeError: If one of the three is no distribution, ``free_form`` is something else, or ``ax`` no axes.
        ValueError: If they are of more than one structure.
        NotImplementedError: If the prior is not on an interval of positive numbers, as a log-uniform one is.

    Example:
        >>> prior = bmrs.LogUniform(-20.0, 0.0)
        >>> q = bmrs.TruncatedLogNormal(torch.tensor(-1.0), torch.tensor(0.5))
        >>> ax = bmrs.plot_reduction(q, prior, bmrs.spike(prior))
        >>> len(ax.lines) > 2
        True
    """
    shape = check_distributions(posterior, prior, reduced_prior)
    if shape.numel() != 1:
        raise ValueError(
            f"plot_reduction draws one structure, but the distributions have batch_shape {tuple(shape)}: index them"
        )
    for argument, each in (("posterior", posterior), ("prior", prior), ("reduced_prior", reduced_prior)):
        if not isinstance(each, LogUniform | TruncatedLogNormal):
            raise NotImplementedError(
                f"plot_reduction draws densities of log(theta) between the bounds of LogUniform and TruncatedLogNormal "
                f"distributions, but {argument} is {described(each)}"
            )
    if not (free_form is None or isinstance(free_form, FreeFormFactor)):
        raise TypeError(f"free_form must be the factor of one structure, but got {described(free_form)}")
    ax = axes_of(ax)
    posterior, prior, reduced_prior = (on_cpu(each) for each in (posterior, prior, reduced_prior))
    delta_f = float(evidence_change(posterior, prior, reduced_prior))
    support: Any = prior.support
    low, high = (float(torch.log(bound)) for bound in (support.lower_bound, support.upper_bound))
    probabilities = torch.linspace(0, 1, 400, dtype=torch.float64)
    grid = torch.cat([torch.log(d.icdf(probabilities).double()) for d in (posterior, prior, reduced_prior)])
    grid = torch.cat([grid, torch.linspace(low, high, 2000, dtype=torch.float64)]).clamp(low, high).sort().values
    peak = 0.0
    for label, distribution, colour in (
        ("posterior", posterior, KEPT),
        ("prior", prior, NEUTRAL),
        ("reduced prior", reduced_prior, REMOVED),
    ):
        density = _log_theta_density(distribution, grid)
        if distribution is not reduced_prior:
            peak = max(peak, float(density.max()))
        style = "--" if distribution is prior else "-"  # a posterior that has collapsed lies on it
        ax.plot(grid, density, color=colour, label=label, linewidth=1.8, linestyle=style)
        ax.fill_between(grid, 1e-12, density, color=colour, alpha=0.15, linewidth=0)
    if free_form is not None:
        density = free_form.log_density(grid).exp().cpu()
        peak = max(peak, float(density.max()))
        ax.plot(grid, density, color=BY_ODDS, linewidth=1.8, label="free-form factor")
    floor = 1e-4
    if free_form is not None:  # down to where the factor levels off, near zero noise
        floor = max(min(floor, 0.1 * float(density[0])), 1e-12)
    ax.set_yscale("log")
    ax.set_ylim(floor, 10 * peak)
    ax.set_xlim(low - 0.02 * (high - low), high + 0.02 * (high - low))
    ax.set_xlabel(LOG_THETA)
    ax.set_ylabel(r"density of $\log\,\theta$ (1/nat, log scale)")
    verdict = "favours" if delta_f >= 0 else "is hardly against" if delta_f > -_BARE_MENTION else "is against"
    title = rf"$\Delta F$ = {delta_f:.3g} nats: the evidence {verdict} removal"
    if free_form is not None:
        own = f"{float(free_form.delta_f):.3g} ± {float(free_form.standard_error):.1g}"
        title += f"\nof the free form: {own} nats"
    ax.set_title(f"{name}\n{title}" if name else title, fontsize=10)
    ax.legend(frameon=False)
    return ax


def _log_theta_density(distribution: Distribution, log_theta: Tensor) -> Tensor:
    theta = torch.exp(log_theta)
    support: Any = distribution.support
    inside = (theta >= support.lower_bound.double() * (1 - 1e-6)) & (theta <= support.upper_bound.double() * (1 + 1e-6))
    clamped = theta.clamp(float(support.lower_bound), float(support.upper_bound)).to(support.lower_bound)
    density = torch.exp(distribution.log_prob(clamped).double() + torch.log(clamped.double()))
    return torch.where(inside, density, 0.0)


@torch.no_grad()
def plot_forest(guide: Any, mass: float = 0.94, ax: Axes | None = None) -> Axes:
    r"""Draw median and central interval of every kept structure's :math:`\log\theta`, by layer, sorted within it.

    Those that have been removed are one band for each layer, from the lowest to the highest of their intervals: they
    have collapsed, and differ in nothing.

    Args:
        guide: The fitted guide, as for ``evidence_changes``, of noise that is positive.
        mass: Posterior mass of the intervals.
        ax: Axes to draw on; new ones by default.

    Raises:
        TypeError: If ``guide`` has no posterior by site, or ``ax`` is no axes.
        ValueError: If ``mass`` is not inside (0, 1), or noise may be negative.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), bmrs.MultiplicativeNoise(8), nn.Linear(8, 3))
        >>> model = bmrs.NoisyNetwork(net)
        >>> guide = bmrs.TruncatedLogNormalGuide(model)
        >>> bmrs.plot_forest(guide).figure.savefig("forest.png")  # doctest: +SKIP
    """
    guide = known_posterior(guide)
    if not 0 < check_number("mass", mass) < 1:
        raise ValueError(f"mass must lie inside (0, 1), but got {mass}")
    ax = axes_of(ax, figsize=(7, 9))
    tail = (1 - mass) / 2
    keep = guide.split(guide.keep)
    kept = {site: mask.cpu() for site, mask in keep.items()}
    band = max(sum(int(mask.sum()) for mask in kept.values()) // (8 * len(kept)), 2)  # rows
    row, ticks = 0, {}
    for site, posterior in guide.posterior().items():
        low, median, high = log_quantiles(posterior, (tail, 0.5, 1 - tail))
        mask, first = kept[site], row
        order = median[mask].argsort(descending=True)
        rows = row + np.arange(len(order))
        ax.hlines(rows, low[mask][order], high[mask][order], colors=KEPT, linewidth=0.9, alpha=0.6)
        ax.scatter(median[mask][order], rows, color=KEPT, s=4, zorder=3)
        row += len(order) + 1
        if not bool(mask.all()):
            lowest, highest = float(low[~mask].min()), float(high[~mask].max())
            ax.fill_between([lowest, highest], row, row + band, color=REMOVED, alpha=0.3, linewidth=0)
            centre = (row + band / 2, (lowest + highest) / 2)
            ax.text(centre[1], centre[0], f"{int((~mask).sum())} removed", ha="center", va="center", fontsize=7)
            row += band + 1
        ticks[f"{layer_name(site)}\n{int(mask.sum())} of {len(mask)}"] = (first + row - 1) / 2
        row += 2
        ax.axhline(row - 1.5, color="0.85", linewidth=0.6)
    ax.set_yticks(list(ticks.values()), list(ticks))
    ax.set_ylim(row - 1, -2)
    ax.set_xlabel(LOG_THETA)
    ax.set_ylabel("layer, one row per structure that is kept")
    ax.set_title(f"posterior median and {100 * mass:.0f} % interval", loc="right", fontsize=10)
    legend(ax, {"kept": KEPT, "removed": REMOVED})
    return ax


def plot_forests(guides: Mapping[str, Any], mass: float = 0.94, axes: Sequence[Axes] | None = None) -> Sequence[Axes]:
    r"""Draw forests of several fits side by side, with one scale of :math:`\log\theta`.

    Args:
        guides: Fitted guides, by what to call them.
        mass: Posterior mass of the intervals, as for ``plot_forest``.
        axes: Axes to draw on, one each; new ones by default.

    Raises:
        TypeError: If ``guides`` is no mapping of guides, or ``axes`` are none.
        ValueError: If there are no guides, or not as many axes.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), bmrs.MultiplicativeNoise(8), nn.Linear(8, 3))
        >>> model = bmrs.NoisyNetwork(net)
        >>> guide = bmrs.TruncatedLogNormalGuide(model)
        >>> len(bmrs.plot_forests({"first": guide, "second": guide}))
        2
    """
    if not isinstance(guides, Mapping):
        raise TypeError(f"guides must map names to guides, but got {described(guides)}")
    if not guides or (axes is not None and len(axes) != len(guides)):
        raise ValueError(f"guides must be one or more, with one of axes each, but there are {len(guides)}")
    if axes is None:
        size = (4.5 * len(guides), 8)
        axes = list(plt.subplots(1, len(guides), figsize=size, sharex=True, squeeze=False, layout="constrained")[1][0])
    for ax, (name, guide) in zip(axes, guides.items(), strict=True):
        plot_forest(guide, mass, ax)
        ax.set_title(name, loc="right", fontsize=10)
    limits = [ax.get_xlim() for ax in axes]
    for ax in axes:
        ax.set_xlim(min(low for low, _ in limits), max(high for _, high in limits))
    return axes


def plot_evidence(
    delta_f: Mapping[str, Tensor],
    masks: Mapping[str, Tensor] | None = None,
    prior_log_odds: float = 0.0,
    ax: Axes | None = None,
    free_form: FreeFormEvidence | None = None,
) -> Axes:
    r"""Draw :math:`\Delta F` of every structure by layer, with the decision line.

    What is removed has one of two causes: the evidence favours it, :math:`\Delta F \ge 0`, or the prior odds outweigh
    the little that the evidence has against it. The colours tell them apart.

    Args:
        delta_f: Evidence change of each site's structures, in nats, as from ``evidence_changes``; NaN, where a
            structure has been cut out, is not drawn.
        masks: True = kept; by default what lies below the line.
        prior_log_odds: The criterion's; the line is at minus that.
        ax: Axes to draw on; new ones by default.
        free_form: Free-form evidence of the same structures, to draw to the right of each layer's, with its standard
            errors.

    Raises:
        TypeError: If an argument is of another type.
        ValueError: If sites or shapes differ.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), bmrs.MultiplicativeNoise(8), nn.Linear(8, 3))
        >>> model = bmrs.NoisyNetwork(net)
        >>> guide = bmrs.TruncatedLogNormalGuide(model)
        >>> ax = bmrs.plot_evidence(bmrs.evidence_changes(guide), model.masks)
        >>> ax.get_ylabel() != ""
        True
    """
    delta_f = by_site("delta_f", delta_f)
    check_number("prior_log_odds", prior_log_odds, positive=False)
    if masks is None:
        masks = {site: values + prior_log_odds < 0 for site, values in delta_f.items()}
    masks = by_site("masks", masks, like=delta_f, dtype=torch.bool)
    ax = axes_of(ax)
    generator = np.random.default_rng(0)
    for column, (site, values) in enumerate(delta_f.items()):
        kept = masks[site].cpu().numpy()
        jitter = generator.uniform(-0.3, 0.3, len(kept))
        colours = np.where(kept, KEPT, np.where(values.cpu().numpy() >= 0, REMOVED, BY_ODDS))
        ax.scatter(column + jitter, values.cpu(), c=colours, s=12, alpha=0.7, linewidth=0)
        if free_form is not None:
            own, errors = (each[site] for each in free_form_by_site(free_form, delta_f))
            known = own.isfinite()
            place = column + 0.42 + 0.16 * (jitter[known.numpy()] + 0.3) / 0.6
            ax.errorbar(
                place,
                own[known].numpy(),
                errors[known].numpy(),
                fmt=".",
                markersize=3,
                elinewidth=0.6,
                alpha=0.6,
                color=NEUTRAL,
            )
    ax.axhline(-prior_log_odds, color="black", linewidth=1, linestyle="--")
    ax.axhline(0, color="0.7", linewidth=0.8)
    ax.set_yscale("symlog", linthresh=1)
    _show_all(ax, delta_f)
    labels = [f"{layer_name(site)}\n{int(masks[site].sum())} of {len(values)} kept" for site, values in delta_f.items()]
    ax.set_xticks(range(len(delta_f)), labels)
    ax.set_xlabel("layer, one point per structure")
    ax.set_ylabel(_DELTA_F)
    causes = {"kept": KEPT, "removed by the evidence": REMOVED, "removed by the prior odds": BY_ODDS}
    if free_form is not None:
        causes["free form, with standard errors"] = NEUTRAL
    legend(ax, causes, line=f"decision line, {-prior_log_odds:.2g} nats")
    return ax


def plot_evidence_snr(
    delta_f: Mapping[str, Tensor],
    snr: Mapping[str, Tensor],
    prior_log_odds: float = 0.0,
    ax: Axes | None = None,
    masks: Mapping[str, Tensor] | None = None,
) -> Axes:
    r"""Draw :math:`\Delta F` against the signal-to-noise ratio, with both criteria's decision lines.

    Args:
        delta_f: Evidence change of each site's structures, in nats; NaN, where a structure has been cut out, is not
            drawn.
        snr: Their signal-to-noise ratios, as from ``posterior.snr``; after shrinking, in the numbering of the original
            network: ``guide.noise[site].in_original(snr, math.nan)``.
        prior_log_odds: The evidence criterion's; its line is at minus that.
        ax: Axes to draw on; new ones by default.
        masks: True = kept, drawn full; what is removed is drawn hollow. By default what lies below the line is kept.

    Raises:
        TypeError: If an argument is of another type.
        ValueError: If sites or shapes differ.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), bmrs.MultiplicativeNoise(8), nn.Linear(8, 3))
        >>> model = bmrs.NoisyNetwork(net)
        >>> guide = bmrs.TruncatedLogNormalGuide(model)
        >>> snr = {site: q.snr for site, q in guide.posterior().items()}
        >>> ax = bmrs.plot_evidence_snr(bmrs.evidence_changes(guide), snr)
        >>> ax.get_xlabel() != ""
        True
    """
    delta_f = by_site("delta_f", delta_f)
    snr = by_site("snr", snr, like=delta_f)
    check_number("prior_log_odds", prior_log_odds, positive=False)
    if masks is None:
        masks = {site: values + prior_log_odds < 0 for site, values in delta_f.items()}
    masks = by_site("masks", masks, like=delta_f, dtype=torch.bool)
    ax = axes_of(ax)
    palette = plt.get_cmap("viridis")(np.linspace(0, 0.85, len(delta_f)))
    markers = "osD^vP*X"
    for i, (site, values) in enumerate(delta_f.items()):
        for kept, face in ((True, palette[i]), (False, "none")):
            chosen = masks[site] == kept
            ax.scatter(
                snr[site][chosen], values[chosen], facecolor=face, edgecolor=palette[i],
                marker=markers[i % len(markers)], s=22, alpha=0.8, linewidth=0.7,
                label=layer_name(site) if kept else None,
            )  # fmt: skip
    ax.axhline(-prior_log_odds, color="black", linewidth=1, linestyle="--")
    ax.axvline(1.0, color="black", linewidth=1, linestyle=":")
    ax.set_xscale("log")
    ax.set_yscale("symlog", linthresh=1)
    _show_all(ax, delta_f)
    ax.set_xlabel("signal-to-noise ratio, mean / standard deviation (log scale)")
    ax.set_ylabel(_DELTA_F)
    ax.set_title("full: kept, hollow: removed; dashed: evidence decision line, dotted: SNR = 1", fontsize=9)
    ax.legend(frameon=False)
    return ax


def plot_history(history: Sequence[Mapping[str, Any]], ax: Axes | None = None, dense: float | None = None) -> Axes:
    """Draw compression and, where there is validation data, accuracy, RMSE or log likelihood over the epochs.

    Args:
        history: ``FitResult.history``.
        ax: Axes to draw on; new ones by default. Accuracy shares the scale of the compression, in percent; any other
            quantity gets an axis of its own on the right.
        dense: The same quantity of the dense network, to draw as a line; an accuracy as a fraction.

    Raises:
        TypeError: If it is no sequence of records.
        ValueError: If the history is empty.

    Example:
        >>> history = [{"epoch": i, "phase": "noisy", "compression": 0.1 * i} for i in range(4)]
        >>> len(bmrs.plot_history(history).lines) > 0
        True
    """
    if not isinstance(history, Sequence) or not all(isinstance(each, Mapping) for each in history):
        hint = "; pass its .history" if hasattr(history, "history") else ""
        raise TypeError(f"history must be the records of a fit, but got {described(history)}{hint}")
    if not history:
        raise ValueError("the history is empty: fit for at least one epoch")
    ax = axes_of(ax)
    epochs = [entry["epoch"] for entry in history]
    ax.plot(epochs, [100 * entry["compression"] for entry in history], color=REMOVED, label="parameters removed")
    ax.set_ylim(0, 103)
    ax.set_xlabel("epoch")
    ax.set_ylabel("%")
    for key, label in (
        ("accuracy_validation", "validation accuracy"),
        ("rmse_validation", "validation RMSE"),
        ("log_likelihood_validation", "validation log likelihood (nats per example)"),
    ):
        if key in history[-1]:
            percent = key == "accuracy_validation"
            own, factor = (ax, 100) if percent else (ax.twinx(), 1)
            own.plot(epochs, [factor * entry[key] for entry in history], color=KEPT, linestyle="--", label=label)
            if dense is not None:
                own.axhline(factor * dense, color=NEUTRAL, linewidth=1, linestyle=":", label="the dense network's")
            if not percent:
                own.set_ylabel(label, color=KEPT)
                own.legend(frameon=False, fontsize=8, loc="lower right")
            break
    ax.legend(frameon=False, fontsize=8, loc="center right")
    noisy = sum(entry["phase"] == "noisy" for entry in history)
    if noisy < len(history):
        ax.axvspan(noisy + 0.5, len(history) + 0.5, color="0.93", zorder=0)
        ax.annotate("noise off", (noisy + 0.7, 3), fontsize=8, color=NEUTRAL)
    return ax


def _show_all(ax: Axes, delta_f: Mapping[str, Tensor]) -> None:
    """Leave room above and below all values on a symmetric logarithmic axis."""
    finite = torch.cat([values[values.isfinite()] for values in delta_f.values()])
    if len(finite):
        ax.set_ylim(2 * min(-1.0, float(finite.min())), 2 * max(1.0, float(finite.max())))
