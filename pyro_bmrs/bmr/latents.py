"""What a Pyro guide and model say of a latent site: its posterior and its prior, one distribution an element.

Nothing is asked of the guide but that it is one. Guide and model are traced: the guide's site is the posterior, the
model's the prior. Autoguides draw in unconstrained space, and their posterior is carried back from there.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions.torch_distribution import ExpandedDistribution, MaskedDistribution
from pyro.infer.autoguide import AutoContinuous
from pyro.poutine import Trace
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.distributions import (
    Distribution,
    Independent,
    LowRankMultivariateNormal,
    MultivariateNormal,
    Normal,
    TransformedDistribution,
    biject_to,
    constraints,
)

from pyro_bmrs.bmr.registry import POINT_MASS, is_point_mass
from pyro_bmrs.checks import described
from pyro_bmrs.distributions import LogitNormal
from pyro_bmrs.randomness import local_seed

__all__ = ["Latents", "check_no_point_mass", "posterior_and_prior", "read_latents", "to_elements"]

Program = Callable[..., Any]


@dataclass(frozen=True)
class Latents:
    """Posterior and prior of latent sites, by name.

    Attributes:
        posteriors: Posterior of each site, one batch element an element.
        priors: Prior of each site.
        event_dims: Number of event dimensions that the site has.
        correlated: The normal distribution of all sites' elements in unconstrained space, if the guide has one.
        positions: Where in it each site's elements are, of the site's unconstrained shape.
    """

    posteriors: Mapping[str, Distribution]
    priors: Mapping[str, Distribution]
    event_dims: Mapping[str, int]
    correlated: MultivariateNormal | None = None
    positions: Mapping[str, Tensor] = field(default_factory=dict)


@runtime_checkable
class StatedPosterior(Protocol):
    """A guide that states its posterior and prior, and needs no tracing; ``TruncatedLogNormalGuide`` is one."""

    def posterior(self) -> Mapping[str, Any]:
        """Return the posterior of each site."""

    def prior(self) -> Mapping[str, Any]:
        """Return the prior of each site."""


def posterior_and_prior(
    guide: Program, model: Program, site: str, *args: Any, **kwargs: Any
) -> tuple[Distribution, Distribution]:
    """Return the posterior and the prior of one latent site, one batch element an element of the site.

    They are what ``evidence_change`` and ``estimate_evidence_change`` take. Arguments and errors are those of
    ``reduce``.

    Example:
        >>> import pyro
        >>> model = lambda: pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        >>> guide = lambda: pyro.sample("w", dist.Normal(torch.ones(3), 0.1).to_event(1))
        >>> posterior_and_prior(guide, model, "w")
        (Normal(loc: torch.Size([3]), scale: torch.Size([3])), Normal(loc: torch.Size([3]), scale: torch.Size([3])))
    """
    found = read_latents(guide, model, [site], *args, **kwargs)
    check_no_point_mass(site, found.posteriors[site])
    return found.posteriors[site], found.priors[site]


def check_no_point_mass(site: str, posterior: Distribution) -> None:
    """Raise ``NotImplementedError`` if the posterior of a site has all its mass at one point."""
    if is_point_mass(posterior):
        raise NotImplementedError(f"the guide's distribution of site {site!r} {POINT_MASS}")


@torch.no_grad()
def read_latents(guide: Program, model: Program, names: Iterable[str], *args: Any, **kwargs: Any) -> Latents:
    """Return posterior and prior of the latent sites ``names``; see ``reduce`` for arguments and errors."""
    names = list(names)
    for name, program in (("guide", guide), ("model", model)):
        if not callable(program) or isinstance(program, type):
            raise TypeError(f"{name} must be a Pyro program, a function or module, but got {described(program)}")
    if isinstance(guide, StatedPosterior):
        posteriors, priors = guide.posterior(), guide.prior()
        _check_known(names, posteriors)
        return _latents(names, posteriors, priors)
    (guide_trace, model_trace), others = _twice(
        lambda: _trace(guide, model, args, kwargs), "guide and model", args, kwargs
    )
    _check_sites(names, guide_trace, model_trace)
    priors = {name: model_trace.nodes[name]["fn"] for name in names}
    _check_posteriors(names, guide, guide_trace, others[0])
    for name in names:
        _check_same("prior", name, model_trace, others[1])
    return _read(guide, guide_trace, priors, args, kwargs)


@torch.no_grad()
def read_guide(guide: Program, priors: Mapping[str, Any], *args: Any, **kwargs: Any) -> Latents:
    """Return the posterior of each site that has a prior, from the guide alone.

    Raises:
        TypeError: If it does not run on the arguments.
        ValueError: If it lacks a site, or has another shape for it.
        NotImplementedError: If the posterior of a site is nothing that can be written down.
    """
    first, second = _twice(lambda: poutine.trace(guide).get_trace(*args, **kwargs), "the guide", args, kwargs)
    for name, prior in priors.items():
        _check_in_guide(name, prior.shape(), first)
    _check_posteriors(list(priors), guide, first, second)
    return _read(guide, first, priors, args, kwargs)


def _twice(run: Callable[[], Any], programs: str, args: Any, kwargs: Any) -> tuple[Any, Any]:
    """Return what two runs of a program give; the global random state is left alone."""
    with local_seed():
        try:
            return run(), run()
        except TypeError as error:
            run_on = "do not run" if " and " in programs else "does not run"
            raise TypeError(
                f"{programs} {run_on} on the {len(args) + len(kwargs)} arguments given for "
                f"{'them' if ' and ' in programs else 'it'} ({error}); pass what they take"
            ) from error


def _read(guide: Program, trace: Trace, priors: Mapping[str, Any], args: Any, kwargs: Any) -> Latents:
    names = list(priors)
    if isinstance(guide, AutoContinuous):
        return _from_autoguide(guide, names, priors, args, kwargs)
    return _latents(names, {name: _posterior_of(name, trace, priors[name]) for name in names}, priors)


def to_elements(distribution: Any) -> Any:
    """Return ``distribution`` without masks and with the event dimensions that are only declared made batch ones."""
    if isinstance(distribution, MaskedDistribution | Independent):
        return to_elements(distribution.base_dist)
    if isinstance(distribution, ExpandedDistribution):
        base = to_elements(distribution.base_dist)
        declared = base.batch_shape[len(distribution.base_dist.batch_shape) :]
        return base.expand(distribution.batch_shape + declared)
    if isinstance(distribution, dist.Delta):
        return dist.Delta(distribution.v)
    if isinstance(distribution, LowRankMultivariateNormal):
        return dist.MultivariateNormal(distribution.loc, distribution.covariance_matrix)
    return distribution


def _latents(names: list[str], posteriors: Mapping[str, Any], priors: Mapping[str, Any], **correlated: Any) -> Latents:
    return Latents(
        {name: to_elements(posteriors[name]) for name in names},
        {name: to_elements(priors[name]) for name in names},
        {name: len(priors[name].event_shape) for name in names},
        **correlated,
    )


def _trace(guide: Program, model: Program, args: Any, kwargs: Any) -> tuple[Trace, Trace]:
    guide_trace = poutine.trace(guide).get_trace(*args, **kwargs)
    return guide_trace, poutine.trace(poutine.replay(model, trace=guide_trace)).get_trace(*args, **kwargs)


def _posterior_of(name: str, guide_trace: Trace, prior: Any) -> Distribution:
    """Return what the guide draws the site from, or what ``AutoNormal`` draws its unconstrained self from."""
    unconstrained = guide_trace.nodes.get(f"{name}_unconstrained")
    if unconstrained is None:
        return guide_trace.nodes[name]["fn"]
    return _constrained(to_elements(unconstrained["fn"]), prior.support)


def _from_autoguide(guide: Any, names: list[str], priors: Mapping[str, Any], args: Any, kwargs: Any) -> Latents:
    """Read an autoguide that draws all sites as one vector."""
    flat = to_elements(guide.get_posterior(*args, **kwargs))
    if not isinstance(flat, Normal | MultivariateNormal):
        raise NotImplementedError(
            f"{type(guide).__name__} has a {type(flat).__name__} posterior over all sites, whose parts are not known; "
            "use AutoNormal, AutoDiagonalNormal, AutoMultivariateNormal or AutoLowRankMultivariateNormal"
        )
    positions = _positions(guide)
    loc, scale = flat.loc, flat.stddev
    posteriors = {
        name: _constrained(dist.Normal(loc[positions[name]], scale[positions[name]]), priors[name].support)
        for name in names
    }
    if isinstance(flat, Normal):
        return _latents(names, posteriors, priors)
    return _latents(names, posteriors, priors, correlated=flat, positions=positions)


def _positions(guide: Any) -> dict[str, Tensor]:
    """Return where in the autoguide's vector each site's elements are."""
    positions, start = {}, 0
    for name, site in guide.prototype_trace.iter_stochastic_nodes():
        shape = biject_to(site["fn"].support).inv(site["value"]).shape
        positions[name] = torch.arange(start, start + shape.numel(), device=guide.loc.device).reshape(shape)
        start += shape.numel()
    return positions


def _constrained(normal: Normal, support: Any) -> Distribution:
    """Return the distribution on ``support`` of what is ``normal`` in unconstrained space."""
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    if isinstance(support, type(constraints.real)):
        return normal
    above = isinstance(support, constraints.greater_than | constraints.greater_than_eq)
    if above and bool(torch.as_tensor(support.lower_bound == 0).all()):
        return dist.LogNormal(normal.loc, normal.scale)
    if isinstance(support, constraints.interval | constraints.half_open_interval):
        return LogitNormal(normal.loc, normal.scale, support.lower_bound, support.upper_bound)
    return TransformedDistribution(normal, [biject_to(support)])


def _check_known(names: list[str], latent: Iterable[str]) -> None:
    latent = list(latent)
    for name in names:
        if name not in latent:
            raise ValueError(f"there is no latent site {name!r}; the latent sites are {', '.join(map(repr, latent))}")


def _check_sites(names: list[str], guide_trace: Trace, model_trace: Trace) -> None:
    sites = {
        name: site
        for name, site in model_trace.nodes.items()
        if site["type"] == "sample" and not site_is_subsample(site)
    }
    latent = [name for name, site in sites.items() if not site["is_observed"]]
    for name in names:
        if name in sites and name not in latent:
            raise ValueError(f"site {name!r} is observed and has no posterior; the latent sites are {latent}")
    _check_known(names, latent)
    for name in names:
        _check_in_guide(name, sites[name]["fn"].shape(), guide_trace)


def _check_in_guide(name: str, shape: torch.Size, guide_trace: Trace) -> None:
    """Raise ``ValueError`` unless the guide has the site, and of this shape."""
    if name not in guide_trace.nodes:
        raise ValueError(
            f"the guide has no site {name!r}, so there is no posterior for it; add "
            f"pyro.sample({name!r}, ...) to the guide"
        )
    there = guide_trace.nodes[name]["value"].shape
    if shape != there:
        raise ValueError(f"site {name!r} has shape {tuple(shape)} in the model but {tuple(there)} in the guide")


def _check_posteriors(names: list[str], guide: Program, first: Trace, second: Trace) -> None:
    """Refuse sites whose posterior is not the same in a second run, with other draws of the other sites."""
    for name in names:
        node = first.nodes[name]
        stated = isinstance(guide, AutoContinuous) or f"{name}_unconstrained" in first.nodes
        if not isinstance(to_elements(node["fn"]), dist.Delta):
            _check_same("posterior", name, first, second)
        elif not (stated or torch.equal(node["value"], second.nodes[name]["value"])):
            raise NotImplementedError(
                f"the guide draws site {name!r} by other sites, and its own distribution is not known; use a guide "
                f"that has pyro.sample({name!r}, ...) with a distribution of its own"
            )


def _check_same(kind: str, name: str, first: Trace, second: Trace) -> None:
    value = first.nodes[name]["value"]
    here, there = (each.nodes[name]["fn"].log_prob(value) for each in (first, second))
    if not torch.allclose(here, there, equal_nan=True):
        raise NotImplementedError(
            f"the {kind} of site {name!r} depends on the draws of other sites, but Bayesian model reduction compares "
            "distributions that do not; reduce the sites that it depends on, or condition on them"
        )
