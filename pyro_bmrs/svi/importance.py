"""Importance ratios of draws from the posterior: how near it is to what it approximates, noise given the data."""

from collections.abc import Mapping

import torch
from torch import Tensor

from pyro_bmrs.eval_mode import evaluating
from pyro_bmrs.model.network import NoisyNetwork
from pyro_bmrs.randomness import local_seed
from pyro_bmrs.structures.inputs import batch_size, on_device
from pyro_bmrs.structures.pair import NoisePosterior, sum_of
from pyro_bmrs.svi.data.source import Source

__all__ = ["FEWEST_RATIOS", "log_prior_ratios", "log_ratios"]

FEWEST_RATIOS = 25  # to whose largest a tail can be fitted


@torch.no_grad()
def log_ratios(model: NoisyNetwork, guide: NoisePosterior, data: Source, draws: int = FEWEST_RATIOS) -> Tensor:
    r"""Return :math:`\frac{1}{\lambda} \sum_i \log p(y_i \mid x_i, \theta) + \log p(\theta) - \log q(\theta)`.

    Of shape ``(draws,)``, in float64: the network runs once per draw over all data, in eval mode. Structures that have
    been removed do not count.
    """
    with local_seed(0, [guide.device], validate=False):
        thetas = guide.draw((draws,))
    total = torch.zeros(draws, dtype=torch.float64, device=guide.device)
    with evaluating(model):
        for x, y in data.ordered():
            inputs, observed = on_device(x, guide.device, model.net), y.to(guide.device)
            for i in range(draws):
                output = model.run(inputs, {site: theta[i] for site, theta in thetas.items()})
                total[i] += model.observed(output, batch_size(inputs)).log_prob(observed).double().sum()
    return total / model.kl_weight + log_prior_ratios(guide, thetas)


def log_prior_ratios(guide: NoisePosterior, thetas: Mapping[str, Tensor]) -> Tensor:
    """Return log p(theta) - log q(theta) of draws, ``(draws,)``, summed over the structures that remain."""
    priors, posteriors = guide.prior(), guide.posterior()
    return sum_of(
        (
            (priors[site].log_prob(theta).double() - posteriors[site].log_prob(theta).double()) * guide.noise[site].keep
        ).sum(-1)
        for site, theta in thetas.items()
    )
