"""The variational posterior over all noise: one flat vector of each parameter."""

from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.distributions import TorchDistribution
from pyro.infer.autoguide import AutoGuide
from pyro.nn import PyroModule
from torch import Tensor
from torch.distributions import kl_divergence

from pyro_bmrs.checks import check_integer, described
from pyro_bmrs.model.guides.latents import LatentGuide
from pyro_bmrs.model.handlers import check_not_vectorized, fix_sites
from pyro_bmrs.model.network import NoisyNetwork
from pyro_bmrs.structures.pair import NoisePosterior, check_model
from pyro_bmrs.structures.sampled_weights import sampled_sites

__all__ = ["FlatGuide", "at_least_float32", "check_guide"]


def at_least_float32(tensor: Tensor) -> Tensor:
    """Return a tensor in float32 if it is of less: a posterior needs the digits."""
    return tensor if torch.finfo(tensor.dtype).bits >= 32 else tensor.float()


def check_guide(guide: Any) -> None:
    """Raise ``TypeError`` unless ``guide`` is a ``FlatGuide``."""
    if not isinstance(guide, FlatGuide):
        raise TypeError(f"guide must be a guide such as TruncatedLogNormalGuide(model), but got {described(guide)}")


class _Checked(type(PyroModule)):  # type: ignore[misc]
    """Checks a guide once its subclass has made its parameters."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        guide = super().__call__(*args, **kwargs)
        guide._check_divergences()
        return guide


Listener = Callable[[Mapping[str, Tensor]], None]


class FlatGuide(PyroModule, NoisePosterior, metaclass=_Checked):
    """Mean-field guide of one family for the noise of every structure, whatever the family.

    Parameters are vectors over all structures of all sites, there from construction on. All noise is drawn in one
    operation, and the KL is one call for each type of prior. A subclass names the prior types it is for, adds its
    parameters in ``__init__``, and says in ``family`` what distribution they stand for.

    Args:
        model: The model whose noise layers it is the posterior of.

    Attributes:
        sizes: Number of structures of each site, in the order of the vectors.
        prior_types: Types of prior that the family can be a posterior for.
        parameter_ranges: Ends of the range that ``project_`` keeps a parameter in, by its name.

    Raises:
        TypeError: If ``model`` is no ``NoisyNetwork``, or a noise layer's prior is of another type.
        NotImplementedError: If torch knows no KL from the family to a prior.

    Example:
        >>> from pyro.distributions import Gamma
        >>> class GammaGuide(bmrs.FlatGuide):
        ...     prior_types = (Gamma,)
        ...     def __init__(self, model):
        ...         super().__init__(model)
        ...         self.log_concentration = nn.Parameter(torch.full((sum(self.sizes.values()),), 4.0))
        ...     def family(self, index=slice(None)):
        ...         concentration = self.log_concentration[index].exp()
        ...         return Gamma(concentration, concentration, validate_args=False)
        >>> noise = bmrs.MultiplicativeNoise(8, Gamma(0.2, 0.2))
        >>> model = bmrs.NoisyNetwork(nn.Sequential(nn.Linear(4, 8), nn.Tanh(), noise, nn.Linear(8, 3)))
        >>> GammaGuide(model).mean()["2.theta"].shape
        torch.Size([8])
    """

    prior_types: tuple[type[TorchDistribution], ...] = ()
    parameter_ranges: Mapping[str, tuple[float, float]] = {}

    def __init__(self, model: NoisyNetwork) -> None:
        check_model(model)
        super().__init__(type(self).__name__)
        for site, layer in model.noise.items():
            if not isinstance(layer.prior, self.prior_types):
                names = " or ".join(kind.__name__ for kind in self.prior_types)
                raise TypeError(
                    f"site {site!r} has a {type(layer.prior).__name__} prior, but {type(self).__name__} is for "
                    f"{names} ones; use another guide, or write one with one sample statement per site"
                )
        self._sizes: dict[str, int] = model.sizes
        self._listeners: list[Listener] = []
        self._latents: tuple[LatentGuide, ...] = ()  # a tuple, so that its parameters are not one per structure here
        self._model = (model,)  # a tuple, so that the model's parameters are not this module's too
        self._prior_groups = self._group_priors()
        self._known_weights = tuple(model.kl_weights.values())
        self.register_buffer("_kl_weights", self._expanded_weights(), persistent=False)

    @property
    def model(self) -> NoisyNetwork:
        """The model that it is the posterior of."""
        return self._model[0]

    @property
    def sizes(self) -> dict[str, int]:
        """Number of structures of each site."""
        return self._sizes

    @property
    def latents(self) -> LatentGuide | None:
        """The guide of the model's other latent sites, if it has been given one."""
        return self._latents[0] if self._latents else None

    def add_latents(self, guide: Any) -> "FlatGuide":
        """Take a guide for the other latent sites of the model, and return this one.

        Such sites are weights with a prior (``PyroSample``), or a layer's scale with a hyperprior, or any other
        ``pyro.sample`` statement in the network. ``fit`` trains both guides, at the learning rate of the weights; the
        KL of these sites is estimated by their draws, one per batch, and weighted by ``kl_weight`` as that of the noise
        is. Without noise (while fine-tuning, and in ``predict`` and ``compact``) such a site is at its median, or its
        mean where the guide does not say what that is.

        Args:
            guide: A class of Pyro's autoguides, which is then made of the model without its noise; or a guide that is a
                module, for all other latent sites and no noise.

        Raises:
            TypeError: If it is neither.

        Example:
            >>> import pyro.distributions as dist
            >>> from pyro.infer.autoguide import AutoNormal
            >>> from pyro.nn import PyroModule, PyroSample
            >>> layer = PyroModule[nn.Linear](4, 8)
            >>> layer.weight = PyroSample(dist.Normal(0.0, 1.0).expand([8, 4]).to_event(2))
            >>> model = bmrs.NoisyNetwork(nn.Sequential(layer, nn.Tanh(), bmrs.MultiplicativeNoise(8), nn.Linear(8, 3)))
            >>> guide = bmrs.TruncatedLogNormalGuide(model).add_latents(AutoNormal)
            >>> data = torch.randn(32, 4), torch.arange(32) % 3
            >>> _ = bmrs.fit(model, guide, data, epochs=2, fine_tune_epochs=1, criterion=None, progress=False)
            >>> bmrs.compact(model, guide, None, data[0])[0].weight.shape
            torch.Size([8, 4])
        """
        sites = list(self.sizes)
        if isinstance(guide, type):
            if not issubclass(guide, AutoGuide):
                raise TypeError(f"guide must be an autoguide, for instance AutoNormal, but got {described(guide)}")
            guide = guide(poutine.block(self.model, hide=sites))
        self._latents = (LatentGuide(guide, sites, sampled_sites(self.model.net)),)
        return self

    @property
    def listeners(self) -> list["Listener"]:
        """What is called with the noise of every training step, by site, before the network runs with it."""
        return self._listeners

    @abstractmethod
    def family(self, index: slice | Tensor = slice(None)) -> TorchDistribution:
        """Return the posterior of the structures at ``index`` of the flat vectors, of ``batch_shape`` ``(count,)``."""

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next(self.parameters()).device

    def flat_posterior(self) -> TorchDistribution:
        """Return the posterior over all structures, of ``batch_shape`` ``(structures,)``."""
        return self.family()

    def project_(self) -> None:
        """Bring parameters back, in place, into the range that the family documents; called after every step."""

    def posterior(self) -> dict[str, TorchDistribution]:
        """Return the posterior of each site, of ``batch_shape`` ``(size,)``."""
        start, posteriors = 0, {}
        for site, size in self.sizes.items():
            posteriors[site] = self.family(slice(start, start + size))
            start += size
        return posteriors

    def points(self) -> dict[str, Tensor]:
        return self.mean() if self.latents is None else {**self.mean(), **self.latents.point()}

    def draw_with_log_prob(self, draws: int) -> tuple[dict[str, Tensor], Tensor]:
        thetas, log_q = super().draw_with_log_prob(draws)
        if self.latents is None:
            return thetas, log_q
        others, log_prob = self.latents.draws(draws)
        return {**thetas, **others}, log_q + log_prob

    def _apply(self, *args: Any, **kwargs: Any) -> "FlatGuide":
        for each in self._latents:
            each.module._apply(*args, **kwargs)
        return super()._apply(*args, **kwargs)

    def mean(self) -> dict[str, Tensor]:
        """Return the posterior mean of each site's noise, of shape ``(size,)``."""
        return self.split(self.flat_posterior().mean)

    def draw(self, sample_shape: tuple[int, ...] = ()) -> dict[str, Tensor]:
        """Draw all noise at once: a tensor of shape ``(*sample_shape, size)`` for each site."""
        return self.split(self.flat_posterior().rsample(sample_shape))

    def draw_shared(self, examples: int) -> dict[str, Tensor]:
        """Draw the noise of a batch's examples, of which several may share a draw: ``(examples, size)`` for each site.

        Here every example has a draw of its own; a family that has quantiles can do with fewer.

        Raises:
            TypeError, ValueError: If ``examples`` is no positive integer.
        """
        return self.draw((check_integer("examples", examples, low=1),))

    def draw_and_kl(self, examples: int) -> tuple[dict[str, Tensor], Tensor]:
        """Return ``draw_shared(examples)`` and ``kl()``, for which a family may have a quicker way."""
        return self.draw_shared(examples), self.kl()

    def kl(self) -> Tensor:
        """Return the KL from the prior, summed over the structures that remain, in nats; sites by their weight."""
        counted = self.keep * self._site_weights()
        total = torch.zeros((), device=counted.device)
        for kind, index, prior in self._prior_groups:
            parameters = {name: getattr(self, buffer) for name, buffer in prior.items()}
            selected = slice(None) if index is None else getattr(self, index)
            divergence = kl_divergence(self.family(selected), kind(**parameters, validate_args=False))
            total = total + (divergence * counted[selected]).sum()
        return total

    def select(self, kept: Tensor) -> None:
        """Become the guide of the structures at ``kept`` of the flat vectors, in place, as the noise layers have.

        Parameters stay the same objects. Buffers of a subclass count as one entry per structure if their first
        dimension has that size.
        """
        structures = sum(self.sizes.values())
        for parameter in self.parameters():
            parameter.data = parameter.data[kept]
            parameter.grad = None
        for name, buffer in list(self.named_buffers(recurse=False)):
            if buffer.shape[:1] == (structures,):
                setattr(self, name, buffer[kept])
        self._sizes = self._model[0].sizes
        self._prior_groups = self._group_priors()

    def after_loading(self) -> None:
        sizes = self._model[0].sizes
        found = {len(parameter) for parameter in self.parameters()}
        if found != {sum(sizes.values())}:
            raise ValueError(
                f"the guide in the file is of {sorted(found)} structures, but its model has {sum(sizes.values())}: "
                "load the model first"
            )
        self._sizes = sizes

    def check_priors(self) -> None:
        """Raise ``ValueError`` if the prior of a noise layer is not the one that the guide was made for any more."""
        for i, (kind, members) in enumerate(self._prior_kinds()):
            for name, values in self._prior_parameters(kind, members).items():
                known = self._buffers.get(f"_prior{i}_{name}")
                if known is None or not torch.equal(known, values.to(known)):
                    raise ValueError(
                        f"{name} of the {kind.__name__} prior of {members[0]!r} or a later site has changed since the "
                        f"guide was made: make {type(self).__name__}(model) again"
                    )

    def _site_weights(self) -> Tensor:
        """Return the weight of each structure's KL, as the model has them now."""
        weights = tuple(self._model[0].kl_weights.values())
        if weights != self._known_weights:
            self._known_weights = weights
            with torch.no_grad():
                self._kl_weights.copy_(self._expanded_weights())
        return self._kl_weights

    def _expanded_weights(self) -> Tensor:
        model = self._model[0]
        layers = model.noise.items()
        return torch.cat(
            [torch.full_like(each.keep, model.kl_weights[site], dtype=torch.float32) for site, each in layers]
        )

    def _check_divergences(self) -> None:
        """Raise unless torch knows the KL from the family to each prior."""
        with torch.no_grad():
            try:
                self.kl()
            except NotImplementedError as error:
                kinds = ", ".join(kind.__name__ for kind, _, _ in self._prior_groups)
                raise NotImplementedError(
                    f"no KL is known from {type(self.family()).__name__} to {kinds}: register one with "
                    "@torch.distributions.kl.register_kl"
                ) from error

    def _group_priors(self) -> list[tuple[type[TorchDistribution], str | None, dict[str, str]]]:
        """Store the priors' parameters as one buffer for each type of prior, and return how to find them."""
        kinds = self._prior_kinds()
        site_of = [site for site, size in self.sizes.items() for _ in range(size)]
        groups = []
        for i, (kind, members) in enumerate(kinds):
            names = {name: f"_prior{i}_{name}" for name in kind.arg_constraints}
            for name, values in self._prior_parameters(kind, members).items():
                self.register_buffer(names[name], values, persistent=False)
            index = None
            if len(kinds) > 1:
                index = f"_prior{i}_index"
                of_kind = torch.tensor([site in members for site in site_of])
                self.register_buffer(index, of_kind.nonzero().squeeze(1).to(self.keep.device), persistent=False)
            groups.append((kind, index, names))
        return groups

    def _prior_kinds(self) -> list[tuple[type[TorchDistribution], list[str]]]:
        """Return each type of prior with the sites that have it."""
        kinds: dict[type[TorchDistribution], list[str]] = {}
        for site, prior in self.prior().items():
            kinds.setdefault(type(prior), []).append(site)
        return list(kinds.items())

    def _prior_parameters(self, kind: type[TorchDistribution], members: list[str]) -> dict[str, Tensor]:
        """Return the parameters of the priors of all sites of one kind, each as one vector."""
        priors = self.prior()
        return {name: torch.cat([getattr(priors[site], name) for site in members]) for name in kind.arg_constraints}

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Make one sample site for each noise layer of the model, and run the guide of other latent sites.

        Takes the model's arguments, and uses them only for the latter.
        """
        check_not_vectorized()
        model = self._model[0]
        layers, values = model.noise, self.draw()
        with fix_sites(values), poutine.scale(scale=model.kl_weight):
            for site, posterior in self.posterior().items():
                with poutine.scale(scale=model.kl_weights[site]):
                    pyro.sample(site, layers[site].site_distribution(posterior))
        for each in self._latents:
            with poutine.scale(scale=model.kl_weight):
                values = {**values, **each.draw(*args, **kwargs).values}
        return values
