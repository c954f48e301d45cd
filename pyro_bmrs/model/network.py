"""The Pyro model around a network: its noise sites, and the site of the observations."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions import TorchDistribution
from pyro.nn import PyroModule
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils._pytree import tree_leaves

from pyro_bmrs.checks import check_integer, check_module, check_number, described
from pyro_bmrs.eval_mode import evaluating
from pyro_bmrs.model.handlers import check_not_vectorized, fix_sites
from pyro_bmrs.model.noise import MultiplicativeNoise, noise_layers
from pyro_bmrs.model.supply import supply_noise
from pyro_bmrs.structures.copying import no_fast_path
from pyro_bmrs.structures.inputs import Inputs, batch_size, call
from pyro_bmrs.structures.pair import NoisyModel
from pyro_bmrs.structures.points import Attachment

__all__ = ["Likelihood", "NoisyNetwork", "categorical"]

_NO_LABEL = -(2**62)  # cross_entropy leaves out one label: by default -100, which is a mistake like any other here

Likelihood = Callable[[Any], TorchDistribution]


def categorical(logits: Tensor) -> TorchDistribution:
    """Return the likelihood of class labels: ``Categorical(logits=logits)``.

    Raises:
        TypeError: If the network's output is no tensor.
    """
    if not isinstance(logits, Tensor):
        raise TypeError(
            f"the network returns {described(logits)}, but the default likelihood takes one tensor of logits: pass "
            "likelihood=lambda out: Categorical(logits=out[0]), or what names the logits in your output"
        )
    return dist.Categorical(logits=logits)


class NoisyNetwork(PyroModule, NoisyModel):
    r"""A network as a probabilistic program.

    .. math:: p(y, \theta \mid x) = \prod_i p(y_i \mid f(x_i; w, \theta)) \, p(\theta)^{\lambda}

    Its latent sites are the network's noise layers (``"<layer>.theta"``); the weights :math:`w` are point estimates.
    It is an ordinary Pyro model: trace it, give it to ``SVI`` or ``Predictive``, write a guide of your own for it. A
    guide of your own needs ``poutine.scale(scale=model.kl_weight)`` around its sites if ``kl_weight`` is not 1, since
    Pyro's mean-field ELBO scales the KL by the guide's scale.

    Args:
        net: Network with noise: from ``attach_noise``, or with a ``MultiplicativeNoise`` inside; used, not copied.
        likelihood: From the network's output to the distribution of the observations, of ``batch_shape``
            ``(batch,)``; ``Categorical(logits=...)`` by default. A module's parameters are learned too.
        num_data: Size :math:`N` of the data set, by which a batch's likelihood is scaled up; None takes each
            batch for the whole data set. ``fit`` puts the number of its training examples in the place of None while
            it runs.
        kl_weight: :math:`\lambda` > 0, the weight of the KL; 1 is Bayes, more removes more. Or one for each site.

    Attributes:
        kl_weight: That number; 1 where each site has its own. It can be set later, to one number or to one per site.
        kl_weights: Weight of each site's KL on top of it, by site: the one place where it is kept.
        sizes: Number of structures of each site.
        fitted: Whether a fit has changed it.
        fine_tuned: Whether the last thing that a fit did was to train the weights with every noise at a fixed value.

    Raises:
        TypeError: If ``net``, ``likelihood``, ``num_data`` or ``kl_weight`` is something else.
        ValueError: If the network has no noise layers, ``num_data`` or ``kl_weight`` is not positive, or (when
            called) the likelihood is not one distribution per example.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), bmrs.MultiplicativeNoise(8), nn.Linear(8, 3))
        >>> model = bmrs.NoisyNetwork(net, num_data=100)
        >>> trace = poutine.trace(model).get_trace(torch.randn(5, 4), torch.tensor([0, 1, 2, 0, 1]))
        >>> trace.nodes["2.theta"]["value"].shape
        torch.Size([8])
    """

    def __init__(
        self,
        net: nn.Module,
        likelihood: Likelihood | None = None,
        num_data: int | None = None,
        kl_weight: float | Mapping[str, float] = 1.0,
    ) -> None:
        super().__init__()
        check_module("net", net)
        layers = noise_layers(net)
        if not layers:
            raise ValueError(
                "the network has no noise: attach it with pyro_bmrs.attach_noise(net, pyro_bmrs.find_structures(net, "
                "x)), or put a pyro_bmrs.MultiplicativeNoise(size) behind each activation whose neurons or filters may "
                "be removed"
            )
        if num_data is not None:
            check_integer("num_data", num_data, low=1, what="the number of training examples")
        _check_likelihood(likelihood)
        self._overall, self.kl_weights = _checked_weights(kl_weight, list(layers))
        for site, layer in layers.items():
            layer.belong(site, self.kl_weights)
        self.net = net
        self._noise = layers
        own = net.net if isinstance(net, Attachment) else net
        self._frozen = [module for module in own.modules() if not module.training] if own.training else []
        self.likelihood = categorical if likelihood is None else likelihood
        self.num_data = num_data
        self.fitted = self.fine_tuned = False
        self._element_shapes: dict[tuple[torch.Size, ...], dict[str, tuple[int, ...]]] = {}

    @property
    def kl_weight(self) -> float:
        """The weight of the KL of all sites."""
        return self._overall

    @kl_weight.setter
    def kl_weight(self, value: float | Mapping[str, float]) -> None:
        self._overall, by_site = _checked_weights(value, list(self.kl_weights))
        if isinstance(value, Mapping):
            self.kl_weights.update(by_site)

    @contextmanager
    def counting(self, examples: int) -> Iterator[None]:
        """Count ``examples`` as the size of the data set inside, if ``num_data`` is None."""
        own, self.num_data = self.num_data, examples if self.num_data is None else self.num_data
        try:
            yield
        finally:
            self.num_data = own

    def note_fit(self, fine_tuned: bool) -> None:
        """Note that a fit has changed the model, and whether it trained the weights alone in the end."""
        self.fitted, self.fine_tuned = True, fine_tuned

    def train(self, mode: bool = True) -> "NoisyNetwork":
        """Set train or eval mode; modules that were in eval mode in a network in train mode at first stay so."""
        super().train(mode)
        for module in self._frozen:
            module.train(False)
        return self

    @property
    def noise(self) -> dict[str, MultiplicativeNoise]:
        """The noise layers by site name."""
        return self._noise

    @property
    def sizes(self) -> dict[str, int]:
        """Number of structures of each site."""
        return {site: layer.size for site, layer in self.noise.items()}

    @property
    def masks(self) -> dict[str, Tensor]:
        """Which structures remain: a bool tensor of shape ``(size,)`` for each site, True = keep."""
        return {site: layer.keep.clone() for site, layer in self.noise.items()}

    def forward(self, x: Inputs, y: Tensor | None = None) -> Any:
        """Run the program.

        Args:
            x: Inputs: a tensor of shape ``(batch, ...)``, a tuple of positional inputs or a mapping of named ones.
            y: Observations, of shape ``(batch, ...)``; None samples them from the likelihood.

        Returns:
            The network's output, of shape ``(batch, ...)``.
        """
        check_not_vectorized()
        with poutine.scale(scale=self.kl_weight):
            draws = {site: layer.sample(site, self.kl_weights[site]) for site, layer in self.noise.items()}
            output = self.run(x, draws)
        batch = batch_size(x)
        observed = self.observed(output, batch)
        if y is not None:
            _check_shape(y, observed)
        with pyro.plate("data", batch), poutine.scale(scale=self._multiplicity(batch)):
            pyro.sample("obs", observed, obs=y)
        return output

    def run(self, x: Inputs, noise: Mapping[str, Tensor], masked: bool = True) -> Any:
        """Run the network with the given noise: the one place where it is called.

        Args:
            x: Inputs: a tensor of shape ``(batch, ...)``, a tuple of positional inputs or a mapping of named ones.
            noise: For each noise site a tensor of shape ``(*leading, size)``; other latent sites may have values too.
            masked: Whether structures that have been removed are to be at 0 whatever the noise.
        """
        others = {site: value for site, value in noise.items() if site not in self._noise}
        with supply_noise(self.noise, noise, masked), no_fast_path():
            if not others:
                return call(self.net, x)
            with fix_sites(others):
                return call(self.net, x)

    def log_likelihood(self, x: Inputs, y: Tensor, noise: Mapping[str, Tensor]) -> Tensor:
        r"""Return :math:`\frac{N}{B} \sum_i \log p(y_i \mid x_i, \theta)`, of shape ``()``, without a site for it.

        What the program scores at its observations with the given noise, as ``run`` takes it.
        """
        output = self.run(x, noise)
        batch = batch_size(x)
        if self.likelihood is categorical and isinstance(output, Tensor) and output.dim() == 2 and y.dim() == 1:
            # One operation in the place of several, each way.
            total = -cross_entropy(output, y.long(), reduction="sum", ignore_index=_NO_LABEL)
        else:
            observed = self.observed(output, batch)
            _check_shape(y, observed)
            total = observed.log_prob(y).sum()
        return self._multiplicity(batch) * total

    def observed(self, output: Any, batch: int) -> TorchDistribution:
        """Return the distribution of the observations."""
        observed = self.likelihood(output)
        if not isinstance(observed, torch.distributions.Distribution):
            raise TypeError(
                f"likelihood must return the distribution of the observations, but returned {described(observed)}: for "
                "instance lambda out: pyro.distributions.Normal(out.squeeze(-1), 0.1)"
            )
        if observed.batch_shape != (batch,):
            raise ValueError(
                f"the likelihood must be one distribution per example, of batch_shape ({batch},), but it is a "
                f"{type(observed).__name__} of batch_shape {tuple(observed.batch_shape)}; squeeze the output, or move "
                "the other dimensions into the event with .to_event(k)"
            )
        return observed

    def _multiplicity(self, batch: int) -> float:
        """Return how many examples of the data set one of the batch stands for."""
        return 1.0 if self.num_data is None else self.num_data / batch

    def element_shapes(self, x: Inputs) -> dict[str, tuple[int, ...]]:
        """Return, for each site, the shape of what it multiplies with the structures last and left out.

        Where noise from outside multiplies the inputs of several layers, it is the largest of these. Found by one pass
        for each shape of the inputs.
        """
        key = tuple(each.shape for each in tree_leaves(x) if isinstance(each, Tensor))
        if key not in self._element_shapes:
            self._element_shapes[key] = _element_shapes(self, x)
        return self._element_shapes[key]


def _checked_weights(kl_weight: Any, sites: Sequence[str]) -> tuple[float, dict[str, float]]:
    """Return the weight of all sites, and that of each."""
    if not isinstance(kl_weight, Mapping):
        return check_number("kl_weight", kl_weight), dict.fromkeys(sites, 1.0)
    if kl_weight.keys() != set(sites):
        raise ValueError(f"kl_weight must have a number for each of the sites {sites}, but names {list(kl_weight)}")
    return 1.0, {site: check_number(f"kl_weight of site {site!r}", kl_weight[site]) for site in sites}


def _check_shape(y: Tensor, observed: TorchDistribution) -> None:
    """Raise ``ValueError`` where observations would be broadcast against their distribution."""
    if y.shape != (wanted := observed.batch_shape + observed.event_shape):
        raise ValueError(
            f"the observations are of shape {tuple(y.shape)}, but the likelihood, a {type(observed).__name__}, is of "
            f"shape {tuple(wanted)}: reshape one of them"
        )


def _check_likelihood(likelihood: Any) -> None:
    wanted = "likelihood must map the network's output to the distribution of the observations, but got "
    if isinstance(likelihood, nn.modules.loss._Loss):
        raise TypeError(f"{wanted}the loss {type(likelihood).__name__}; leave it out for class labels")
    if isinstance(likelihood, torch.distributions.Distribution | type) or not (
        likelihood is None or callable(likelihood)
    ):
        raise TypeError(f"{wanted}{described(likelihood)}; write for instance lambda out: Categorical(logits=out)")


def _element_shapes(model: NoisyNetwork, x: Inputs) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}

    def record(site: str, shape: tuple[int, ...]) -> None:
        shapes[site] = max(shape, shapes.get(site, ()), key=math.prod)

    zeros = {site: torch.zeros(size, device=model.noise[site].keep.device) for site, size in model.sizes.items()}
    with evaluating(model), torch.no_grad(), ExitStack() as watching:
        for layer in model.noise.values():
            watching.enter_context(layer.watched(record))
        model.run(x, zeros)
    return shapes
