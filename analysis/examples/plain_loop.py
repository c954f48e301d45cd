"""A plain PyTorch loop: python -m analysis.examples.plain_loop."""

import math

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import pyro_bmrs as bmrs
from analysis.data import digits

__all__ = ["main"]


def main(epochs: int = 40, warm_up: int = 10) -> nn.Module:
    """Prune a network on the digits and return the smaller one."""
    torch.manual_seed(0)
    split = digits(8)
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 100), nn.ReLU(), nn.Linear(100, 100), nn.ReLU(), nn.Linear(100, 10))
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

    changes = bmrs.evidence_changes(guide)  # >= 0: the evidence favours removal; log 3: positive evidence to stay
    masks = {site: delta_f + math.log(3) < 0 for site, delta_f in changes.items()}
    small = bmrs.compact(model, guide, masks, x[:8])
    x, y = split.test
    print(f"{bmrs.count_parameters(net):,} parameters -> {bmrs.count_parameters(small):,}")
    print(f"test accuracy {100 * (small(x).argmax(-1) == y).double().mean():.2f} %")
    return small


if __name__ == "__main__":
    main()
