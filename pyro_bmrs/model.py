"""The Pyro model around a network: its noise sites, and the site of the observations."""

from collections.abc import Callable, Mapping

import pyro
import pyro.distributions as dist
from pyro import poutine
from pyro.distributions import TorchDistribution
from pyro.nn import PyroModule
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from pyro_bmrs.noise import MultiplicativeNoise, noise_layers

__all__ = ["Likelihood", "NoisyNetwork", "categorical"]

_NO_LABEL = -(2**62)  # cross_entropy leaves out one label: by default -100, which is a mistake like any other here

Likelihood = Callable[[Tensor], TorchDistribution]


def categorical(logits: Tensor) -> TorchDistribution:
    """Return the likelihood of class labels: ``Categorical(logits=logits)``."""
    return dist.Categorical(logits=logits)


class NoisyNetwork(PyroModule):
    r"""A network as a probabilistic program.

    .. math:: p(y, \theta \mid x) = \prod_i p(y_i \mid f(x_i; w, \theta)) \, p(\theta)^{\lambda}

    Its latent sites are the network's noise layers (``"<layer>.theta"``); the weights :math:`w` are point estimates.
    It is an ordinary Pyro model: trace it, give it to ``SVI`` or ``Predictive``, write a guide of your own for it. A
    guide of your own needs ``poutine.scale(scale=model.kl_weight)`` around its sites if ``kl_weight`` is not 1, since
    Pyro's mean-field ELBO scales the KL by the guide's scale.

    Args:
        net: Network with at least one ``MultiplicativeNoise``; it is used, not copied.
        likelihood: From the network's output to the distribution of the observations, of ``batch_shape``
            ``(batch,)``; ``Categorical(logits=...)`` by default. A module's parameters are learned too.
        num_data: Size :math:`N` of the data set, by which a batch's likelihood is scaled up; None takes each
            batch for the whole data set (``fit`` fills it in).
        kl_weight: :math:`\lambda` > 0, the weight of the KL; 1 is Bayes, more removes more. Or one for each site.

    Attributes:
        kl_weight: That number; 1 where each site has its own, which its layer then holds.
        sizes: Number of structures of each site.

    Raises:
        ValueError: If the network has no noise layers, ``num_data`` or ``kl_weight`` is not positive, or (when
            called) the likelihood is not one distribution an example.

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
        layers = noise_layers(net)
        if not layers:
            raise ValueError(
                "the network has no structures to prune: put a pyro_bmrs.MultiplicativeNoise(size) after each "
                "activation whose neurons or filters may go"
            )
        if num_data is not None and num_data < 1:
            raise ValueError(f"num_data must be the number of training examples, but got {num_data}")
        by_site = kl_weight if isinstance(kl_weight, Mapping) else dict.fromkeys(layers, 1.0)
        overall = 1.0 if isinstance(kl_weight, Mapping) else kl_weight
        if not (by_site.keys() == layers.keys() and overall > 0 and all(weight > 0 for weight in by_site.values())):
            raise ValueError(
                f"kl_weight must be positive, or be so for each of the sites {list(layers)}, but got {kl_weight}; 1 is "
                "the exact ELBO"
            )
        for site, layer in layers.items():
            layer.site = site
            layer.kl_weight = by_site[site]
        self.net = net
        self._noise = layers
        self.likelihood = categorical if likelihood is None else likelihood
        self.num_data = num_data
        self.kl_weight = overall

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

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """Run the program.

        Args:
            x: Inputs, of shape ``(batch, ...)``.
            y: Observations, of shape ``(batch, ...)``; None samples them from the likelihood.

        Returns:
            The network's output, of shape ``(batch, ...)``.
        """
        with poutine.scale(scale=self.kl_weight):
            output = self.net(x)
        observed = self._observed(output)
        with pyro.plate("data", len(output)), poutine.scale(scale=self._multiplicity(output)):
            pyro.sample("obs", observed, obs=y)
        return output

    def log_likelihood(self, x: Tensor, y: Tensor) -> Tensor:
        r"""Return :math:`\frac{N}{B} \sum_i \log p(y_i \mid x_i, \theta)`, of shape ``()``, without a site for it.

        What the program scores at its observations; the noise layers make their sites, or are supplied with noise.
        """
        output = self.net(x)
        if self.likelihood is categorical and output.dim() == 2:
            # One operation in the place of several, each way.
            total = -cross_entropy(output, y.long(), reduction="sum", ignore_index=_NO_LABEL)
        else:
            total = self._observed(output).log_prob(y).sum()
        return self._multiplicity(output) * total

    def _observed(self, output: Tensor) -> TorchDistribution:
        """Return the distribution of the observations."""
        observed, batch = self.likelihood(output), len(output)
        if observed.batch_shape != (batch,):
            raise ValueError(
                f"the likelihood must be one distribution an example, of batch_shape ({batch},), but it is a "
                f"{type(observed).__name__} of batch_shape {tuple(observed.batch_shape)}; squeeze the output, or move "
                "the other dimensions into the event with .to_event(k)"
            )
        return observed

    def _multiplicity(self, output: Tensor) -> float:
        """Return how many examples of the data set one of the batch stands for."""
        return 1.0 if self.num_data is None else self.num_data / len(output)
