r"""Bayesian model reduction of a Pyro program: guide, model and other priors in, evidence changes out.

A reduced prior on a set :math:`S` of elements leaves the others their prior given those,

.. math:: \tilde p(\theta) = \tilde p(\theta_S) \, p(\theta_{\setminus S} \mid \theta_S).

Then :math:`\tilde p / p` is a function of :math:`\theta_S` alone, and :math:`\Delta F` needs nothing but the marginal
posterior of :math:`S`.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import Distribution, LogNormal, MultivariateNormal

from pyro_bmrs.bmr.joint_normal import as_multivariate, block_diagonal, log_space, marginals, moments
from pyro_bmrs.bmr.latents import Latents, Program, check_no_point_mass, read_latents, to_elements
from pyro_bmrs.bmr.registry import evidence_change, reduced_posterior
from pyro_bmrs.checks import described

__all__ = ["Reduction", "reduce"]

Elements = Mapping[str, Tensor] | Iterable[str]


class Triple(NamedTuple):
    """Posterior, prior and reduced prior of a site, one batch element an element of the site."""

    posterior: Any
    prior: Any
    reduced_prior: Any

    @property
    def correlated(self) -> bool:
        """Whether one of the three is a multivariate normal."""
        return any(isinstance(each, MultivariateNormal) for each in self)

    @property
    def positive(self) -> bool:
        """Whether the logarithm is the normal one."""
        return isinstance(self.posterior, LogNormal)


@dataclass(frozen=True)
class Reduction:
    r"""What other priors would have made of evidence and posterior.

    Attributes:
        delta_f: :math:`\Delta F` of reducing the prior of each element alone, in nats, of the site's shape (less event
            dimensions that belong together, as a Dirichlet's); >= 0 favours the reduced prior.
        sites: Posterior, prior and reduced prior of each site, one batch element an element.
    """

    delta_f: Mapping[str, Tensor]
    sites: Mapping[str, Triple]
    _latents: Latents = field(repr=False)

    @torch.no_grad()
    def joint(self, elements: Elements | None = None) -> Tensor:
        r"""Return :math:`\Delta F` of reducing the priors of these elements together, and of no others, in nats.

        The sum of theirs where they are independent, and the rule for the joint normal where the posterior or a prior
        correlates them.

        Args:
            elements: A bool tensor of ``delta_f``'s shape for each site, True where the prior is reduced; or names of
                whole sites. None is all that there is.

        Returns:
            A scalar.

        Raises:
            ValueError: If a site has no reduced prior, or its elements are not a bool tensor of its shape.
            NotImplementedError: If correlated elements are not normal, or some are fixed at a point and some are not.

        Example:
            >>> import pyro
            >>> q = dist.MultivariateNormal(torch.tensor([0.1, 0.2]), torch.tensor([[0.04, 0.03], [0.03, 0.04]]))
            >>> guide = lambda: pyro.sample("w", q)
            >>> model = lambda: pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            >>> reduction = reduce(guide, model, {"w": dist.Delta(torch.zeros(2))})
            >>> reduction.delta_f["w"].sum(), reduction.joint({"w": torch.tensor([True, True])})
            (tensor(2.5939), tensor(3.0608))
        """
        masks = self._masks(elements)
        together = [site for site in masks if site in self._latents.positions]
        groups = [[site] for site in masks if site not in together] + ([together] if together else [])
        changes = [self._joint_of_group({site: masks[site] for site in group}) for group in groups]
        return torch.stack(changes).sum() if changes else torch.zeros(())

    @property
    @torch.no_grad()
    def reduced_posteriors(self) -> dict[str, Distribution]:
        """The posterior of each site under the reduced priors of all elements, with the site's event dimensions.

        Element by element where an autoguide correlates sites.

        Raises:
            NotImplementedError: If there is no closed form.
            ValueError: If there is no such posterior, because the evidence change diverges.
        """
        together = [site for site in self.sites if site in self._latents.positions]
        result = self._reduced_marginals(together) if together else {}
        for site, triple in self.sites.items():
            if site not in result:
                result[site] = reduced_posterior(*(map(as_multivariate, triple) if triple.correlated else triple))
        dims = self._latents.event_dims
        return {site: _declare_event(result[site], dims[site]) for site in self.sites}

    def _masks(self, elements: Elements | None) -> dict[str, Tensor]:
        if elements is None or isinstance(elements, str):
            elements = list(self.sites) if elements is None else [elements]
        masks: dict[str, Any] = dict(elements) if isinstance(elements, Mapping) else dict.fromkeys(elements)
        for site, mask in masks.items():
            if site not in self.sites:
                raise ValueError(f"site {site!r} has no reduced prior; the sites that have are {list(self.sites)}")
            shape = self.delta_f[site].shape
            if mask is None:
                masks[site] = torch.ones_like(self.delta_f[site], dtype=torch.bool)
            elif not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.shape != shape:
                found = f"{mask.dtype} of shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else described(mask)
                raise ValueError(
                    f"the elements of site {site!r} must be a bool tensor of shape {tuple(shape)}, True where the "
                    f"prior is reduced, but got {found}"
                )
            else:
                masks[site] = mask.to(self.delta_f[site].device)
        return masks

    def _joint_of_group(self, masks: Mapping[str, Tensor]) -> Tensor:
        site, mask = next(iter(masks.items()))
        if site not in self._latents.positions and not self.sites[site].correlated:
            return self.delta_f[site][mask].sum()
        if not any(bool(each.any()) for each in masks.values()):
            return self.delta_f[site].new_zeros(())
        return evidence_change(*self._block_diagonal(masks)).to(self.delta_f[site])

    def _block_diagonal(self, masks: Mapping[str, Tensor]) -> tuple[Distribution, Distribution, Distribution]:
        """Return posterior, prior and reduced prior of the vector of these elements, in unconstrained space."""
        parts: list[Any] = []
        for site, mask in masks.items():
            triple, index = self.sites[site], mask.flatten().nonzero().squeeze(-1)
            parts.append([moments(log_space(each, triple.positive), index) for each in triple])
        posteriors, priors, reduced = zip(*parts, strict=True)
        posterior = block_diagonal(list(posteriors))
        if self._latents.correlated is not None:
            index = torch.cat([self._latents.positions[site][mask] for site, mask in masks.items()])
            posterior = block_diagonal([moments(self._latents.correlated, index)])
        return posterior, block_diagonal(list(priors)), block_diagonal(list(reduced))

    def _reduced_marginals(self, sites: list[str]) -> dict[str, Any]:
        """Return each element's reduced posterior where an autoguide correlates ``sites``."""
        vector: Any = reduced_posterior(*self._block_diagonal(self._masks(sites)))
        start, result = 0, {}
        for site in sites:
            delta_f, positive = self.delta_f[site], self.sites[site].positive
            here = slice(start, start := start + delta_f.numel())
            loc, scale = (each[here].reshape(delta_f.shape).to(delta_f) for each in (vector.mean, vector.stddev))
            if isinstance(vector, dist.Delta):
                result[site] = dist.Delta(torch.exp(loc) if positive else loc)
            else:
                result[site] = (dist.LogNormal if positive else dist.Normal)(loc, scale)
        return result


@torch.no_grad()
def reduce(
    guide: Program, model: Program, reduced_priors: Mapping[str, Distribution], *args: Any, **kwargs: Any
) -> Reduction:
    r"""Return what the reduced priors would have made of the evidence, from the fitted guide alone.

    One :math:`\Delta F` for each element of a site: event dimensions that are only declared (``to_event``, plates) are
    taken apart, and a multivariate normal into its marginals; ``Reduction.joint`` puts together. Masks and scales of
    sites are ignored. Nothing is fitted: guide and model run twice, as in a step of inference without its gradients
    and in the mode that they are in, and the global random state is left alone. A guide with methods ``posterior()``
    and ``prior()``, as ``TruncatedLogNormalGuide``, is asked for them, and needs no ``args``.

    Args:
        guide: The fitted guide: one sample statement per site, or one of ``TruncatedLogNormalGuide``, ``AutoNormal``,
            ``AutoDiagonalNormal``, ``AutoMultivariateNormal``, ``AutoLowRankMultivariateNormal``.
        model: The model that it was fitted to.
        reduced_priors: Another prior for each latent site that gets one, of a shape that broadcasts to the site's;
            ``dist.Delta(value)`` fixes it there (the Savage-Dickey density ratio).
        args: What guide and model take.
        kwargs: What guide and model take.

    Raises:
        ValueError: If there is no such latent site, it is observed or missing in the guide, or a shape does not fit.
        NotImplementedError: If there is no closed form, or a site's distribution depends on the draws of others.

    References:
        Post hoc Bayesian model selection (Friston & Penny, 2011)
        https://doi.org/10.1016/j.neuroimage.2011.03.062

    Example:
        >>> import pyro
        >>> model = lambda: pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        >>> guide = lambda: pyro.sample("w", dist.Normal(torch.tensor([0.1, 2.0]), 0.2).to_event(1))
        >>> reduce(guide, model, {"w": dist.Delta(torch.zeros(2))}).delta_f["w"]
        tensor([  1.4844, -48.3906])
    """
    _check_reduced_priors(reduced_priors)
    latents = read_latents(guide, model, reduced_priors, *args, **kwargs)
    sites = {
        site: _fitted(site, latents.posteriors[site], latents.priors[site], to_elements(reduced))
        for site, reduced in reduced_priors.items()
    }
    return Reduction({site: _delta_f(site, triple) for site, triple in sites.items()}, sites, latents)


def _check_reduced_priors(reduced_priors: Any) -> None:
    if not isinstance(reduced_priors, Mapping):
        raise TypeError(f"reduced_priors must map sites to distributions, but got {described(reduced_priors)}")
    for site, prior in reduced_priors.items():
        if not isinstance(prior, Distribution):
            raise TypeError(f"the reduced prior of site {site!r} must be a distribution, but got {described(prior)}")


def _fitted(site: str, posterior: Any, prior: Any, reduced_prior: Any) -> Triple:
    """Return the three broadcast to the site's shape."""
    shape = _shape(prior)
    check_no_point_mass(site, posterior)
    if not _broadcasts(_shape(reduced_prior), shape):
        raise ValueError(
            f"the reduced prior of site {site!r} has shape {tuple(_shape(reduced_prior))}, which does not broadcast to "
            f"the site's {tuple(shape)}; give it that shape"
        )
    if isinstance(reduced_prior, dist.Delta):
        reduced_prior = dist.Delta(reduced_prior.v.expand(shape), event_dim=len(posterior.event_shape))
    return Triple(*(_expand(each, shape) for each in (posterior, prior, reduced_prior)))


def _shape(distribution: Distribution) -> torch.Size:
    return distribution.batch_shape + distribution.event_shape


def _expand(distribution: Distribution, shape: torch.Size) -> Distribution:
    return distribution.expand(shape[: len(shape) - len(distribution.event_shape)])


def _broadcasts(shape: torch.Size, target: torch.Size) -> bool:
    return len(shape) <= len(target) and all(a in (1, b) for a, b in zip(shape[::-1], target[::-1], strict=False))


def _delta_f(site: str, triple: Triple) -> Tensor:
    """Return the evidence change of each element alone."""
    try:
        return evidence_change(*(map(marginals, triple) if triple.correlated else triple))
    except NotImplementedError as error:
        raise NotImplementedError(
            f"site {site!r}: {error}, its first two from posterior_and_prior(guide, model, {site!r}, ...)"
        ) from error


def _declare_event(distribution: Any, event_dim: int) -> Distribution:
    if isinstance(distribution, dist.Delta):
        return dist.Delta(distribution.v, event_dim=event_dim)
    return distribution.to_event(event_dim - len(distribution.event_shape))
