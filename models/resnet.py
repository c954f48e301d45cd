"""A bottleneck ResNet for small images, with noise inside its blocks."""

from collections import OrderedDict
from collections.abc import Sequence

from torch import Tensor, nn

from pyro_bmrs import MultiplicativeNoise

__all__ = ["Bottleneck", "resnet"]

_EXPANSION = 4  # channels a block sends out, for each of the channels that it works on


class Bottleneck(nn.Module):
    """Residual block of a 1x1, a 3x3 and a 1x1 convolution, with noise on the filters of the first two.

    What the block works on inside is read by nothing else, so that every one of its filters can go; no noise stands on
    the residual stream, which all blocks of a stage share.

    Args:
        in_channels: Channels of the input.
        width: Filters of each of the first two convolutions; the block sends out four times as many channels.
        stride: Of the 3x3 convolution.
    """

    def __init__(self, in_channels: int, width: int, stride: int = 1) -> None:
        super().__init__()
        out_channels = _EXPANSION * width
        self.conv1 = nn.Conv2d(in_channels, width, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        self.activation1 = nn.ReLU()
        self.noise1 = MultiplicativeNoise(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)
        self.activation2 = nn.ReLU()
        self.noise2 = MultiplicativeNoise(width)
        self.conv3 = nn.Conv2d(width, out_channels, 1, bias=False)
        self.norm3 = nn.BatchNorm2d(out_channels)
        self.activation3 = nn.ReLU()
        self.shortcut = nn.Sequential()
        if stride != 1 or in_channels != out_channels:
            self.shortcut = nn.Sequential(
                OrderedDict(
                    conv=nn.Conv2d(in_channels, out_channels, 1, stride, bias=False),
                    norm=nn.BatchNorm2d(out_channels),
                )
            )

    def forward(self, x: Tensor) -> Tensor:
        h = self.noise1(self.activation1(self.norm1(self.conv1(x))))
        h = self.noise2(self.activation2(self.norm2(self.conv2(h))))
        return self.activation3(self.norm3(self.conv3(h)) + self.shortcut(x))


def resnet(
    depths: Sequence[int] = (8, 9, 8), width: int = 16, in_channels: int = 3, classes: int = 10
) -> nn.Sequential:
    """Return a bottleneck ResNet for images of some 32x32 pixels, with two noise sites in each block.

    Args:
        depths: Number of blocks of each stage; from the second on a stage halves the image and doubles the width.
        width: Filters of the stem, and of the first two convolutions in each block of the first stage.
        in_channels: Channels of the images.
        classes: Number of outputs.

    References:
        Deep Residual Learning for Image Recognition (He et al., 2016)
    """
    modules: OrderedDict[str, nn.Module] = OrderedDict(
        conv=nn.Conv2d(in_channels, width, 3, padding=1, bias=False), norm=nn.BatchNorm2d(width), activation=nn.ReLU()
    )
    channels = width
    for i, depth in enumerate(depths):
        blocks = []
        for j in range(depth):
            blocks.append(Bottleneck(channels, width * 2**i, stride=2 if i > 0 and j == 0 else 1))
            channels = _EXPANSION * width * 2**i
        modules[f"stage{i + 1}"] = nn.Sequential(*blocks)
    modules["pool"] = nn.AdaptiveAvgPool2d(1)
    modules["flatten"] = nn.Flatten()
    modules["output"] = nn.Linear(channels, classes)
    return nn.Sequential(modules)
