"""Noise placed by hand: python -m analysis.examples.noise_by_hand."""

import torch
from torch import nn

import pyro_bmrs as bmrs

__all__ = ["main"]


def main(folder: str = ".") -> nn.Module:
    """Prune a network whose noise stands where its author put it, save the smaller one and return it."""
    torch.manual_seed(0)
    x = torch.randn(2000, 20)  # 18 of these features do not matter
    y = (x[:, 0] * x[:, 1] > 0).long()
    train, validation = (x[:1600], y[:1600]), (x[1600:], y[1600:])
    net = nn.Sequential(
        nn.Linear(20, 64),
        nn.ReLU(),
        bmrs.MultiplicativeNoise(64),  # behind the activation: one factor per neuron
        nn.Linear(64, 64),
        nn.ReLU(),
        bmrs.MultiplicativeNoise(64),
        nn.Linear(64, 2),
    )
    model = bmrs.NoisyNetwork(net)  # a Pyro model: one sample site per noise layer
    guide = bmrs.TruncatedLogNormalGuide(model)  # the posterior over all noise
    result = bmrs.fit(model, guide, train, validation, epochs=60, fine_tune_epochs=20, lr=5e-3, batch_size=64, seed=0)
    small = bmrs.compact(model, guide, result.masks, x[:8]).cpu()  # a plain nn.Sequential with smaller layers
    print(small)
    print(f"{100 * result.compression:.0f} % of the parameters removed")
    print(f"accuracy {(small(x[1600:]).argmax(1) == y[1600:]).float().mean():.3f}")
    bmrs.save(small, f"{folder}/small")  # bmrs.load("small") needs no code of yours
    return small


if __name__ == "__main__":
    main()
