"""Pictures by layer: its posteriors, its evidence beside that of the others, and how both have moved in training."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import SymLogNorm
from pyro.distributions import Empirical
from torch import Tensor
from torch.distributions import Distribution

from pyro_bmrs.checks import described
from pyro_bmrs.inspection.drawing import (
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
from pyro_bmrs.inspection.evidence import evidence_changes
from pyro_bmrs.inspection.trajectories import Trajectories
from pyro_bmrs.structures.any_guide import known_posterior
from pyro_bmrs.svi.free_form import FreeFormEvidence

__all__ = ["plot_network", "plot_ridge", "plot_trajectories"]

_POINTS = 400  # of each density
_RIDGES = 60  # that fit on one axes
_TAIL = 1e-3  # mass that is left out at either end


@torch.no_grad()
def plot_ridge(guide: Any, site: str | None = None, ax: Axes | None = None) -> Axes:
    r"""Draw the posterior density of :math:`\log\theta` of every structure of a layer, sorted by its evidence.

    What the evidence would remove first is at the bottom. Of layers with more than 60 structures every second, third,
    ... of the sorted ones is drawn. Heights are relative to each density's own maximum.

    Args:
        guide: The fitted guide, as for ``evidence_changes``, of noise that is positive.
        site: The layer's site; by default the first one.
        ax: Axes to draw on; new ones by default.

    Raises:
        TypeError: If ``guide`` has no posterior by site, or ``ax`` is no axes.
        ValueError: If there is no such site, or noise may be negative.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), bmrs.MultiplicativeNoise(8), nn.Linear(8, 3))
        >>> model = bmrs.NoisyNetwork(net)
        >>> guide = bmrs.TruncatedLogNormalGuide(model)
        >>> ax = bmrs.plot_ridge(guide, "2.theta")
        >>> ax.get_xlabel() != ""
        True
    """
    guide = known_posterior(guide)
    site = _known_site(site, guide.sizes)
    ax = axes_of(ax, figsize=(7, 7))
    posterior = on_cpu(guide.posterior()[site])
    layer = guide.noise[site]
    kept = layer.keep.cpu()
    delta_f = evidence_changes(guide)[site][layer.index.cpu()].cpu()
    order = delta_f.argsort(descending=True)
    order = order[:: -(-len(order) // _RIDGES)]
    low, high = log_quantiles(posterior, (_TAIL, 1 - _TAIL))
    grid = torch.linspace(float(low.min()), float(high.max()), _POINTS, dtype=torch.float64)
    density = _log_density(posterior, grid)
    for row, i in enumerate(order.tolist()):
        height = density[:, i] / density[:, i].max().clamp_min(1e-300)
        colour = KEPT if bool(kept[i]) else REMOVED
        ax.fill_between(grid, row, row + 1.8 * height, color=colour, alpha=0.35, linewidth=0, zorder=len(order) - row)
        ax.plot(grid, row + 1.8 * height, color=colour, linewidth=0.7, zorder=len(order) - row)
    ticks = np.unique(np.linspace(0, len(order) - 1, min(len(order), 12)).round().astype(int))
    ax.set_yticks(ticks, [f"{float(delta_f[order[row]]):.3g}" for row in ticks])
    ax.set_ylabel(r"evidence change $\Delta F$ (nats); first to go at the bottom")
    ax.set_xlabel(LOG_THETA)
    shown = "" if len(order) == len(delta_f) else f", {len(order)} of {len(delta_f)} shown"
    ax.set_title(f"{layer_name(site)}: {int(kept.sum())} of {len(kept)} kept{shown}", loc="right", fontsize=10)
    legend(ax, {"kept": KEPT, "removed": REMOVED})
    return ax


def _log_density(posterior: Distribution, log_theta: Tensor) -> Tensor:
    """Return the density of log(theta) at each point, of shape ``(points, structures)``; 0 outside the support."""
    if isinstance(posterior, Empirical):
        return _smoothed(posterior.enumerate_support().double().log(), log_theta)
    mean: Any = posterior.mean
    theta = log_theta.exp().unsqueeze(-1).to(mean).expand(-1, *mean.shape)
    support: Any = posterior.support
    inside = support.check(theta)
    inner = torch.where(inside, theta, mean)
    return torch.where(inside, (posterior.log_prob(inner).double() + inner.double().log()).exp(), 0.0)


def _smoothed(draws: Tensor, grid: Tensor) -> Tensor:
    """Return a kernel estimate of the density of draws, of shape ``(structures, draws)``: Gaussian, Scott's width."""
    widths = (draws.std(-1) * draws.shape[-1] ** -0.2).clamp_min(float(grid[1] - grid[0]))
    each = [
        torch.exp(-0.5 * ((grid.unsqueeze(-1) - row) / width) ** 2).mean(-1) / width
        for row, width in zip(draws, widths, strict=True)
    ]
    return torch.stack(each, -1)


def plot_network(
    delta_f: Mapping[str, Tensor],
    masks: Mapping[str, Tensor] | None = None,
    ax: Axes | None = None,
    free_form: FreeFormEvidence | None = None,
) -> Axes:
    r"""Draw a network as columns of cells: one column per layer, one cell per structure, coloured by :math:`\Delta F`.

    Structures of a layer are sorted, those that the evidence would remove first at the top; removed ones are crossed.
    Layers of different sizes have cells of different heights.

    Args:
        delta_f: For each site a tensor of shape ``(size,)``, as from ``evidence_changes`` or ``FitResult.scores``.
        masks: For each site a bool tensor of shape ``(size,)``, True = kept.
        ax: Axes to draw on; new ones by default.
        free_form: Free-form evidence of the same structures: the right half of each cell has its colour, and a dot
            where it is within two standard errors of zero.

    Raises:
        TypeError: If ``delta_f`` or ``masks`` does not map sites to tensors, ``free_form`` is something else, or ``ax``
            is no axes.
        ValueError: If ``masks`` or ``free_form`` is not for the same sites and sizes.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), bmrs.MultiplicativeNoise(8), nn.Linear(8, 3))
        >>> model = bmrs.NoisyNetwork(net)
        >>> guide = bmrs.TruncatedLogNormalGuide(model)
        >>> ax = bmrs.plot_network(bmrs.evidence_changes(guide), model.masks)
        >>> len(ax.collections) > 0
        True
    """
    values = by_site("delta_f", delta_f)
    kept = {site: torch.ones_like(each, dtype=torch.bool) for site, each in values.items()}
    if masks is not None:
        kept = by_site("masks", masks, values, torch.bool)
    others = None if free_form is None else free_form_by_site(free_form, values)
    ax = axes_of(ax, figsize=(max(4.0, 0.9 * len(values) + 2), 5))
    finite = torch.cat([each[each.isfinite()].double() for each in values.values()])
    limit = max(1.0, float(finite.abs().max())) if len(finite) else 1.0
    norm = SymLogNorm(linthresh=1.0, vmin=-limit, vmax=limit)
    for column, (site, each) in enumerate(values.items()):
        order = each.nan_to_num(-np.inf).argsort(descending=True)
        edges = np.linspace(0, 1, len(order) + 1)
        centres = (edges[:-1] + edges[1:]) / 2
        shown = [each] if others is None else [each, others[0][site]]
        image = ax.pcolormesh(
            np.linspace(column - 0.4, column + 0.4, len(shown) + 1),
            edges,
            np.ma.masked_invalid(torch.stack([part[order].double() for part in shown], 1).numpy()),
            cmap="RdBu_r",
            norm=norm,
            edgecolors="white" if len(order) < _RIDGES else "none",
            linewidth=0.5,
        )
        if others is not None:
            open_still = (others[0][site].abs() < 2 * others[1][site])[order].numpy()
            ax.scatter(np.full(open_still.sum(), column + 0.2), centres[open_still], marker=".", s=6, color="black")
        removed = ~kept[site][order].numpy()
        ax.scatter(np.full(removed.sum(), column), centres[removed], marker="x", s=9, color="black", linewidth=0.6)
        ax.text(column, -0.02, f"{int(kept[site].sum())} of {len(order)}", ha="center", va="bottom", fontsize=7)
    ax.set_ylim(1.01, -0.06)
    ax.set_yticks([])
    ax.set_xticks(range(len(values)), [layer_name(site) for site in values], rotation=45, ha="right")
    ax.set_ylabel("structures, the first to go at the top")
    ax.figure.colorbar(image, ax=ax, label=r"evidence change $\Delta F$ (nats)")
    return ax


def plot_trajectories(
    trajectories: Trajectories, site: str | None = None, quantity: str = "delta_f", ax: Axes | None = None
) -> Axes:
    """Draw how a quantity of each structure of a layer has moved over the epochs with noise, a line each.

    Args:
        trajectories: What a fit was given as a callback.
        site: The layer's site; by default the first one.
        quantity: ``"delta_f"``, drawn on a symmetric logarithmic axis, or the name of a parameter of the guide.
        ax: Axes to draw on; new ones by default.

    Raises:
        TypeError: If ``trajectories`` is something else, or ``ax`` no axes.
        ValueError: If nothing has been noted, or there is no such site or quantity.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), bmrs.MultiplicativeNoise(8), nn.Linear(8, 3))
        >>> model = bmrs.NoisyNetwork(net)
        >>> guide = bmrs.TruncatedLogNormalGuide(model)
        >>> seen = bmrs.Trajectories(guide)
        >>> few = {"epochs": 3, "fine_tune_epochs": 1, "criterion": None, "progress": False}
        >>> _ = bmrs.fit(model, guide, (torch.randn(64, 4), torch.arange(64) % 3), callbacks=[seen], **few)
        >>> len(bmrs.plot_trajectories(seen, quantity="loc").lines) >= 8
        True
    """
    if not isinstance(trajectories, Trajectories):
        raise TypeError(f"trajectories must be a Trajectories, but got {described(trajectories)}")
    if not trajectories.epochs:
        raise ValueError("trajectories have noted nothing: pass them to fit(..., callbacks=[trajectories])")
    noted = trajectories.of(quantity)
    site = _known_site(site, noted)
    ax = axes_of(ax)
    kept = trajectories.guide.noise[site].original_keep.cpu()
    for i, values in enumerate(noted[site].t()):
        ax.plot(trajectories.epochs, values, color=KEPT if bool(kept[i]) else REMOVED, linewidth=0.7, alpha=0.6)
    if quantity == "delta_f":
        ax.set_yscale("symlog", linthresh=1.0)
        ax.axhline(0, color=NEUTRAL, linewidth=1, linestyle=":")
    ax.set_xlabel("epoch")
    ax.set_ylabel(r"evidence change $\Delta F$ (nats)" if quantity == "delta_f" else quantity.replace("_", " "))
    ax.set_title(f"{layer_name(site)}: {int(kept.sum())} of {len(kept)} kept", loc="right", fontsize=10)
    legend(ax, {"kept": KEPT, "removed": REMOVED})
    return ax


def _known_site(site: str | None, sites: Mapping[str, Any]) -> str:
    if site is None:
        return next(iter(sites))
    if site not in sites:
        raise ValueError(f"site must be one of {list(sites)}, but got {site!r}")
    return site
