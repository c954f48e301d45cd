"""A plain PyTorch loop: python -m analysis.examples.plain_loop."""

import math

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import pyro_bmrs as bmrs
from analysis.data.sets import digits
from pyro_bmrs.structures.inputs import Inputs

__all__ = ["compacted", "main", "mlp", "report"]


def main(epochs: int = 40, warm_up: int = 10) -> nn.Module:
    """Prune a network on the digits and return the smaller one."""
    torch.manual_seed(0)
    split = digits(8)
    net = mlp()
    x, y = split.train
    model = bmrs.NoisyNetwork(bmrs.attach_noise(net, bmrs.find_structures(net, x[:8])), num_data=len(x))
    guide = bmrs.TruncatedLogNormalGuide(model)

    elbo = bmrs.MeanFieldELBO()(model, guide)
    groups = [{"params": net.parameters(), "lr": 2e-3}, {"params": guide.parameters(), "lr": 0.1}]
    optimizer = torch.optim.Adam(groups)
    for epoch in range(epochs):
        model.kl_weight = min((epoch + 1) / warm_up, 1.0)  # or the posterior collapses before the weights have learned
        for inputs, labels in DataLoader(TensorDataset(x, y), batch_size=64, shuffle=True):
            optimizer.zero_grad()
            elbo(inputs, labels).backward()  # in nats, of all the training data
            optimizer.step()
            guide.project_()

    small = compacted(model, guide, x[:8])
    report(net, small, small(split.test[0]), split.test[1])
    return small


def compacted(model: bmrs.NoisyNetwork, guide: bmrs.TruncatedLogNormalGuide, example: Inputs) -> nn.Module:
    """Return the network without the structures for which there is no positive evidence."""
    changes = bmrs.evidence_changes(guide)  # >= 0: the evidence favours removal; above -log 3 it is hardly against it
    masks = {site: delta_f + math.log(3) < 0 for site, delta_f in changes.items()}
    return bmrs.compact(model, guide, masks, example)


def report(net: nn.Module, small: nn.Module, logits: Tensor, labels: Tensor) -> None:
    """Print both sizes, and the accuracy of the smaller network."""
    print(f"{bmrs.count_parameters(net):,} parameters -> {bmrs.count_parameters(small):,}")
    print(f"test accuracy {100 * (logits.argmax(-1) == labels).double().mean():.2f} %")


def mlp() -> nn.Module:
    """Return the network of these examples, for images of 8 x 8."""
    return nn.Sequential(
        nn.Flatten(), nn.Linear(64, 100), nn.ReLU(), nn.Linear(100, 100), nn.ReLU(), nn.Linear(100, 10)
    )


if __name__ == "__main__":
    main()
