"""A fitted posterior in ArviZ's container: draws of the noise, what they say of data, and what the evidence says."""

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyro_bmrs.bmr import evidence_change
from pyro_bmrs.checks import check_integer, check_seed
from pyro_bmrs.criteria import BMRS_N, BMRS_U
from pyro_bmrs.inspection.draws import each_draw, log_prior, on_host
from pyro_bmrs.inspection.versions import versions
from pyro_bmrs.model.guides.flat import FlatGuide
from pyro_bmrs.model.network import NoisyNetwork
from pyro_bmrs.randomness import local_seed
from pyro_bmrs.structures.any_guide import known_posterior, noise_posterior
from pyro_bmrs.structures.pair import NoisePosterior, check_model
from pyro_bmrs.svi.data.making import source_of
from pyro_bmrs.svi.data.source import Source
from pyro_bmrs.svi.data.unpacking import Unpack
from pyro_bmrs.svi.free_form import FreeFormEvidence
from pyro_bmrs.svi.importance import FEWEST_RATIOS, log_prior_ratios

__all__ = ["to_arviz"]

Groups = dict[str, dict[str, "np.ndarray[Any, Any]"]]

_CRITERIA = {"BMRS_N": BMRS_N(), "BMRS_U_8": BMRS_U(8), "BMRS_U_4": BMRS_U(4)}


@torch.no_grad()
def to_arviz(
    model: Any,
    guide: Any = None,
    data: Any = None,
    draws: int = 1000,
    seed: int = 0,
    *,
    unpack: Unpack | None = None,
    free_form: FreeFormEvidence | None = None,
) -> Any:
    r"""Return a fitted posterior as ArviZ's InferenceData (0.x) or DataTree (1.x).

    A variational posterior has independent draws and no chains: they count as one chain, and are summarised by
    ``arviz.summary(..., kind="stats")``. Sites are called ``<layer>.theta``; coordinates are the structures' numbers in
    the original network, ``<site>_structure``, and of data ``example``. Groups:

    - ``posterior`` and ``prior``: ``<layer>.theta`` and ``<layer>.log_theta``, of shape ``(1, draws, size)``. Removed
      structures keep the posterior for which they were removed, unless they have been cut out by shrinking. Other
      latent sites are in ``posterior`` alone.
    - ``constant_data``, for each site and structure: ``.kept`` (1 or 0), ``.mean``, ``.snr`` (mean over standard
      deviation), ``.delta_f_BMRS_N``, ``.delta_f_BMRS_U_8`` and ``.delta_f_BMRS_U_4`` (in nats, >= 0 favours removal;
      where they are known for the prior), ``.odds`` (of absence, from BMRS_N and even prior odds), ``.original_index``
      and ``.layer``; with ``free_form`` its ``.delta_f_free_form`` and ``.delta_f_free_form_error``.
    - With ``data``: ``log_likelihood`` of every example, ``posterior_predictive``, ``observed_data``, each of ``obs``,
      of shape ``(1, draws, n, ...)``, and ``sample_stats``: ``lp``, the log of the joint density of data and noise, and
      ``log_q``, the posterior's. The network runs once per draw and batch, in eval mode.

    Attributes of the whole say how it was made: settings, seed, versions, and what the weights were trained for last.
    After fine-tuning they fit the posterior's mean, and draws of the noise predict worse than that. With the training
    data as ``data``, 25 draws or more and one weight of the KL for all sites, ``pareto_k`` is the k-hat of the
    importance ratios of what the posterior approximates, noise given data: above 0.7 they cannot correct it (Yao et
    al., 2018).

    Args:
        model: The model; or a guide alone that knows its model.
        guide: Its guide, of any kind; one that is a program is run on the first batch, see ``noise_posterior``.
        data: Examples to predict: whatever ``fit`` takes.
        draws: Number of draws. With ``n`` examples, results take ``12 * draws * n`` bytes for one label each; inputs
            are streamed in batches.
        seed: Of the draws; the global random state is left alone.
        unpack: From a batch of ``data`` to inputs and observations, as for ``fit``.
        free_form: What ``free_form_evidence`` found, to keep beside the criteria's.

    Raises:
        TypeError: If an argument is of another type.
        ValueError: If the guide is another model's, ``draws`` is not positive, the network does not take ``data``, or
            ``free_form`` is of another network.

    References:
        Yes, but Did It Work? Evaluating Variational Inference (Yao et al., 2018) https://arxiv.org/abs/1802.02538

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), bmrs.MultiplicativeNoise(8), nn.Linear(8, 3))
        >>> model = bmrs.NoisyNetwork(net)
        >>> guide = bmrs.TruncatedLogNormalGuide(model)
        >>> bmrs.to_arviz(model, guide, draws=50).posterior["2.log_theta"].shape
        (1, 50, 8)
    """
    from pyro_bmrs._arviz import from_dict, pareto_k  # noqa: PLC0415  (ArviZ takes as long to import as torch)

    if guide is None:
        guide = known_posterior(model)
        model = guide.model
    check_model(model)
    check_integer("draws", draws, low=1, high=10**7)
    check_seed("seed", seed)
    source = None if data is None else source_of(data, model, unpack)
    guide = noise_posterior(model, guide, *(() if source is None else source.first))
    with local_seed(seed, [guide.device], validate=False):
        drawn, log_q = guide.draw_with_log_prob(draws)
        thetas = {site: drawn[site] for site in guide.sizes}
        others = {site: on_host(values.unsqueeze(0)) for site, values in drawn.items() if site not in thetas}
        prior = {site: distribution.sample((draws,)) for site, distribution in guide.prior().items()}
        groups: Groups = {
            "posterior": {**_noise(thetas), **others},
            "prior": _noise(prior),
            "constant_data": {**_constants(guide), **_free_form(guide, free_form)},
        }
        if source is not None:
            groups |= _predictions(model, guide, drawn, log_q, source)
    structures = {f"{site}_structure": layer.index.tolist() for site, layer in guide.noise.items()}
    dims = {
        name: [f"{_site_of(name, guide)}_structure"]
        for group in ("posterior", "constant_data")
        for name in groups[group]
        if name not in others
    }
    if source is not None:
        structures["example"] = list(range(source.size))
        extra = groups["observed_data"]["obs"].ndim - 1
        dims["obs"] = ["example", *(f"obs_dim_{i}" for i in range(extra))]
    attributes = _attributes(model, draws, seed)
    if source is not None and draws >= FEWEST_RATIOS and set(model.kl_weights.values()) == {1.0}:
        attributes["pareto_k"] = float(pareto_k(_log_ratios(model, guide, thetas, groups))[0])
    return from_dict(groups, structures, dims, attributes)


def _noise(thetas: Mapping[str, Tensor]) -> dict[str, "np.ndarray[Any, Any]"]:
    """Return noise and its logarithm, with the one chain that ArviZ wants in front."""
    found = {}
    for site, theta in thetas.items():
        found[site] = on_host(theta.unsqueeze(0))
        found[_log_name(site)] = on_host(theta.clamp_min(torch.finfo(theta.dtype).tiny).log().unsqueeze(0))
    return found


def _log_name(site: str) -> str:
    return f"{site.removesuffix('theta')}log_theta"


def _site_of(name: str, guide: NoisePosterior) -> str:
    return next(site for site in guide.sizes if name in (site, _log_name(site)) or name.startswith(f"{site}."))


def _constants(guide: NoisePosterior) -> dict[str, "np.ndarray[Any, Any]"]:
    priors, found = guide.prior(), {}
    for site, posterior in guide.posterior().items():
        layer = guide.noise[site]
        found[f"{site}.kept"] = on_host(layer.keep).astype("int8")
        found[f"{site}.original_index"] = on_host(layer.index)
        found[f"{site}.layer"] = np.array([site.removesuffix(".theta")] * layer.size)
        found[f"{site}.mean"] = on_host(posterior.mean)
        found[f"{site}.snr"] = on_host(getattr(posterior, "snr", posterior.mean / posterior.stddev))
        for name, criterion in _CRITERIA.items():
            try:
                delta_f = evidence_change(posterior, priors[site], criterion.reduced_prior(priors[site]))
            except (NotImplementedError, TypeError):  # there is no such reduction of this prior
                continue
            found[f"{site}.delta_f_{name}"] = on_host(delta_f)
            if name == "BMRS_N":
                found[f"{site}.odds"] = on_host(delta_f.double().clamp(max=700).exp())
    return found


def _free_form(guide: NoisePosterior, found: FreeFormEvidence | None) -> dict[str, "np.ndarray[Any, Any]"]:
    """Return free-form evidence and its standard errors of the structures that are physically there."""
    if found is None:
        return {}
    named = {"delta_f_free_form": found.delta_f, "delta_f_free_form_error": found.standard_error}
    sizes = {site: len(each) for site, each in found.delta_f.items()}
    known = {site: layer.original_size for site, layer in guide.noise.items()}
    if sizes != known:
        raise ValueError(f"free_form is of structures {sizes}, but the network has {known}")
    return {
        f"{site}.{name}": on_host(values[site][layer.index.to(values[site].device)])
        for name, values in named.items()
        for site, layer in guide.noise.items()
    }


def _predictions(
    model: NoisyNetwork, guide: NoisePosterior, drawn: Mapping[str, Tensor], log_q: Tensor, source: Source
) -> Groups:
    """Return what each draw of the noise says of each example."""
    log_likelihood, predicted, observed = [], [], []
    for y, distributions in each_draw(model, drawn, source, guide.device):
        of_batch = [(on_host(each.log_prob(y).float()), on_host(each.sample())) for each in distributions]
        log_likelihood.append(np.stack([first for first, _ in of_batch]))
        predicted.append(np.stack([second for _, second in of_batch]))
        observed.append(on_host(y))
    pointwise = np.concatenate(log_likelihood, 1)
    lp = pointwise.sum(1, dtype=np.float64) + on_host(log_prior(model, guide, drawn, source))
    return {
        "log_likelihood": {"obs": pointwise[None]},
        "posterior_predictive": {"obs": np.concatenate(predicted, 1)[None]},
        "observed_data": {"obs": np.concatenate(observed)},
        "sample_stats": {"lp": lp[None], "log_q": on_host(log_q)[None]},
    }


def _log_ratios(
    model: NoisyNetwork, guide: NoisePosterior, thetas: Mapping[str, Tensor], groups: Groups
) -> "np.ndarray[Any, Any]":
    """Return the log of target over posterior of each draw, ``(1, draws)``; the weight of the KL tempers the data.

    Removed structures count only where the posterior of the others is not known without them.
    """
    log_likelihood = groups["log_likelihood"]["obs"].sum(-1, dtype=np.float64)
    if isinstance(guide, FlatGuide) and guide.latents is None:
        return log_likelihood / model.kl_weight + on_host(log_prior_ratios(guide, thetas))
    log_prior = groups["sample_stats"]["lp"] - log_likelihood
    return log_likelihood / model.kl_weight + log_prior - groups["sample_stats"]["log_q"]


def _attributes(model: NoisyNetwork, draws: int, seed: int) -> dict[str, Any]:
    settings = {"kl_weight": model.kl_weight, "kl_weights": model.kl_weights, "num_data": model.num_data}
    packages = versions()
    weights = "the posterior's mean" if model.fine_tuned else "draws of the noise" if model.fitted else "nothing here"
    return {
        "inference_library": "pyro-bmrs",
        "inference_library_version": packages["pyro-bmrs"],
        "settings": json.dumps({**settings, "draws": draws}),
        "seed": seed,
        "versions": json.dumps(packages),
        "weights_trained_for": weights,
    }
