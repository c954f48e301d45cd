"""The noise posterior that a guide of any kind stands for: an autoguide, a program written by hand, a flow."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from pyro import poutine
from pyro.distributions import Delta, Empirical
from pyro.infer.autoguide import AutoGuide
from pyro.poutine import Trace
from pyro.poutine.messenger import unwrap
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.distributions import Distribution, kl_divergence

from pyro_bmrs.bmr.joint_normal import marginals
from pyro_bmrs.bmr.latents import read_guide, to_elements
from pyro_bmrs.checks import described
from pyro_bmrs.randomness import local_seed
from pyro_bmrs.structures.pair import NoisePosterior, NoisyModel, check_model, check_pair, sum_of

__all__ = ["ProgramPosterior", "known_posterior", "noise_posterior"]

_DRAWS = 1000  # of a posterior that is known by its draws alone, and of a KL that has no closed form

ByDraw = dict[str, Tensor]


def noise_posterior(model: Any, guide: Any, *args: Any, **kwargs: Any) -> NoisePosterior:
    r"""Return what a fitted guide says of the model's noise: the marginal posterior of each site, and joint draws.

    Whatever takes a model and a guide to look at (``predict``, ``compact``, ``evaluate``, ``to_arviz``,
    ``PruningContext``) calls this by itself. Call it for a guide that needs arguments, or that does not know its model,
    and pass the result on: also to ``evidence_changes`` and the plots, which take the guide alone.

    Marginals are exact where the guide states them: a ``FlatGuide``; an autoguide that is normal in unconstrained
    space; a program with one sample statement per site; any object with a method ``posterior()`` that returns a
    distribution of ``batch_shape`` ``(size,)`` for each site. Any other guide (a flow, a hierarchy) is run 1,000 times,
    and a site's posterior is Pyro's ``Empirical`` distribution of these draws: mean, signal-to-noise ratio and windows
    are estimates then, and an ``UnreliableEvidenceWarning`` says where the evidence is none.

    Args:
        model: The ``NoisyNetwork`` that it was fitted to.
        guide: The guide.
        args: What the guide takes, where it needs any.
        kwargs: As ``args``.

    Raises:
        TypeError: If ``model`` or ``guide`` is something else, or the guide does not run on the arguments.
        ValueError: If the guide lacks a noise site, has another shape for it, is another model's, or is an autoguide
            that has never been run.

    Example:
        >>> import pyro
        >>> from pyro.infer.autoguide import AutoNormal
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), bmrs.MultiplicativeNoise(8), nn.Linear(8, 3))
        >>> model = bmrs.NoisyNetwork(net, num_data=100)
        >>> guide = AutoNormal(model)
        >>> svi = pyro.infer.SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), pyro.infer.Trace_ELBO())
        >>> _ = svi.step(torch.randn(5, 4), torch.tensor([0, 1, 2, 0, 1]))
        >>> posterior = bmrs.noise_posterior(model, guide)
        >>> bmrs.evidence_changes(posterior, bmrs.precision_window)["2.theta"].shape
        torch.Size([8])
    """
    check_model(model)
    if isinstance(guide, NoisePosterior):
        check_pair(model, guide)
        return guide
    states = callable(getattr(guide, "posterior", None))
    if isinstance(guide, type | NoisyModel) or not (states or callable(guide)):
        check_pair(model, guide)  # which says what a guide is
    if states:
        return ProgramPosterior(model, _stated(guide, model))
    if isinstance(guide, AutoGuide) and guide.prototype_trace is None:
        raise ValueError(f"the {type(guide).__name__} has not been fitted: fit it, or call it once, guide(x, y)")
    priors = {site: prior.to_event(1) for site, prior in _priors(model).items()}

    def run() -> Trace:
        return poutine.trace(guide).get_trace(*args, **kwargs)

    def drawn() -> dict[str, Distribution]:
        return _empirical(_many(run, list(priors), _DRAWS, seed=0)[0])

    others = _other_sites(run, list(priors))
    try:
        latents = read_guide(guide, priors, *args, **kwargs)
    except NotImplementedError:
        return ProgramPosterior(model, drawn(), run, others)
    separate = latents.correlated is None and all(not each.event_shape for each in latents.posteriors.values())
    posteriors = {site: marginals(each) for site, each in latents.posteriors.items()}
    if not all(map(_has_moments, posteriors.values())):
        sampled = drawn()
        posteriors = {site: each if _has_moments(each) else sampled[site] for site, each in posteriors.items()}
        separate = False
    return ProgramPosterior(model, posteriors, None if separate and not others else run, others)


def known_posterior(guide: Any) -> NoisePosterior:
    """Return the noise posterior of a guide that knows its model.

    Raises:
        TypeError: If it does not.
    """
    if isinstance(guide, NoisePosterior):
        return guide
    model = unwrap(getattr(guide, "model", None))  # autoguides keep it within handlers
    if isinstance(model, NoisyModel):
        return noise_posterior(model, guide)
    raise TypeError(
        f"guide must be a guide such as TruncatedLogNormalGuide(model), but got {described(guide)}; of any other that "
        "has been fitted pass noise_posterior(model, guide, ...), with the arguments that it takes"
    )


class ProgramPosterior(NoisePosterior):
    """The noise posterior of a guide that is any Pyro program.

    Args:
        model: The model.
        posteriors: Posterior of each site, of ``batch_shape`` ``(size,)``.
        run: Runs the guide once and returns its trace; None where it draws noise alone, each structure's independently,
            which is then drawn from ``posteriors``.
        others: Names of the other latent sites that the guide draws.
    """

    def __init__(
        self,
        model: NoisyModel,
        posteriors: Mapping[str, Distribution],
        run: Callable[[], Trace] | None = None,
        others: Sequence[str] = (),
    ) -> None:
        self._model, self._posteriors, self._run, self._others = model, dict(posteriors), run, tuple(others)

    @property
    def model(self) -> NoisyModel:
        return self._model

    def posterior(self) -> Mapping[str, Distribution]:
        return self._posteriors

    @torch.no_grad()
    def points(self) -> ByDraw:
        if self._run is None or not self._others:
            return self.mean()
        drawn, _ = _many(self._run, self._others, _DRAWS, seed=0)
        return {**self.mean(), **{site: drawn[site].mean(0) for site in self._others}}

    @torch.no_grad()
    def draw(self, sample_shape: tuple[int, ...] = ()) -> ByDraw:
        count = torch.Size(sample_shape).numel()
        thetas = self.draw_with_log_prob(count)[0]
        return {site: thetas[site].reshape(*sample_shape, size) for site, size in self.sizes.items()}

    @torch.no_grad()
    def draw_with_log_prob(self, draws: int) -> tuple[ByDraw, Tensor]:
        if self._run is not None:
            return _many(self._run, [*self.sizes, *self._others], draws)
        thetas = {site: posterior.sample((draws,)) for site, posterior in self._posteriors.items()}
        return thetas, sum_of(each.log_prob(thetas[site]).double().sum(-1) for site, each in self._posteriors.items())

    @torch.no_grad()
    def kl(self) -> Tensor:
        """Return the KL from the prior, in nats: in closed form where there is one, else an estimate of 1,000 draws.

        Of a guide whose sites or structures depend on each other, removed structures are counted too; where they depend
        on something else that it draws, it is an upper bound. Of one that correlates noise with other latent sites, it
        is that of the noise's marginals.

        Raises:
            NotImplementedError: If noise is known by its draws alone, and the guide draws other latent sites.
        """
        by_draws = any(isinstance(each, Empirical) for each in self._posteriors.values())
        if self._run is None or (self._others and not by_draws):
            priors = self.prior()
            return sum_of(
                (_kl(posterior, priors[site]) * self.noise[site].keep).sum()
                for site, posterior in self._posteriors.items()
            )
        if self._others:
            raise NotImplementedError(
                f"the KL of the noise is not known from draws of it along with {self._others[0]!r}: use a guide with a "
                "distribution of its own for each site"
            )
        thetas, log_q = _many(self._run, list(self.sizes), _DRAWS)
        log_p = sum_of(prior.log_prob(thetas[site]).double().sum(-1) for site, prior in self.prior().items())
        return (log_q - log_p).mean()


def _other_sites(run: Callable[[], Trace], noise: list[str]) -> list[str]:
    """Return the names of what a guide draws for the model's sake besides noise; the random state is left alone."""
    with local_seed(), torch.no_grad():
        try:
            trace = run()
        except TypeError:
            return []  # it does not run on these arguments, which is said by what runs it next
    return [
        name
        for name, node in trace.nodes.items()
        if node["type"] == "sample"
        and not (name in noise or node["infer"].get("is_auxiliary") or site_is_subsample(node))
    ]


def _priors(model: Any) -> dict[str, Any]:
    return {site: layer.prior for site, layer in model.noise.items()}


def _stated(guide: Any, model: Any) -> dict[str, Distribution]:
    """Return the posteriors that a guide states, which must be of the model's sites and sizes."""
    stated = guide.posterior()
    sizes = {site: layer.size for site, layer in model.noise.items()}
    if not isinstance(stated, Mapping) or list(stated) != list(sizes):
        found = list(stated) if isinstance(stated, Mapping) else described(stated)
        raise ValueError(f"posterior() of the guide must be of the model's sites {list(sizes)}, but is {found}")
    for site, each in stated.items():
        if not isinstance(each, Distribution) or each.batch_shape != (sizes[site],) or each.event_shape:
            raise ValueError(
                f"posterior() of the guide must have a distribution of batch_shape ({sizes[site]},) for site {site!r}, "
                f"but has {each}"
            )
    return dict(stated)


def _has_moments(distribution: Distribution) -> bool:
    if isinstance(distribution, Delta):
        return True
    try:
        return bool(torch.isfinite(distribution.mean).all() and torch.isfinite(distribution.variance).all())
    except NotImplementedError:
        return False


def _kl(posterior: Any, prior: Any) -> Tensor:
    """Return the KL of each structure."""
    try:
        return kl_divergence(posterior, prior)
    except NotImplementedError:
        theta = posterior.sample((_DRAWS,))
        return (posterior.log_prob(theta).double() - prior.log_prob(theta).double()).mean(0)


def _empirical(thetas: ByDraw) -> dict[str, Distribution]:
    return {site: Empirical(theta.T.contiguous(), torch.zeros_like(theta.T)) for site, theta in thetas.items()}


@torch.no_grad()
def _many(run: Callable[[], Trace], sites: Sequence[str], draws: int, seed: int | None = None) -> tuple[ByDraw, Tensor]:
    """Return what many runs of a guide draw, and the log of the density of all that each run draws."""
    if seed is not None:
        with local_seed(seed):
            return _many(run, sites, draws)
    traces = [run() for _ in range(draws)]
    thetas = {site: torch.stack([each.nodes[site]["value"] for each in traces]) for site in sites}
    return thetas, torch.stack([_log_prob(each, sites) for each in traces])


def _log_prob(trace: Trace, sites: Sequence[str]) -> Tensor:
    """Return the log density of the noise that a guide draws, without the scales of its sites.

    Given what else it draws, if the noise is drawn by statements of its own; of an autoguide, which draws elsewhere and
    puts point masses at the sites, it is that of all that it draws.
    """
    trace.compute_log_prob()
    nodes = {name: node for name, node in trace.nodes.items() if node["type"] == "sample"}
    if not any(isinstance(to_elements(nodes[site]["fn"]), Delta) for site in sites):
        nodes = {site: nodes[site] for site in sites}
    return sum_of(node["unscaled_log_prob"].double().sum() for node in nodes.values() if not site_is_subsample(node))
