"""Small noisy networks and their posteriors, shared by the tests."""

import torch
from torch import nn

import pyro_bmrs as bmrs
from models import lenet5, mlp, resnet

NETWORKS = {
    "mlp": (lambda: mlp(16, hidden=12, layers=3, classes=4), (16,)),
    "lenet5": (lenet5, (1, 32, 32)),
    "lenet5_noise_before_pool": (lambda: lenet5(noise_before_pool=True), (1, 32, 32)),
    "resnet": (lambda: resnet(depths=(1, 2), width=4, classes=4), (3, 8, 8)),
    "batch_norm": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 6, 3, padding=1, bias=False),
            nn.BatchNorm2d(6),
            bmrs.MultiplicativeNoise(6),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(6, 5, 3, padding=1),
            nn.ELU(),
            bmrs.MultiplicativeNoise(5),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(5, 3),
        ),
        (2, 8, 8),
    ),
    "noise_before_tanh": (
        lambda: nn.Sequential(nn.Linear(7, 9), bmrs.MultiplicativeNoise(9), nn.Tanh(), nn.Linear(9, 3)),
        (7,),
    ),
    "noise_before_sigmoid": (  # a removed structure sends a constant 1/2, which must end up in a bias
        lambda: nn.Sequential(nn.Linear(7, 9), bmrs.MultiplicativeNoise(9), nn.Sigmoid(), nn.Linear(9, 3, bias=False)),
        (7,),
    ),
    "noise_between_tanhs": (  # nothing to fold the noise into on either side
        lambda: nn.Sequential(nn.Linear(7, 9), nn.Tanh(), bmrs.MultiplicativeNoise(9), nn.Tanh(), nn.Linear(9, 3)),
        (7,),
    ),
    "sequence": (
        lambda: nn.Sequential(nn.Linear(6, 8), nn.GELU(), bmrs.MultiplicativeNoise(8, dim=-1), nn.Linear(8, 4)),
        (5, 6),
    ),
}


def build(name, seed=0, batch=6, dtype=torch.float32):
    """Return model, guide with a random posterior, and inputs of the network called ``name``."""
    torch.manual_seed(seed)
    make, shape = NETWORKS[name]
    net = make()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):  # statistics that are not the identity's
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
    model = bmrs.NoisyNetwork(net, num_data=100).to(dtype)
    guide = bmrs.TruncatedLogNormalGuide(model).to(dtype)
    with torch.no_grad():
        guide.loc.uniform_(-3, 0)
        guide.log_scale.normal_(-1, 1)
    return model, guide, torch.randn(batch, *shape, dtype=dtype)


def random_masks(model, seed=0, keep=0.5):
    """Return masks that keep each structure with probability ``keep``."""
    generator = torch.Generator().manual_seed(seed)
    return {site: torch.rand(size, generator=generator) < keep for site, size in model.sizes.items()}


def blobs(n=200, classes=3, features=6, seed=0):
    """Return a problem that a small network solves: features 0 to classes - 1 matter, the rest is noise."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, features, generator=generator)
    return x, x[:, :classes].argmax(-1)


def small_classifier(seed=0, hidden=16, features=6, classes=3, **model_arguments):
    """Return model and guide for ``blobs``."""
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.Linear(features, hidden), nn.ReLU(), bmrs.MultiplicativeNoise(hidden), nn.Linear(hidden, classes)
    )
    model = bmrs.NoisyNetwork(net, **model_arguments)
    return model, bmrs.TruncatedLogNormalGuide(model)
