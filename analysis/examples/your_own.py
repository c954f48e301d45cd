"""Bring your own prior, criterion and guide: python -m analysis.examples.your_own."""

from typing import Any

import torch
from pyro.distributions import Gamma
from torch import Tensor, nn

import pyro_bmrs as bmrs

__all__ = ["main"]


class GammaGuide(bmrs.FlatGuide):
    """Gamma noise: torch knows its KL and draws, and the evidence follows from its being an exponential family."""

    prior_types = (Gamma,)

    def __init__(self, model: bmrs.NoisyNetwork) -> None:
        super().__init__(model)
        structures = sum(self.sizes.values())
        self.log_concentration = nn.Parameter(torch.full((structures,), 4.0))  # a mean of 1, with little noise
        self.log_rate = nn.Parameter(torch.full((structures,), 4.0))

    def family(self, index: slice | Tensor = slice(None)) -> Gamma:
        """Return the posterior of the structures at ``index``."""
        return Gamma(self.log_concentration[index].exp(), self.log_rate[index].exp(), validate_args=False)


@bmrs.spike.register(Gamma)
def _spike(prior: Any, scale: float = 1e-3) -> Gamma:
    """Return the reduced prior that BMRS_N compares with: the same shape, of a mean a thousand times smaller."""
    return Gamma(prior.concentration, prior.rate / scale, validate_args=False)


class ProbablySmall(bmrs.Criterion):
    """Remove where the noise is below 0.2 with a probability of at least a half."""

    def scores(self, context: bmrs.PruningContext) -> dict[str, Tensor]:
        """Return a score for each structure: it goes where that is not below 0."""
        posteriors = context.guide.posterior().items()
        return {site: q.cdf(torch.full_like(q.mean, 0.2)) - 0.5 for site, q in posteriors}


def main() -> bmrs.FitResult:
    """Prune a network by these three, and print what evidence and criterion say of its neurons."""
    torch.manual_seed(0)
    x = torch.randn(1000, 12)
    y = (x[:, 0] + x[:, 1].square() > 1).long()
    noise = bmrs.MultiplicativeNoise(40, Gamma(0.2, 0.2))
    model = bmrs.NoisyNetwork(nn.Sequential(nn.Linear(12, 40), nn.Tanh(), noise, nn.Linear(40, 2)), kl_weight=3.0)
    guide = GammaGuide(model)
    result = bmrs.fit(model, guide, (x, y), criterion=ProbablySmall(), epochs=80, lr=5e-3, posterior_lr=0.1, seed=0)
    print(result, "Delta F in nats:", bmrs.evidence_changes(guide)["2.theta"].numpy().round(1), sep="\n")
    return result


if __name__ == "__main__":
    main()
