"""What a training step minimises: one module for each phase of a fit, from a batch to a scalar."""

from collections.abc import Mapping

from torch import Tensor, nn

from pyro_bmrs.model.guides.flat import FlatGuide
from pyro_bmrs.model.network import NoisyNetwork
from pyro_bmrs.structures.inputs import Inputs
from pyro_bmrs.svi.elbo import MeanFieldELBO, ObservedLogProb

__all__ = ["FixedNoiseObjective", "NoisyObjective"]


class NoisyObjective(nn.Module):
    r"""The negative ELBO of a batch, in nats per example: :math:`(\lambda\, KL - \frac{N}{B} \sum_i \log p_i) / N`.

    A module whose parameters are all that a step trains, weights and posterior, and whose forward is all that it
    computes: this is what is wrapped for several devices, compiled, captured or mapped over seeds.

    Args:
        model: The model.
        guide: Its guide.
        elbo: How noise is drawn.
    """

    def __init__(self, model: NoisyNetwork, guide: FlatGuide, elbo: MeanFieldELBO) -> None:
        super().__init__()
        self.model, self.guide, self.elbo = model, guide, elbo
        self.latents = None if guide.latents is None else guide.latents.module  # whose parameters are trained too

    def forward(self, x: Inputs, y: Tensor, kl_weight: Tensor | float, batch_weight: float = 1.0) -> Tensor:
        r"""Return the loss of a batch, of shape ``()``.

        Args:
            x: Inputs, of shape ``(batch, ...)``, or a tuple or dictionary of such.
            y: Observations, of shape ``(batch, ...)``.
            kl_weight: :math:`\lambda` of this step.
            batch_weight: Size of this batch over the mean size of those whose losses will be averaged with it.
        """
        kl, log_likelihood = self.elbo.terms(self.model, self.guide, x, y)
        return (kl_weight * kl - batch_weight * log_likelihood) / (self.model.num_data or len(y))


class FixedNoiseObjective(nn.Module):
    r"""The negative log likelihood of a batch, in nats per example, with every :math:`\theta` at a fixed value.

    Args:
        model: The model; its parameters are all that is trained.
        values: For each noise site a tensor of shape ``(size,)``, and a value of each other latent site.
    """

    def __init__(self, model: NoisyNetwork, values: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.model = model
        self.sites = list(values)
        for i, value in enumerate(values.values()):
            self.register_buffer(f"theta{i}", value.detach().clone(), persistent=False)

    def forward(self, x: Inputs, y: Tensor, kl_weight: Tensor | float, batch_weight: float = 1.0) -> Tensor:
        """Return the loss of a batch, of shape ``()``; ``kl_weight`` has nothing to weigh."""
        values = {site: self.get_buffer(f"theta{i}") for i, site in enumerate(self.sites)}
        with ObservedLogProb() as observed:
            log_prob = self.model.likelihood(self.model.run(x, values)).log_prob(y).mean()
        return -batch_weight * log_prob - observed.total / (self.model.num_data or len(y))
