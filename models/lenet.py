"""LeNet-5 in two versions, with noise on every filter and hidden neuron."""

from collections import OrderedDict

from torch import nn

from pyro_bmrs import MultiplicativeNoise

__all__ = ["lenet5", "lenet5_caffe"]


def lenet5(in_channels: int = 1, classes: int = 10, noise_before_pool: bool = False) -> nn.Sequential:
    """Return the paper's LeNet-5 for 32x32 images: 6c and 16c filters, 120c and 84c neurons for c input channels.

    Args:
        in_channels: Channels c of the images.
        classes: Number of outputs.
        noise_before_pool: Whether filters' noise stands before max-pooling, as in the paper, instead of behind it. With
            one draw per example or per batch both are the same function, since a maximum commutes with a factor that is
            not negative, and behind is a quarter of the work; with a draw for each position they differ.

    References:
        Gradient-Based Learning Applied to Document Recognition (LeCun et al., 1998)
        BMRS: Bayesian Model Reduction for Structured Pruning (Wright et al., 2024), appendix: widths, ReLU
    """
    c = in_channels
    return nn.Sequential(
        OrderedDict(
            **_convolution(1, c, 6 * c, noise_before_pool),
            **_convolution(2, 6 * c, 16 * c, noise_before_pool),
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


def lenet5_caffe(in_channels: int = 1, classes: int = 10) -> nn.Sequential:
    """Return Caffe's LeNet-5 for 28x28 images, the network on which Bayesian pruning is compared.

    20 and 50 filters, 500 neurons, 431,080 parameters for one channel. The 800 inputs of the first dense layer, 16
    positions of each of 50 filters, have noise of their own, so that they go one by one.

    Args:
        in_channels: Channels of the images.
        classes: Number of outputs.

    References:
        Structured Bayesian Pruning via Log-Normal Multiplicative Noise (Neklyudov et al., 2017)
        Bayesian Compression for Deep Learning (Louizos et al., 2017)
    """
    return nn.Sequential(
        OrderedDict(
            **_convolution(1, in_channels, 20),
            **_convolution(2, 20, 50),
            flatten=nn.Flatten(),
            flatten_noise=MultiplicativeNoise(50 * 16),
            fc1=nn.Linear(50 * 16, 500),
            fc1_activation=nn.ReLU(),
            fc1_noise=MultiplicativeNoise(500),
            output=nn.Linear(500, classes),
        )
    )


def _convolution(i: int, in_channels: int, filters: int, noise_before_pool: bool = False) -> dict[str, nn.Module]:
    """Return the layers of convolution ``i``, its noise on either side of the pooling."""
    names = (f"conv{i}", f"conv{i}_activation", f"conv{i}_noise", f"conv{i}_pool")
    modules = (nn.Conv2d(in_channels, filters, 5), nn.ReLU(), MultiplicativeNoise(filters), nn.MaxPool2d(2))
    # A maximum commutes with ReLU, which has a quarter of the work behind it.
    order = (0, 1, 2, 3) if noise_before_pool else (0, 3, 1, 2)
    return {names[k]: modules[k] for k in order}
