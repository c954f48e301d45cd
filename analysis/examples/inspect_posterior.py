"""Look at a posterior: python -m analysis.examples.inspect_posterior (writes four pictures)."""

import arviz as az
import matplotlib.pyplot as plt
import torch
from torch import nn

import pyro_bmrs as bmrs

__all__ = ["main"]


def main(folder: str = ".") -> bmrs.PredictiveEvaluation:
    """Fit a small network, and ask its posterior what ArviZ and the evidence have to say; return its scores."""
    torch.manual_seed(0)
    x = torch.randn(1200, 12)  # of which two matter
    y = (x[:, 0] + x[:, 1].square() > 1).long()
    train, validation = (x[:1000], y[:1000]), (x[1000:], y[1000:])
    net = nn.Sequential(
        nn.Linear(12, 40), nn.Tanh(), bmrs.MultiplicativeNoise(40),
        nn.Linear(40, 20), nn.Tanh(), bmrs.MultiplicativeNoise(20), nn.Linear(20, 2),
    )  # fmt: skip
    model = bmrs.NoisyNetwork(net)
    guide = bmrs.TruncatedLogNormalGuide(model)
    bmrs.fit(model, guide, train, epochs=60, fine_tune_epochs=0, lr=5e-3, batch_size=50, seed=0)

    data = bmrs.to_arviz(model, guide, validation, draws=200)
    print(az.summary(data, var_names=["5.theta"], kind="stats").head())
    print("Delta F of layer 5, in nats:", data.constant_data["5.theta.delta_f_BMRS_N"].values.round(2))
    print("kept:", int(data.constant_data["5.theta.kept"].sum()), "of", data.constant_data["5.theta.kept"].size)
    print(f"expected log predictive density: {az.waic(data).elpd_waic:.1f} nats")

    scores = bmrs.evaluate(model, guide, validation, draws=200)
    print(scores)
    pictures = {
        "ridge": lambda: bmrs.plot_ridge(guide, "5.theta"),
        "network": lambda: bmrs.plot_network(bmrs.evidence_changes(guide), model.masks),
        "forest": lambda: bmrs.plot_forest(guide),
        "reliability": lambda: bmrs.plot_reliability(scores.over_draws),
    }
    for name, draw in pictures.items():
        draw()
        plt.savefig(f"{folder}/{name}.png", dpi=120)
    plt.close("all")
    return scores


if __name__ == "__main__":
    main()
