"""The objective: the evidence lower bound of a mean-field posterior, with nothing computed to be thrown away."""

from typing import Any, Literal, get_args

import torch
from pyro.distributions.util import scale_and_mask
from pyro.infer import TraceMeanField_ELBO
from pyro.nn import PyroModule
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyro_bmrs.checks import check_integer
from pyro_bmrs.model.guides.flat import FlatGuide
from pyro_bmrs.model.network import NoisyNetwork
from pyro_bmrs.structures.inputs import batch_size
from pyro_bmrs.structures.pair import check_pair

__all__ = ["Granularity", "MeanFieldELBO", "ObservedLogProb", "check_lean"]

Granularity = Literal["shared", "example", "batch", "element"]


class MeanFieldELBO(TraceMeanField_ELBO):
    r"""Negative evidence lower bound with the KL in closed form (eq. 3 of the paper).

    .. math:: \mathcal{L} = \lambda\, KL(q(\theta) \| p(\theta)) - \frac{N}{B} \sum_i E_q[\log p(y_i \mid x_i, \theta)]

    Loss and gradients are those of Pyro's ``TraceMeanField_ELBO``. With a ``NoisyNetwork`` and its ``FlatGuide`` they
    come from one draw and one KL for all sites; any other pair takes Pyro's own path, and so does a subclass of these
    that has a ``forward`` of its own. Use it with ``pyro.infer.SVI``, or as
    a module: ``elbo = MeanFieldELBO()(model, guide); elbo(x, y).backward()``.

    Args:
        granularity: How often noise is drawn. ``"shared"``: a few draws per batch, stratified, which examples share
            (``draw_shared`` of the guide). ``"example"``: every example has its own. Both leave the objective as it is,
            and make its gradient far less noisy than ``"batch"``: one draw per batch, Pyro's plain meaning.
            ``"element"``: one for every element of a layer's input (each position of a feature map), the paper's
            reference code. On Pyro's own path noise is drawn once per batch.
        num_particles: Number of draws averaged.

    Raises:
        ValueError: If ``granularity`` is none of the four.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), bmrs.MultiplicativeNoise(8), nn.Linear(8, 3))
        >>> model = bmrs.NoisyNetwork(net, num_data=100)
        >>> elbo = bmrs.MeanFieldELBO()(model, bmrs.TruncatedLogNormalGuide(model))
        >>> elbo(torch.randn(5, 4), torch.tensor([0, 1, 2, 0, 1])).shape
        torch.Size([])
    """

    def __init__(self, granularity: Granularity = "shared", num_particles: int = 1) -> None:
        super().__init__(num_particles=check_integer("num_particles", num_particles, low=1, high=10**6))
        if granularity not in get_args(Granularity):
            raise ValueError(f'granularity must be "shared", "example", "batch" or "element", but got {granularity!r}')
        self.granularity = granularity

    def differentiable_loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Return the loss as a tensor of shape ``()`` to call ``backward`` on."""
        if not is_lean(model, guide):
            return super().differentiable_loss(model, guide, *args, **kwargs)
        kl, log_likelihood = self.terms(model, guide, *args, **kwargs)
        return model.kl_weight * kl - log_likelihood

    def terms(self, model: NoisyNetwork, guide: FlatGuide, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Return the unweighted KL and the expected log likelihood of the whole data set, each of shape ``()``.

        Raises:
            TypeError, ValueError: If the guide is not that of the model.
        """
        check_pair(model, guide)
        if self.granularity == "shared":
            draws, kl = guide.draw_and_kl(batch_size(args[0] if args else kwargs["x"]))
        else:
            draws, kl = self._draw(model, guide, *args, **kwargs), guide.kl()
        for listen in guide.listeners:
            listen(draws)
        first, kl_of_others = self._one_draw(draws, model, guide, *args, **kwargs)
        if self.num_particles == 1:
            return kl + kl_of_others, first
        more = [self._draw(model, guide, *args, **kwargs) for _ in range(self.num_particles - 1)]
        each = [(first, kl_of_others), *(self._one_draw(draws, model, guide, *args, **kwargs) for draws in more)]
        log_likelihoods, kls = zip(*each, strict=True)
        return kl + sum(kls) / self.num_particles, torch.stack(log_likelihoods).mean()

    def loss_and_grads(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> float:
        """Accumulate gradients and return the loss; this is what ``SVI.step`` calls."""
        if not is_lean(model, guide):
            return super().loss_and_grads(model, guide, *args, **kwargs)
        _declare_parameters(model)
        _declare_parameters(guide)
        loss = self.differentiable_loss(model, guide, *args, **kwargs)
        loss.backward()
        return loss.item()

    def loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> float:
        """Return the loss without gradients."""
        if not is_lean(model, guide):
            return super().loss(model, guide, *args, **kwargs)
        with torch.no_grad():
            return self.differentiable_loss(model, guide, *args, **kwargs).item()

    def _one_draw(
        self, draws: dict[str, Tensor], model: NoisyNetwork, guide: FlatGuide, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Any]:
        """Return the log likelihood under a draw of the noise, and log(q / p) of one of the other latent sites."""
        others = None if guide.latents is None else guide.latents.draw(*args, **kwargs)
        noise = draws if others is None else {**draws, **others.values}
        with ObservedLogProb() as observed:
            log_likelihood = model.log_likelihood(*args, **{**kwargs, "noise": noise})
        return log_likelihood + observed.total, 0.0 if others is None else others.log_prob - observed.of_latents

    def _draw(self, model: NoisyNetwork, guide: FlatGuide, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        if self.granularity == "batch":
            return guide.draw()
        x = args[0] if args else kwargs["x"]
        if self.granularity == "shared":
            return guide.draw_shared(batch_size(x))
        if self.granularity == "example":
            return guide.draw((batch_size(x),))
        shapes = model.element_shapes(x)
        return {site: q.rsample(shapes[site]) for site, q in guide.posterior().items()}


def is_lean(model: Any, guide: Any) -> bool:
    """Return whether model and guide are programs that the library knows, so that it need not run them by Pyro."""
    return (
        isinstance(model, NoisyNetwork)
        and isinstance(guide, FlatGuide)
        and not (own_programs(model, NoisyNetwork) or own_programs(guide, FlatGuide))
    )


def own_programs(module: PyroModule, base: type[PyroModule]) -> list[str]:
    """Return what of a subclass's, or an instance's, own changes the program that ``base`` is."""
    changing = ("forward", "__call__", "log_likelihood")
    methods = [name for name in changing if getattr(type(module), name, None) is not getattr(base, name, None)]
    set_later = [name for name in ("forward", "log_likelihood") if name in vars(module)]
    hooks = ["forward hooks"] if module._forward_hooks or module._forward_pre_hooks else []
    return [*methods, *set_later, *hooks]


def check_lean(model: NoisyNetwork, guide: FlatGuide) -> None:
    """Raise ``TypeError`` if model or guide is a program of its user's own, which only Pyro can run."""
    for name, module, base in (("model", model, NoisyNetwork), ("guide", guide, FlatGuide)):
        if own := own_programs(module, base):
            raise TypeError(
                f"the {name} is a {type(module).__name__} with {', '.join(own)} of its own, which fit does not run: "
                "put what it adds into the network or the likelihood, or train with pyro.infer.SVI and MeanFieldELBO()"
            )


class ObservedLogProb(Messenger):
    """Sum the log probabilities of what else is observed, and refuse latent sites that the guide does not know.

    Attributes:
        total: Of what is observed.
        of_latents: Of other latent sites, whose values have been given.
    """

    def __enter__(self) -> "ObservedLogProb":
        self.total: Any = 0.0
        self.of_latents: Any = 0.0
        return super().__enter__()

    def _pyro_sample(self, msg: Any) -> None:
        if not (msg["is_observed"] or msg["done"] or site_is_subsample(msg)):
            raise ValueError(
                f"the model has a latent site {msg['name']!r} that is not a noise layer of this guide's; add a guide "
                "for it, guide.add_latents(AutoNormal)"
            )

    def _pyro_post_sample(self, msg: Any) -> None:
        if site_is_subsample(msg):
            return
        log_prob = scale_and_mask(msg["fn"].log_prob(msg["value"]), msg["scale"], msg["mask"]).sum()
        if msg["is_observed"]:
            self.total = self.total + log_prob
        else:
            self.of_latents = self.of_latents + log_prob


def _declare_parameters(module: PyroModule) -> None:
    """Read every parameter where Pyro can see it, which is how ``SVI`` finds what to optimise."""
    with module._pyro_context:
        for name in (*module._parameters, *module._modules):
            getattr(module, name)
