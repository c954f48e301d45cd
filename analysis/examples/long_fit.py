"""A fit that survives interruptions, and several seeds at once: python -m analysis.examples.long_fit."""

import torch
from torch import nn

import pyro_bmrs as bmrs

__all__ = ["main"]


def make() -> tuple[bmrs.NoisyNetwork, bmrs.TruncatedLogNormalGuide]:
    """Return a new model and its guide."""
    net = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), bmrs.MultiplicativeNoise(64), nn.Linear(64, 2))
    model = bmrs.NoisyNetwork(net)
    return model, bmrs.TruncatedLogNormalGuide(model)


def main(folder: str = "run") -> tuple[bmrs.FitResult, list[bmrs.EnsembleMember]]:
    """Run both and return their results."""
    x = torch.randn(1000, 20)
    data = (x, (x[:, 0] > 0).long())
    result = bmrs.fit(
        *make(),
        data,
        epochs=40,
        fine_tune_epochs=2,
        pruning=bmrs.Continuous(shrink=True),  # cut out what is removed at once: later epochs are faster
        folder=folder,  # metrics.jsonl, one line per epoch, and checkpoint/fit.safetensors
        resume=True,  # go on from that checkpoint, if there is one
        seed=0,
    )
    replicas = bmrs.fit_ensemble(make, data, seeds=range(5), epochs=40, fine_tune_epochs=2)  # five at once, by vmap
    print([f"{100 * replica.result.compression:.0f} %" for replica in replicas])
    return result, replicas


if __name__ == "__main__":
    main()
