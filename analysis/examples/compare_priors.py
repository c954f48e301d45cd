"""Compare two priors on the noise: python -m analysis.examples.compare_priors."""

import warnings

import arviz as az
import torch
from torch import nn

import pyro_bmrs as bmrs

__all__ = ["main"]

PRIORS = {
    "theta up to 1": bmrs.LogUniform(-20.0, 0.0),  # the paper's
    "theta up to e": bmrs.LogUniform(-20.0, 1.0),
}


def main() -> dict[str, bmrs.PredictiveEvaluation]:
    """Fit the same network under two priors, and print what each removes and how well it predicts."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1200, 12, generator=generator)
    y = (x[:, 0] + x[:, 1].square() > 1).long()
    train, validation = (x[:1000], y[:1000]), (x[1000:], y[1000:])
    scores, posteriors = {}, {}
    for name, prior in PRIORS.items():
        torch.manual_seed(0)  # the same initial weights
        noise = bmrs.MultiplicativeNoise(40, prior)
        model = bmrs.NoisyNetwork(nn.Sequential(nn.Linear(12, 40), nn.Tanh(), noise, nn.Linear(40, 2)))
        guide = bmrs.TruncatedLogNormalGuide(model)
        result = bmrs.fit(model, guide, train, epochs=60, fine_tune_epochs=0, lr=5e-3, batch_size=50, seed=0)
        scores[name] = bmrs.evaluate(model, guide, validation, draws=200)
        posteriors[name] = bmrs.to_arviz(model, guide, validation, draws=200)
        print(f"\n{name}: {100 * result.compression:.0f} % of the parameters removed\n{scores[name]}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Pareto tails: see column "warning"
        print("\n", az.compare(posteriors), sep="")
    return scores


if __name__ == "__main__":
    main()
