"""LeNet-5, with noise on every filter and hidden neuron."""

from collections import OrderedDict

from torch import nn

from pyro_bmrs import MultiplicativeNoise

__all__ = ["lenet5"]


def lenet5(in_channels: int = 1, classes: int = 10) -> nn.Sequential:
    """Return the paper's LeNet-5 for 32x32 images: 6c and 16c filters, 120c and 84c neurons for c input channels.

    Args:
        in_channels: Channels c of the images.
        classes: Number of outputs.

    References:
        Gradient-Based Learning Applied to Document Recognition (LeCun et al., 1998)
        BMRS: Bayesian Model Reduction for Structured Pruning (Wright et al., 2024), appendix: widths, ReLU
    """
    c = in_channels
    return nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(c, 6 * c, 5),
            conv1_activation=nn.ReLU(),
            conv1_noise=MultiplicativeNoise(6 * c),
            conv1_pool=nn.MaxPool2d(2),
            conv2=nn.Conv2d(6 * c, 16 * c, 5),
            conv2_activation=nn.ReLU(),
            conv2_noise=MultiplicativeNoise(16 * c),
            conv2_pool=nn.MaxPool2d(2),
            flatten=nn.Flatten(),
            fc1=nn.Linear(16 * c * 25, 120 * c),
            fc1_activation=nn.ReLU(),
            fc1_noise=MultiplicativeNoise(120 * c),
            fc2=nn.Linear(120 * c, 84 * c),
            fc2_activation=nn.ReLU(),
            fc2_noise=MultiplicativeNoise(84 * c),
            output=nn.Linear(84 * c, classes),
        )
    )
