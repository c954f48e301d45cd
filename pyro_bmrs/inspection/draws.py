"""A network under one draw of its noise after the other, batch by batch."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributions import Distribution

from pyro_bmrs.eval_mode import evaluating
from pyro_bmrs.model.network import NoisyNetwork
from pyro_bmrs.structures.inputs import batch_size, first_examples, on_device
from pyro_bmrs.structures.pair import NoisePosterior, sum_of
from pyro_bmrs.svi.data.source import Source
from pyro_bmrs.svi.elbo import ObservedLogProb

__all__ = ["each_draw", "log_prior", "on_host"]


@torch.no_grad()
def each_draw(
    model: NoisyNetwork, thetas: Mapping[str, Tensor], source: Source, device: torch.device
) -> Iterator[tuple[Tensor, Iterator[Distribution]]]:
    """Iterate over batches: observations, and the distribution of them that each draw of the noise gives.

    Args:
        model: The model; it runs in eval mode.
        thetas: Of each noise site draws of shape ``(draws, size)``, and of other latent sites ``(draws, ...)``. Removed
            structures are at 0 whatever they say.
        source: The examples.
        device: Where the model is.
    """
    draws = len(next(iter(thetas.values())))
    with evaluating(model):
        for x, y in source.ordered():
            inputs = on_device(x, device, model.net)
            one_by_one = ({site: theta[i] for site, theta in thetas.items()} for i in range(draws))
            examples = batch_size(inputs)
            yield y.to(device), (model.observed(model.run(inputs, noise), examples) for noise in one_by_one)


@torch.no_grad()
def log_prior(model: NoisyNetwork, guide: NoisePosterior, drawn: Mapping[str, Tensor], source: Source) -> Tensor:
    """Return the log prior density of each draw of every latent site, of shape ``(draws,)``, in float64.

    Other latent sites have the prior that the network gives them, which one example is enough to ask for.
    """
    priors = guide.prior()
    of_noise = sum_of(prior.log_prob(drawn[site]).double().sum(-1) for site, prior in priors.items())
    if drawn.keys() == priors.keys():
        return of_noise
    x = on_device(first_examples(source.first[0], 1), guide.device, model.net)
    of_others = []
    with evaluating(model):
        for i in range(len(of_noise)):
            with ObservedLogProb() as seen:
                model.run(x, {site: values[i] for site, values in drawn.items()})
            of_others.append(torch.as_tensor(seen.of_latents).double())
    return of_noise + torch.stack(of_others)


def on_host(tensor: Tensor) -> "np.ndarray[Any, Any]":
    """Return a tensor as an array."""
    return tensor.detach().cpu().numpy()
