"""What the pictures share: colours, axes, names, checks of what is drawn."""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from pyro.distributions import Empirical
from torch import Tensor
from torch.distributions import Distribution

from pyro_bmrs.checks import described
from pyro_bmrs.randomness import local_seed
from pyro_bmrs.svi.free_form import FreeFormEvidence

__all__ = [
    "BY_ODDS",
    "KEPT",
    "LOG_THETA",
    "NEUTRAL",
    "REMOVED",
    "axes_of",
    "by_site",
    "free_form_by_site",
    "layer_name",
    "legend",
    "log_quantiles",
    "on_cpu",
]

# Okabe and Ito's colours, which colour-blind readers can distinguish.
KEPT, REMOVED, BY_ODDS, NEUTRAL = "#0072B2", "#D55E00", "#E69F00", "#555555"
LOG_THETA = r"$\log\,\theta$ (nats)"


def axes_of(ax: Axes | None, figsize: tuple[float, float] = (7, 4.5)) -> Axes:
    """Return ``ax``, or new axes of this size in inches."""
    if not (ax is None or isinstance(ax, Axes)):
        raise TypeError(f"ax must be axes of Matplotlib, as plt.subplots() returns, but got {described(ax)}")
    return plt.subplots(figsize=figsize, layout="constrained")[1] if ax is None else ax


def by_site(
    name: str, values: Any, like: Mapping[str, Tensor] | None = None, dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    """Return ``values``, which must be a real tensor for each site, of the sites and shapes of ``like``, to draw."""
    if not isinstance(values, Mapping):
        source = "; evidence_changes(guide) returns such" if name == "delta_f" else ""
        hint = f"; pass its .{name}" if hasattr(values, name) else source
        raise TypeError(f"{name} must map sites to tensors, but got {described(values)}{hint}")
    if not values or (like is not None and values.keys() != like.keys()):
        wanted = "at least one site" if like is None else f"the sites {list(like)}"
        raise ValueError(f"{name} must have {wanted}, but names {list(values)}")
    for site, each in values.items():
        if not isinstance(each, Tensor) or each.dim() != 1 or each.is_complex() or dtype not in (None, each.dtype):
            kind = "bool tensor" if dtype is torch.bool else "tensor"
            raise TypeError(f"{name} of site {site!r} must be a {kind} of one dimension, but got {described(each)}")
        if like is not None and each.shape != like[site].shape:
            raise ValueError(
                f"{name} of site {site!r} must be of shape {tuple(like[site].shape)}, one per structure of the "
                f"original network, but is of shape {tuple(each.shape)}"
            )
    return {site: each.detach().cpu() for site, each in values.items()}


def free_form_by_site(free_form: Any, like: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return free-form evidence and its standard errors by site, which must be those of ``like``, to draw."""
    if not isinstance(free_form, FreeFormEvidence):
        raise TypeError(f"free_form must be what free_form_evidence returned, but got {described(free_form)}")
    named = {"delta_f": free_form.delta_f, "standard_error": free_form.standard_error}
    delta_f, errors = (by_site(f"{name} of free_form", values, like) for name, values in named.items())
    return delta_f, errors


def layer_name(site: str) -> str:
    """Return the name of a site's layer, to be read."""
    return site.removesuffix(".theta").removesuffix("_noise")


def legend(ax: Axes, colours: Mapping[str, str], line: str | None = None) -> None:
    """Name colours above the axes."""
    for name, colour in colours.items():
        ax.scatter([], [], color=colour, s=16, label=name)
    if line is not None:
        ax.plot([], [], color="black", linestyle="--", linewidth=1, label=line)
    columns = 4 if len(colours) + (line is not None) <= 4 else 3
    ax.legend(
        frameon=False,
        loc="lower left",
        bbox_to_anchor=(0, 1),
        ncols=columns,
        borderaxespad=0.2,
        fontsize=8,
        columnspacing=1,
    )


def on_cpu(distribution: Any) -> Distribution:
    """Return a distribution with its parameters on the CPU."""
    if isinstance(distribution, Empirical):
        return Empirical(distribution.enumerate_support().cpu(), distribution.log_weights.cpu())
    return type(distribution)(**{name: getattr(distribution, name).cpu() for name in distribution.arg_constraints})


def log_quantiles(posterior: Any, probabilities: Sequence[float]) -> list[Tensor]:
    """Return quantiles of log(theta): exact where the family has them, of 4,000 draws elsewhere."""
    if hasattr(posterior, "log_icdf"):
        return [posterior.log_icdf(torch.full_like(posterior.mean, p)).cpu() for p in probabilities]
    with local_seed(0):
        theta = posterior.sample((4000,)).cpu()
    if bool((theta < 0).any()):
        raise ValueError(
            f"noise of a {type(posterior).__name__} posterior may be negative and has no logarithm to draw"
        )
    draws = torch.log(theta)
    return [torch.quantile(draws, p, dim=0) for p in probabilities]
