"""Any Pyro program that has been fitted by SVI, in ArviZ's container, which ArviZ itself makes of MCMC only."""

import json
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from pyro import poutine
from pyro.poutine import Trace
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyro_bmrs.checks import check_integer, check_seed, described
from pyro_bmrs.inspection.draws import on_host
from pyro_bmrs.inspection.versions import versions
from pyro_bmrs.randomness import local_seed
from pyro_bmrs.structures.inputs import refusing

__all__ = ["guide_to_arviz"]

Values = dict[str, dict[str, list["np.ndarray[Any, Any]"]]]


@torch.no_grad()
def guide_to_arviz(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    *args: Any,
    draws: int = 1000,
    seed: int = 0,
    **kwargs: Any,
) -> Any:
    """Return what a fitted guide of any Pyro program says, as ArviZ's InferenceData (0.x) or DataTree (1.x).

    Guide and model run once per draw; what is kept is one array per site. Independent draws count as one chain. Groups:
    ``posterior`` and ``prior`` of every latent site (auxiliary ones of autoguides left out); where something is
    observed, ``log_likelihood`` of each element (of ``batch_shape``, without the scale of a subsample),
    ``posterior_predictive`` and ``observed_data``; ``sample_stats``: ``lp``, the log of the joint density, and
    ``log_q``, the guide's. Dimensions are numbered.

    Args:
        model: A Pyro program.
        guide: A guide for it: hand-written, an autoguide, a module.
        args: Arguments of both; what is observed has to be among them.
        draws: Number of draws.
        seed: Their seed; the global random state is left alone.
        kwargs: As ``args``.

    Raises:
        TypeError: If model or guide is no program, or ``draws`` no integer.
        ValueError: If guide or model does not run on the arguments, the guide lacks a latent site of the model, or
            ``draws`` is not positive.

    Example:
        >>> import pyro
        >>> import pyro.distributions as dist
        >>> def model(y):
        ...     mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        ...     with pyro.plate("data", len(y)):
        ...         pyro.sample("y", dist.Normal(mean, 1.0), obs=y)
        >>> guide = lambda y: pyro.sample("mean", dist.Normal(y.mean(), 0.3))
        >>> dict(guide_to_arviz(model, guide, torch.randn(9), draws=50).log_likelihood.sizes)["draw"]
        50
    """
    from pyro_bmrs._arviz import from_dict  # noqa: PLC0415  (ArviZ takes as long to import as torch)

    for name, program in (("model", model), ("guide", guide)):
        if not callable(program) or isinstance(program, type):
            raise TypeError(f"{name} must be a Pyro program, a function or module, but got {described(program)}")
    check_integer("draws", draws, low=1, high=10**7)
    check_seed("seed", seed)
    values: Values = defaultdict(lambda: defaultdict(list))
    with local_seed(seed):
        for _ in range(draws):
            _one_draw(model, guide, args, kwargs, values)
        observed = {name: on_host(site["value"]) for name, site in _observed(_traced(model, args, kwargs))}
    groups = {group: {name: np.stack(each)[None] for name, each in found.items()} for group, found in values.items()}
    if observed:
        groups["observed_data"] = observed
    packages = versions()
    attributes = {
        "inference_library": "pyro-ppl",
        "inference_library_version": packages["pyro-ppl"],
        "guide": type(guide).__name__,
        "draws": draws,
        "seed": seed,
        "versions": json.dumps(packages),
    }
    return from_dict(groups, {}, {}, attributes)


def _one_draw(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    values: Values,
) -> None:
    """Append what one run of guide and model gives to ``values``."""
    with refusing("guide and model do not run on the arguments given for them", remedy="give those that SVI had"):
        drawn = _traced(guide, args, kwargs)
        joint = _traced(poutine.replay(model, trace=drawn), args, kwargs)
        values["sample_stats"]["lp"].append(_number(joint.log_prob_sum()))
        values["sample_stats"]["log_q"].append(_number(drawn.log_prob_sum()))
    _check_covered(drawn, joint)
    for name, site in _latent(joint):
        values["posterior"][name].append(on_host(site["value"]))
    for name, site in _latent(_traced(model, args, kwargs)):
        values["prior"][name].append(on_host(site["value"]))
    for name, site in _observed(joint):
        values["log_likelihood"][name].append(on_host(site["fn"].log_prob(site["value"])))
    predicted = _traced(poutine.uncondition(poutine.replay(model, trace=drawn)), args, kwargs)
    for name in values["log_likelihood"]:
        values["posterior_predictive"][name].append(on_host(predicted.nodes[name]["value"]))


def _traced(program: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Trace:
    return poutine.trace(program).get_trace(*args, **kwargs)


def _latent(trace: Trace) -> Iterator[tuple[str, Any]]:
    """Iterate over the sites of a model that it draws."""
    for name, site in trace.nodes.items():
        if site["type"] == "sample" and not (site["is_observed"] or site_is_subsample(site)):
            yield name, site


def _observed(trace: Trace) -> Iterator[tuple[str, Any]]:
    """Iterate over the sites of a model that are data: not those that only add to its density."""
    for name, site in trace.nodes.items():
        factor = type(site.get("fn")).__name__ in ("Unit", "Delta")
        if site["type"] == "sample" and site["is_observed"] and not (site_is_subsample(site) or factor):
            yield name, site


def _check_covered(drawn: Trace, joint: Trace) -> None:
    """Raise ``ValueError`` unless the guide has every latent site of the model."""
    lacking = [name for name, _ in _latent(joint) if name not in drawn.nodes]
    if lacking:
        raise ValueError(
            f"the guide has no site {lacking[0]!r}, which the model draws: it has "
            f"{[name for name, site in drawn.nodes.items() if site['type'] == 'sample']}"
        )


def _number(value: Tensor | float) -> "np.ndarray[Any, Any]":
    return np.asarray(float(value))
