"""Small architectures to prune, written as their authors would write them: no noise inside.

``ARCHITECTURES`` maps a name to a function that builds a network and example inputs: a tensor, a tuple of positional
inputs, or a dictionary of named ones. ``make`` builds one that is ready for a test. The docstring of each class, or
the comment at its name, says what is special about it. Networks of ``transformers`` are there where it is installed.
"""

import importlib.util
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils._pytree import tree_map
from torch.utils.checkpoint import checkpoint

Inputs = Tensor | tuple[Tensor, ...] | dict[str, Tensor]

# --- Inputs -----------------------------------------------------------------------------------------------------------


def images(size=16, channels=3, batch=3):
    """Return noise around a mean per image and channel, so that images still differ after pooling."""
    return torch.randn(batch, channels, 1, 1) + torch.randn(batch, channels, size, size)


def signals(channels=4, length=20, batch=3):
    return torch.randn(batch, channels, length)


def sequences(length=6, features=12, batch=3):
    return torch.randn(batch, length, features)


def vectors(features=12, batch=4):
    return torch.randn(batch, features)


def tokens(length=7, vocabulary=50, batch=3):
    return torch.randint(1, vocabulary, (batch, length))


def text(length=7, vocabulary=50, batch=3):
    """Return tokens and their mask; the last text is two tokens shorter."""
    mask = torch.ones(batch, length, dtype=torch.long)
    mask[-1, -2:] = 0
    return {"input_ids": tokens(length, vocabulary, batch), "attention_mask": mask}


# --- Convolutional classifiers ----------------------------------------------------------------------------------------


def conv_norm_act(inputs, outputs, kernel=3, stride=1, groups=1, activation=nn.ReLU):
    """Return a convolution without bias, a batch norm and, unless it is None, an activation."""
    layers = [
        nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(outputs),
    ]
    return nn.Sequential(*layers, *([activation()] if activation else []))


class LeNet(nn.Module):
    """Tanh and average pooling; a flattening that turns each channel into 16 features."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 6, 5)
        self.conv2 = nn.Conv2d(6, 16, 5)
        self.fc1 = nn.Linear(16 * 16, 30)
        self.fc2 = nn.Linear(30, 20)
        self.fc3 = nn.Linear(20, 10)

    def forward(self, x):
        x = F.avg_pool2d(torch.tanh(self.conv1(x)), 2)
        x = F.avg_pool2d(torch.tanh(self.conv2(x)), 2)
        x = torch.flatten(x, 1)
        return self.fc3(torch.tanh(self.fc2(torch.tanh(self.fc1(x)))))


class AlexNet(nn.Module):
    """Local response normalisation mixes neighbouring channels; dropout; in-place ReLUs."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 12, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.LocalResponseNorm(3, alpha=0.5),
            nn.MaxPool2d(3, 2),
            nn.Conv2d(12, 16, 3, padding=1, groups=2),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(3, 2),
        )
        self.avgpool = nn.AdaptiveAvgPool2d(2)
        self.classifier = nn.Sequential(
            nn.Dropout(), nn.Linear(16 * 4, 24), nn.ReLU(inplace=True), nn.Dropout(), nn.Linear(24, 10)
        )

    def forward(self, x):
        return self.classifier(torch.flatten(self.avgpool(self.features(x)), 1))


def vgg_bn(widths=(8, 8, "M", 12, 12, "M", 16)):
    """One flat Sequential of convolutions with biases that batch norm makes useless."""
    layers, inputs = [], 3
    for width in widths:
        if width == "M":
            layers.append(nn.MaxPool2d(2, 2))
        else:
            layers += [nn.Conv2d(inputs, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
            inputs = width
    return nn.Sequential(
        *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, 20), nn.ReLU(), nn.Linear(20, 10)
    )


class BasicBlock(nn.Module):
    """Functional ReLUs and a projection where the shape changes, an empty Sequential where it does not."""

    def __init__(self, inputs, outputs, stride=1):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential()
        if stride != 1 or inputs != outputs:
            self.shortcut = conv_norm_act(inputs, outputs, 1, stride, activation=None)

    def forward(self, x):
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += self.shortcut(x)
        return F.relu(out)


class PadShortcut(nn.Module):
    """Takes every other pixel and pads with channels of zeros on both sides, without parameters."""

    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.extra = (outputs - inputs) // 2
        self.stride = stride

    def forward(self, x):
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.extra, self.extra))


class OptionABlock(BasicBlock):
    """A basic block whose shortcut pads with zeros."""

    def __init__(self, inputs, outputs, stride=1):
        super().__init__(inputs, outputs, stride)
        if stride != 1 or inputs != outputs:
            self.shortcut = PadShortcut(inputs, outputs, stride)


class Bottleneck(nn.Module):
    """1x1, 3x3 (grouped in ResNeXt and RegNet) and 1x1 convolutions, with squeeze and excitation where asked for."""

    expansion = 2

    def __init__(self, inputs, width, stride=1, groups=1, excite=False):
        super().__init__()
        outputs = width * self.expansion
        self.conv1 = nn.Conv2d(inputs, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, groups=groups, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.se = SqueezeExcitation(width, 4) if excite else nn.Identity()
        self.conv3 = nn.Conv2d(width, outputs, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = None
        if stride != 1 or inputs != outputs:
            self.downsample = conv_norm_act(inputs, outputs, 1, stride, activation=None)

    def forward(self, x):
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(self.se(out)))
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


class PreActBlock(nn.Module):
    """Batch norm and ReLU come first; the shortcut branches off after them where it has a convolution."""

    def __init__(self, inputs, outputs, stride=1, dropout=0.0):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.dropout = dropout
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x):
        out = F.relu(self.bn1(x))
        shortcut = self.shortcut(out) if hasattr(self, "shortcut") else x
        out = self.conv1(out)
        out = F.dropout(F.relu(self.bn2(out)), p=self.dropout, training=self.training)
        return self.conv2(out) + shortcut


class ResNet(nn.Module):
    """A stem, blocks from a list, global pooling and a linear head."""

    def __init__(self, blocks, width, final_norm=False):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, 1, 1, bias=False)
        self.bn1 = nn.Identity() if final_norm else nn.BatchNorm2d(8)
        self.layers = nn.Sequential(*blocks)
        self.bn = nn.BatchNorm2d(width) if final_norm else None
        self.fc = nn.Linear(width, 10)

    def forward(self, x):
        x = self.conv1(x)
        if self.bn is None:
            x = F.relu(self.bn1(x))
        x = self.layers(x)
        if self.bn is not None:
            x = F.relu(self.bn(x))
        x = F.avg_pool2d(x, x.size(3))
        return self.fc(x.view(x.size(0), -1))


class DenseBlock(nn.Module):
    """Each layer sees the concatenation of all before it."""

    def __init__(self, inputs, growth, layers):
        super().__init__()
        widths = [inputs + growth * i for i in range(layers)]
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) for width in widths)
        self.convs = nn.ModuleList(nn.Conv2d(width, growth, 3, 1, 1, bias=False) for width in widths)

    def forward(self, x):
        features = [x]
        for norm, conv in zip(self.norms, self.convs, strict=True):
            features.append(conv(F.relu(norm(torch.cat(features, 1)))))
        return torch.cat(features, 1)


def densenet():
    """Dense blocks with a transition of batch norm, ReLU, convolution and pooling between them."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, 1, 1, bias=False),
        DenseBlock(8, 4, 3),
        nn.Sequential(nn.BatchNorm2d(20), nn.ReLU(), nn.Conv2d(20, 10, 1, bias=False), nn.AvgPool2d(2)),
        DenseBlock(10, 4, 2),
        nn.BatchNorm2d(18),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(18, 10),
    )


class Inception(nn.Module):
    """Branches with factorised 1x5 and 5x1 convolutions, joined by concatenation, twice in one branch."""

    def __init__(self, inputs):
        super().__init__()
        self.branch1 = conv_norm_act(inputs, 4, 1)
        self.branch2 = nn.Sequential(
            conv_norm_act(inputs, 4, 1),
            nn.Conv2d(4, 6, (1, 5), padding=(0, 2)),
            nn.Conv2d(6, 6, (5, 1), padding=(2, 0)),
            nn.ReLU(),
        )
        self.branch3 = conv_norm_act(inputs, 6, 1)
        self.branch3a = nn.Conv2d(6, 4, (1, 3), padding=(0, 1))
        self.branch3b = nn.Conv2d(6, 4, (3, 1), padding=(1, 0))
        self.branch_pool = conv_norm_act(inputs, 4, 1)

    def forward(self, x):
        wide = self.branch3(x)
        wide = torch.cat([self.branch3a(wide), self.branch3b(wide)], 1)
        pooled = self.branch_pool(F.avg_pool2d(x, 3, stride=1, padding=1))
        return torch.cat([self.branch1(x), self.branch2(x), wide, pooled], 1)


class GoogLeNetBlock(nn.Module):
    """1x1, reduced 3x3, reduced 5x5 and pooled branches of different widths."""

    def __init__(self, inputs):
        super().__init__()
        self.one = conv_norm_act(inputs, 6, 1)
        self.three = nn.Sequential(conv_norm_act(inputs, 4, 1), conv_norm_act(4, 8))
        self.five = nn.Sequential(conv_norm_act(inputs, 3, 1), conv_norm_act(3, 4, 5))
        self.pool = nn.Sequential(nn.MaxPool2d(3, 1, 1, ceil_mode=True), conv_norm_act(inputs, 4, 1))

    def forward(self, x):
        return torch.cat([branch(x) for branch in (self.one, self.three, self.five, self.pool)], 1)


class GoogLeNet(nn.Module):
    """Two blocks, and an auxiliary head that only training uses."""

    def __init__(self):
        super().__init__()
        self.stem = conv_norm_act(3, 8)
        self.block1, self.block2 = GoogLeNetBlock(8), GoogLeNetBlock(22)
        self.auxiliary = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(22, 10))
        self.fc = nn.Linear(22, 10)

    def forward(self, x):
        x = self.block1(F.max_pool2d(self.stem(x), 2))
        auxiliary = self.auxiliary(x) if self.training else None
        out = self.fc(F.adaptive_avg_pool2d(self.block2(x), 1).flatten(1))
        return (out, auxiliary) if self.training else out


class Fire(nn.Module):
    """A narrow 1x1 layer feeds two layers whose outputs are concatenated."""

    def __init__(self, inputs, squeeze, expand):
        super().__init__()
        self.squeeze = nn.Conv2d(inputs, squeeze, 1)
        self.expand1x1 = nn.Conv2d(squeeze, expand, 1)
        self.expand3x3 = nn.Conv2d(squeeze, expand, 3, padding=1)

    def forward(self, x):
        x = F.relu(self.squeeze(x), inplace=True)
        return torch.cat([F.relu(self.expand1x1(x)), F.relu(self.expand3x3(x))], 1)


def squeezenet():
    """The last layer is a convolution to the classes, and its ReLU and pooling follow."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, 2),
        nn.ReLU(inplace=True),
        Fire(8, 4, 6),
        nn.MaxPool2d(3, 2, ceil_mode=True),
        Fire(12, 4, 8),
        nn.Dropout(),
        nn.Conv2d(16, 10, 1),
        nn.ReLU(inplace=True),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )


def mobilenet_v1():
    """Depthwise convolutions, each followed by a pointwise one."""
    layers = [conv_norm_act(3, 8, stride=2)]
    for inputs, outputs, stride in ((8, 12, 1), (12, 16, 2), (16, 16, 1)):
        layers += [conv_norm_act(inputs, inputs, 3, stride, groups=inputs), conv_norm_act(inputs, outputs, 1)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))


class SqueezeExcitation(nn.Module):
    """Every channel is multiplied by a gate that looks at all channels."""

    def __init__(self, channels, squeezed, activation=F.relu, gate=torch.sigmoid):
        super().__init__()
        self.fc1 = nn.Conv2d(channels, squeezed, 1)
        self.fc2 = nn.Conv2d(squeezed, channels, 1)
        self.activation, self.gate = activation, gate

    def forward(self, x):
        scale = self.activation(self.fc1(F.adaptive_avg_pool2d(x, 1)))
        return x * self.gate(self.fc2(scale))


class InvertedResidual(nn.Module):
    """A wide depthwise layer between narrow ones without activation: MobileNet V2 and V3, EfficientNet."""

    def __init__(self, inputs, outputs, expand=3, stride=1, activation=nn.ReLU6, excite=None, drop_path=0.0):
        super().__init__()
        hidden = inputs * expand
        self.use_residual = stride == 1 and inputs == outputs
        self.drop_path = drop_path
        self.block = nn.Sequential(
            conv_norm_act(inputs, hidden, 1, activation=activation),
            conv_norm_act(hidden, hidden, 3, stride, groups=hidden, activation=activation),
            excite(hidden) if excite else nn.Identity(),
            conv_norm_act(hidden, outputs, 1, activation=None),
        )

    def forward(self, x):
        out = self.block(x)
        if not self.use_residual:
            return out
        if self.training and self.drop_path:
            keep = 1 - self.drop_path
            out = out * out.new_empty(len(out), 1, 1, 1).bernoulli_(keep) / keep
        return x + out


def mobilenet_v2():
    """Inverted residuals with ReLU6, and a wide layer before the pooling."""
    return nn.Sequential(
        conv_norm_act(3, 8, stride=2, activation=nn.ReLU6),
        InvertedResidual(8, 8),
        InvertedResidual(8, 12, stride=2),
        InvertedResidual(12, 12),
        conv_norm_act(12, 24, 1, activation=nn.ReLU6),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Dropout(0.2),
        nn.Linear(24, 10),
    )


def mobilenet_v3():
    """Squeeze and excitation with hard-sigmoid gates, and hard-swish activations."""

    def excite(channels):
        return SqueezeExcitation(channels, 4, gate=F.hardsigmoid)

    return nn.Sequential(
        conv_norm_act(3, 8, stride=2, activation=nn.Hardswish),
        InvertedResidual(8, 8, activation=nn.Hardswish, excite=excite),
        InvertedResidual(8, 12, stride=2, activation=nn.Hardswish, excite=excite),
        nn.AdaptiveAvgPool2d(1),
        nn.Conv2d(12, 20, 1),
        nn.Hardswish(),
        nn.Flatten(),
        nn.Linear(20, 10),
    )


def efficientnet():
    """SiLU, squeeze and excitation, and residual branches that are dropped at random in training."""

    def excite(channels):
        return SqueezeExcitation(channels, 2, activation=F.silu)

    return nn.Sequential(
        conv_norm_act(3, 8, stride=2, activation=nn.SiLU),
        InvertedResidual(8, 8, activation=nn.SiLU, excite=excite, drop_path=0.2),
        InvertedResidual(8, 12, activation=nn.SiLU, excite=excite),
        InvertedResidual(12, 12, activation=nn.SiLU, excite=excite, drop_path=0.2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(12, 10),
    )


def channel_shuffle(x, groups):
    """Interleave groups of channels, as ShuffleNet does with views."""
    batch, channels, height, width = x.shape
    x = x.view(batch, groups, channels // groups, height, width).transpose(1, 2).contiguous()
    return x.view(batch, channels, height, width)


class ShuffleV1(nn.Module):
    """Grouped pointwise convolutions with a channel shuffle between them."""

    def __init__(self, channels, groups=2):
        super().__init__()
        self.groups = groups
        self.reduce = conv_norm_act(channels, channels // 2, 1, groups=groups)
        self.depthwise = conv_norm_act(channels // 2, channels // 2, 3, groups=channels // 2, activation=None)
        self.expand = conv_norm_act(channels // 2, channels, 1, groups=groups, activation=None)

    def forward(self, x):
        out = channel_shuffle(self.reduce(x), self.groups)
        return F.relu(x + self.expand(self.depthwise(out)))


class ShuffleV2(nn.Module):
    """Half of the channels pass by; the halves are concatenated and shuffled."""

    def __init__(self, channels):
        super().__init__()
        half = channels // 2
        self.branch = nn.Sequential(
            conv_norm_act(half, half, 1),
            conv_norm_act(half, half, 3, groups=half, activation=None),
            conv_norm_act(half, half, 1),
        )

    def forward(self, x):
        left, right = x.chunk(2, dim=1)
        return channel_shuffle(torch.cat((left, self.branch(right)), dim=1), 2)


def pooled_classifier(*layers, width):
    """Return layers with global pooling and a linear head behind them."""
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10))


class GlobalResponseNorm(nn.Module):
    """Divides by the mean of the norms of all channels; gamma and beta start at zero."""

    def __init__(self, channels):
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(1, 1, 1, channels))
        self.beta = nn.Parameter(torch.zeros(1, 1, 1, channels))

    def forward(self, x):
        norms = torch.norm(x, p=2, dim=(1, 2), keepdim=True)
        return self.gamma * (x * norms / (norms.mean(dim=-1, keepdim=True) + 1e-6)) + self.beta + x


class ConvNeXtBlock(nn.Module):
    """Linear layers and LayerNorm on the last dimension after a permutation; layer scale, or GRN in V2."""

    def __init__(self, channels, response_norm=False):
        super().__init__()
        self.dwconv = nn.Conv2d(channels, channels, 7, padding=3, groups=channels)
        self.norm = nn.LayerNorm(channels, eps=1e-6)
        self.pwconv1 = nn.Linear(channels, 3 * channels)
        self.grn = GlobalResponseNorm(3 * channels) if response_norm else nn.Identity()
        self.pwconv2 = nn.Linear(3 * channels, channels)
        self.gamma = None if response_norm else nn.Parameter(0.1 * torch.ones(channels))

    def forward(self, x):
        out = self.norm(self.dwconv(x).permute(0, 2, 3, 1))
        out = self.pwconv2(self.grn(F.gelu(self.pwconv1(out))))
        if self.gamma is not None:
            out = self.gamma * out
        return x + out.permute(0, 3, 1, 2)


class ChannelsFirstNorm(nn.Module):
    """LayerNorm over channels written by hand, as ConvNeXt does before it halves the resolution."""

    def __init__(self, channels):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x):
        mean = x.mean(1, keepdim=True)
        variance = (x - mean).pow(2).mean(1, keepdim=True)
        x = (x - mean) / torch.sqrt(variance + 1e-6)
        return self.weight[:, None, None] * x + self.bias[:, None, None]


class ConvNeXt(nn.Module):
    """Patches as stem, two stages, and LayerNorm after the pooling."""

    def __init__(self, response_norm=False):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 2, 2)
        self.stage1 = ConvNeXtBlock(8, response_norm)
        self.downsample = nn.Sequential(ChannelsFirstNorm(8), nn.Conv2d(8, 12, 2, 2))
        self.stage2 = ConvNeXtBlock(12, response_norm)
        self.norm = nn.LayerNorm(12, eps=1e-6)
        self.head = nn.Linear(12, 10)

    def forward(self, x):
        x = self.stage2(self.downsample(self.stage1(self.stem(x))))
        return self.head(self.norm(x.mean([-2, -1])))


class Ghost(nn.Module):
    """Half of the channels are cheap depthwise functions of the other half, and all are concatenated."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.outputs = outputs
        self.primary = conv_norm_act(inputs, outputs // 2, 1)
        self.cheap = conv_norm_act(outputs // 2, outputs // 2, 3, groups=outputs // 2)

    def forward(self, x):
        primary = self.primary(x)
        return torch.cat([primary, self.cheap(primary)], dim=1)[:, : self.outputs]


class RepVGGBlock(nn.Module):
    """Adds 3x3, 1x1 and identity branches, the last being nothing but a batch norm."""

    def __init__(self, channels):
        super().__init__()
        self.dense = conv_norm_act(channels, channels, 3, activation=None)
        self.pointwise = conv_norm_act(channels, channels, 1, activation=None)
        self.identity = nn.BatchNorm2d(channels)

    def forward(self, x):
        return F.relu(self.dense(x) + self.pointwise(x) + self.identity(x))


class StandardizedConv2d(nn.Conv2d):
    """NFNet: standardises its weight over the inputs in every call, so that removing an input changes the rest."""

    def forward(self, x):
        weight = self.weight - self.weight.mean(dim=(1, 2, 3), keepdim=True)
        fan_in = weight[0].numel()
        weight = weight * torch.rsqrt(weight.var(dim=(1, 2, 3), keepdim=True) * fan_in + 1e-4)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding)


def norm_net(norm, width=12):
    """Two convolutions, each followed by the normalisation or activation that ``norm`` builds."""
    return pooled_classifier(
        nn.Conv2d(3, width, 3, padding=1),
        norm(width),
        nn.ReLU(),
        nn.Conv2d(width, 16, 3, 2, 1),
        norm(16),
        nn.ReLU(),
        nn.Conv2d(16, 12, 1),
        width=12,
    )


class AttentionModule(nn.Module):
    """CBAM: gates from mean and maximum over pixels, then from mean and maximum over channels."""

    def __init__(self, channels):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(channels, 4), nn.ReLU(), nn.Linear(4, channels))
        self.spatial = nn.Conv2d(2, 1, 3, padding=1, bias=False)

    def forward(self, x):
        gate = self.mlp(x.mean((2, 3))) + self.mlp(x.amax((2, 3)))
        x = x * torch.sigmoid(gate)[..., None, None]
        maps = torch.cat([x.mean(1, keepdim=True), x.max(1, keepdim=True)[0]], 1)
        return x * torch.sigmoid(self.spatial(maps))


class NonLocal(nn.Module):
    """Attention between pixels, added with a gain that starts at zero."""

    def __init__(self, channels):
        super().__init__()
        self.theta = nn.Conv2d(channels, channels // 2, 1)
        self.phi = nn.Conv2d(channels, channels // 2, 1)
        self.g = nn.Conv2d(channels, channels // 2, 1)
        self.out = nn.Conv2d(channels // 2, channels, 1)
        self.gain = nn.Parameter(torch.zeros(1))

    def forward(self, x):
        batch, _, height, width = x.shape
        theta, phi, g = (layer(x).flatten(2) for layer in (self.theta, self.phi, self.g))
        attention = torch.bmm(theta.transpose(1, 2), phi).softmax(dim=-1)
        out = torch.bmm(g, attention.transpose(1, 2)).view(batch, -1, height, width)
        return x + self.gain * self.out(out)


class Maxout(nn.Module):
    """The maximum over pairs of channels: a structure of the output is two of the layer."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.conv = nn.Conv2d(inputs, 2 * outputs, 3, padding=1)

    def forward(self, x):
        x = self.conv(x)
        return x.view(x.size(0), -1, 2, x.size(2), x.size(3)).max(dim=2).values


class CoordConv(nn.Module):
    """Concatenates the coordinates of the pixels, two constant channels, before each convolution."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(5, 12, 3, padding=1)
        self.conv2 = nn.Conv2d(14, 12, 3, padding=1)
        self.fc = nn.Linear(12, 10)

    def with_coordinates(self, x):
        rows = torch.linspace(-1, 1, x.shape[2], dtype=x.dtype, device=x.device)
        columns = torch.linspace(-1, 1, x.shape[3], dtype=x.dtype, device=x.device)
        grid = torch.stack(torch.meshgrid(rows, columns, indexing="ij")).expand(len(x), -1, -1, -1)
        return torch.cat([x, grid], dim=1)

    def forward(self, x):
        x = F.relu(self.conv1(self.with_coordinates(x)))
        x = F.relu(self.conv2(self.with_coordinates(x)))
        return self.fc(F.adaptive_max_pool2d(x, 1).flatten(1))


class SpatialPyramid(nn.Module):
    """Flattens poolings of three resolutions and concatenates them: a channel is 21 features."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1)
        self.conv2 = nn.Conv2d(8, 10, 3, padding=1)
        self.fc1 = nn.Linear(10 * 21, 16)
        self.fc2 = nn.Linear(16, 10)

    def forward(self, x):
        x = F.elu(self.conv2(F.elu(self.conv1(x))))
        levels = [F.adaptive_max_pool2d(x, size).flatten(1) for size in (1, 2, 4)]
        return self.fc2(F.elu(self.fc1(torch.cat(levels, 1))))


class BilinearPooling(nn.Module):
    """The outer product of two sets of features, then signed roots."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 2, 1)
        self.left = nn.Conv2d(8, 6, 3, padding=1)
        self.right = nn.Conv2d(8, 5, 3, padding=1)
        self.fc = nn.Linear(30, 10)

    def forward(self, x):
        x = F.relu(self.stem(x))
        left, right = F.relu(self.left(x)).flatten(2), F.relu(self.right(x)).flatten(2)
        outer = torch.einsum("bin,bjn->bij", left, right).flatten(1) / left.shape[-1]
        return self.fc(torch.sign(outer) * torch.sqrt(outer.abs() + 1e-8))


class FrozenBatchNorm(nn.Module):
    """Batch norm whose four vectors are buffers, as in detection backbones."""

    def __init__(self, channels):
        super().__init__()
        self.register_buffer("weight", torch.ones(channels))
        self.register_buffer("bias", torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, x):
        scale = self.weight.reshape(1, -1, 1, 1) * (self.running_var.reshape(1, -1, 1, 1) + 1e-5).rsqrt()
        return x * scale + (self.bias.reshape(1, -1, 1, 1) - self.running_mean.reshape(1, -1, 1, 1) * scale)


def one_channel():
    """Convolutions of one channel: nothing can be removed from some of the layers."""
    return nn.Sequential(
        nn.Conv2d(1, 1, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(1, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 1, 3, padding=1),
        nn.Sigmoid(),
        nn.Flatten(),
        nn.Linear(64, 10),
    )


def weight_normed():
    """Weight norm by parametrisation, in convolutions and linear layers."""
    return nn.Sequential(
        parametrizations.weight_norm(nn.Conv2d(3, 12, 3, padding=1)),
        nn.ReLU(),
        parametrizations.weight_norm(nn.Conv2d(12, 8, 3, 2, 1)),
        nn.ReLU(),
        nn.Flatten(),
        parametrizations.weight_norm(nn.Linear(8 * 64, 16)),
        nn.ReLU(),
        nn.Linear(16, 10),
    )


def spectral_normed():
    """Spectral norm by parametrisation: the weight depends on a singular value of the whole matrix."""
    return nn.Sequential(
        parametrizations.spectral_norm(nn.Conv2d(3, 12, 3, 2, 1)),
        nn.LeakyReLU(0.1),
        parametrizations.spectral_norm(nn.Conv2d(12, 8, 3, 2, 1)),
        nn.LeakyReLU(0.1),
        nn.Flatten(),
        parametrizations.spectral_norm(nn.Linear(8 * 16, 16)),
        nn.LeakyReLU(0.1),
        nn.Linear(16, 10),
    )


class HardCodedViews(nn.Module):
    """Writes the widths of its layers into the views of its forward."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, 2, 1)
        self.conv2 = nn.Conv2d(8, 12, 3, 2, 1)
        self.fc1 = nn.Linear(12 * 4 * 4, 20)
        self.fc2 = nn.Linear(20, 10)

    def forward(self, x):
        x = F.relu(self.conv2(F.relu(self.conv1(x))))
        x = x.view(-1, 12 * 4 * 4)
        return self.fc2(F.relu(self.fc1(x)))


# --- Images to images, several outputs --------------------------------------------------------------------------------


def double_conv(inputs, outputs):
    """Return the two convolutions of a stage of a U-Net."""
    return nn.Sequential(conv_norm_act(inputs, outputs), conv_norm_act(outputs, outputs))


class UNet(nn.Module):
    """Skip connections by concatenation; transposed convolutions or bilinear interpolation on the way up."""

    def __init__(self, width=8, outputs=4, bilinear=False):
        super().__init__()
        self.down1, self.down2 = double_conv(3, width), double_conv(width, 2 * width)
        self.middle = double_conv(2 * width, 4 * width)
        if bilinear:
            self.up2 = nn.Sequential(self.upsample(), nn.Conv2d(4 * width, 2 * width, 1))
            self.up1 = nn.Sequential(self.upsample(), nn.Conv2d(2 * width, width, 1))
        else:
            self.up2 = nn.ConvTranspose2d(4 * width, 2 * width, 2, 2)
            self.up1 = nn.ConvTranspose2d(2 * width, width, 2, 2)
        self.merge2, self.merge1 = double_conv(4 * width, 2 * width), double_conv(2 * width, width)
        self.out = nn.Conv2d(width, outputs, 1)

    @staticmethod
    def upsample():
        return nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True)

    def forward(self, x):
        high = self.down1(x)
        low = self.down2(F.max_pool2d(high, 2))
        x = self.middle(F.max_pool2d(low, 2))
        x = self.merge2(torch.cat([low, self.up2(x)], dim=1))
        return self.out(self.merge1(torch.cat([high, self.up1(x)], dim=1)))


class FeaturePyramid(nn.Module):
    """Lateral 1x1 convolutions added to an upsampled path; returns a list of maps."""

    def __init__(self):
        super().__init__()
        self.stages = nn.ModuleList(
            [conv_norm_act(3, 8), conv_norm_act(8, 12, stride=2), conv_norm_act(12, 16, stride=2)]
        )
        self.lateral = nn.ModuleList(nn.Conv2d(width, 10, 1) for width in (8, 12, 16))
        self.smooth = nn.ModuleList(nn.Conv2d(10, 6, 3, padding=1) for _ in range(3))

    def forward(self, x):
        features = []
        for stage, lateral in zip(self.stages, self.lateral, strict=True):
            x = stage(x)
            features.append(lateral(x))
        for i in (1, 0):
            features[i] = features[i] + F.interpolate(features[i + 1], scale_factor=2, mode="nearest")
        return [smooth(each) for smooth, each in zip(self.smooth, features, strict=True)]


class TwoHeads(nn.Module):
    """Segmentation logits at full resolution and an auxiliary map, as a tuple."""

    def __init__(self):
        super().__init__()
        self.backbone1 = conv_norm_act(3, 12, stride=2)
        self.backbone2 = conv_norm_act(12, 16)
        self.head = nn.Sequential(
            nn.Conv2d(16, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 5, 1)
        )
        self.auxiliary = nn.Sequential(nn.Conv2d(12, 6, 1), nn.ReLU(), nn.Conv2d(6, 5, 1))

    def forward(self, x):
        early = self.backbone1(x)
        logits = self.head(self.backbone2(early))
        logits = F.interpolate(logits, size=x.shape[-2:], mode="bilinear", align_corners=False)
        return logits, self.auxiliary(early)


class AtrousPyramid(nn.Module):
    """DeepLab: dilated branches and global pooling that is broadcast back, concatenated."""

    def __init__(self):
        super().__init__()
        self.stem = conv_norm_act(3, 12, stride=2)
        self.branches = nn.ModuleList(
            [nn.Conv2d(12, 6, 1), *(nn.Conv2d(12, 6, 3, padding=d, dilation=d) for d in (2, 3))]
        )
        self.pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(12, 6, 1), nn.ReLU())
        self.project = conv_norm_act(24, 10, 1)
        self.out = nn.Conv2d(10, 4, 1)

    def forward(self, x):
        x = self.stem(x)
        branches = [F.relu(branch(x)) for branch in self.branches]
        branches.append(F.interpolate(self.pool(x), size=x.shape[2:], mode="bilinear", align_corners=False))
        return self.out(self.project(torch.cat(branches, 1)))


class Detector(nn.Module):
    """A dictionary of outputs, one nested; boxes are reshaped from channels that hold anchors times coordinates."""

    def __init__(self, anchors=2):
        super().__init__()
        self.anchors = anchors
        self.backbone = nn.Sequential(conv_norm_act(3, 8, stride=2), conv_norm_act(8, 12, stride=2))
        self.scores = nn.Conv2d(12, anchors * 3, 3, padding=1)
        self.boxes = nn.Conv2d(12, anchors * 4, 3, padding=1)

    def forward(self, x):
        features = self.backbone(x)
        boxes = self.boxes(features).unflatten(1, (self.anchors, 4)).permute(0, 3, 4, 1, 2).flatten(1, 3)
        return {"scores": self.scores(features), "regression": {"boxes": boxes}}


@dataclass
class Prediction:
    """What ``DataclassOutput`` returns."""

    logits: Tensor
    hidden: Tensor | None = None


class DataclassOutput(nn.Module):
    """Returns a dataclass, with a field that is None."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 14), nn.ReLU())
        self.head = nn.Linear(14, 5)

    def forward(self, x):
        return Prediction(self.head(self.body(x)))


def conv_autoencoder():
    """Strided convolutions down to a code, transposed ones with overlap back up."""
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, 2, 1),
        nn.ReLU(),
        nn.Conv2d(8, 12, 3, 2, 1),
        nn.ReLU(),
        nn.Conv2d(12, 4, 4),
        nn.ConvTranspose2d(4, 12, 4),
        nn.ReLU(),
        nn.ConvTranspose2d(12, 8, 3, 2, 1, output_padding=1),
        nn.ReLU(),
        nn.ConvTranspose2d(8, 1, 3, 2, 1, output_padding=1),
        nn.Sigmoid(),
    )


class VAE(nn.Module):
    """Two heads give mean and log variance; in eval mode the code is the mean."""

    def __init__(self, size=12, hidden=16, code=6):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(size, hidden), nn.ReLU())
        self.mean, self.log_variance = nn.Linear(hidden, code), nn.Linear(hidden, code)
        self.decoder = nn.Sequential(nn.Linear(code, hidden), nn.ReLU(), nn.Linear(hidden, size))

    def forward(self, x):
        hidden = self.encoder(x)
        mean, log_variance = self.mean(hidden), self.log_variance(hidden)
        code = mean + torch.randn_like(mean) * torch.exp(0.5 * log_variance) if self.training else mean
        return self.decoder(code), mean, log_variance


class Generator(nn.Module):
    """DCGAN: a linear layer whose output is viewed as maps of hard-coded size, then transposed convolutions."""

    def __init__(self):
        super().__init__()
        self.project = nn.Linear(12, 16 * 4 * 4)
        self.norm = nn.BatchNorm1d(16 * 4 * 4)
        self.up = nn.Sequential(
            nn.ConvTranspose2d(16, 8, 4, 2, 1, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU(True),
            nn.ConvTranspose2d(8, 3, 4, 2, 1),
        )

    def forward(self, z):
        x = F.relu(self.norm(self.project(z))).view(-1, 16, 4, 4)
        return torch.tanh(self.up(x))


class SuperResolution(nn.Module):
    """Pixel shuffle turns four channels into one, before another convolution and before the output."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 12, 3, padding=1)
        self.conv2 = nn.Conv2d(12, 4 * 8, 3, padding=1)
        self.conv3 = nn.Conv2d(8, 4 * 3, 3, padding=1)
        self.shuffle = nn.PixelShuffle(2)

    def forward(self, x):
        x = F.leaky_relu(self.conv1(x), 0.1)
        x = F.leaky_relu(self.shuffle(self.conv2(x)), 0.1)
        return self.shuffle(self.conv3(x))


# --- Vectors ----------------------------------------------------------------------------------------------------------


def mlp():
    """Linear layers, ReLUs and dropout."""
    return nn.Sequential(
        nn.Linear(12, 20), nn.ReLU(), nn.Dropout(0.1), nn.Linear(20, 16), nn.ReLU(), nn.Dropout(0.1), nn.Linear(16, 10)
    )


def mlp_batch_norm():
    """Batch norm after the activation in one layer and before it in another."""
    return nn.Sequential(
        nn.Linear(12, 20),
        nn.ReLU(),
        nn.BatchNorm1d(20),
        nn.Linear(20, 16, bias=False),
        nn.BatchNorm1d(16),
        nn.ELU(),
        nn.Linear(16, 10),
    )


class Residual(nn.Module):
    """Adds a branch to its input, times what ``scale`` builds: layer scale, ReZero or nothing."""

    def __init__(self, width, hidden, scale=None, norm=True):
        super().__init__()
        self.norm = nn.LayerNorm(width) if norm else nn.Identity()
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.scale = nn.Parameter(scale(width)) if scale else 1.0

    def forward(self, x):
        return x + self.scale * self.fc2(F.gelu(self.fc1(self.norm(x))))


def residual_mlp(scale=None, norm=True):
    """Two residual branches on one stream."""
    blocks = [Residual(16, 24, scale, norm) for _ in range(2)]
    return nn.Sequential(nn.Linear(12, 16), *blocks, nn.Linear(16, 10))


class Highway(nn.Module):
    """A gate mixes each structure with the same one of the layer before."""

    def __init__(self, width=16):
        super().__init__()
        self.inputs = nn.Linear(12, width)
        self.transforms = nn.ModuleList(nn.Linear(width, width) for _ in range(2))
        self.gates = nn.ModuleList(nn.Linear(width, width) for _ in range(2))
        self.head = nn.Linear(width, 10)

    def forward(self, x):
        x = self.inputs(x)
        for transform, gate in zip(self.transforms, self.gates, strict=True):
            g = torch.sigmoid(gate(x))
            x = g * F.relu(transform(x)) + (1 - g) * x
        return self.head(x)


class Siren(nn.Module):
    """Sines as activations, and sines and cosines of the inputs concatenated."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(24, 16), nn.Linear(16, 16)])
        self.head = nn.Linear(16, 3)

    def forward(self, x):
        x = torch.cat([x.sin(), x.cos()], -1)
        for layer in self.layers:
            x = torch.sin(3 * layer(x))
        return self.head(x)


class GLU(nn.Module):
    """One layer makes values and gates, which ``chunk`` or ``glu`` pairs; RMSNorm before it."""

    def __init__(self, functional=False):
        super().__init__()
        self.embed = nn.Linear(12, 16)
        self.norm = nn.RMSNorm(16)
        self.up, self.down = nn.Linear(16, 40), nn.Linear(20, 16)
        self.head = nn.Linear(16, 10)
        self.functional = functional

    def gated(self, x):
        if self.functional:
            return F.glu(x, dim=-1)
        value, gate = x.chunk(2, dim=-1)
        return value * F.silu(gate)

    def forward(self, x):
        x = self.embed(x)
        return self.head(x + self.down(self.gated(self.up(self.norm(x)))))


class SwiGLU(nn.Module):
    """Values and gates come from layers of their own, without biases."""

    def __init__(self, width=16, hidden=24):
        super().__init__()
        self.w1 = nn.Linear(width, hidden, bias=False)
        self.w2 = nn.Linear(hidden, width, bias=False)
        self.w3 = nn.Linear(width, hidden, bias=False)

    def forward(self, x):
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class MixtureOfExperts(nn.Module):
    """Soft gates weigh experts that are stacked, by matmul; experts are lists of layers."""

    def __init__(self, experts=3):
        super().__init__()
        self.gate = nn.Linear(12, experts)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 14)) for _ in range(experts)
        )
        self.head = nn.Linear(14, 10)

    def forward(self, x):
        weights = self.gate(x).softmax(-1)
        outputs = torch.stack([expert(x) for expert in self.experts], dim=1)
        return self.head(F.relu((weights[:, None] @ outputs).squeeze(1)))


class LoRALinear(nn.Module):
    """A frozen layer plus a product of two thin matrices, the second of which starts at zero."""

    def __init__(self, inputs, outputs, rank=2, alpha=4):
        super().__init__()
        self.base = nn.Linear(inputs, outputs).requires_grad_(False)
        self.a = nn.Parameter(torch.randn(rank, inputs) / rank)
        self.b = nn.Parameter(torch.zeros(outputs, rank))
        self.scaling = alpha / rank

    def forward(self, x):
        return self.base(x) + (x @ self.a.T @ self.b.T) * self.scaling


def lora():
    """Two adapted layers and a head without adapter."""
    return nn.Sequential(LoRALinear(12, 20), nn.ReLU(), LoRALinear(20, 16), nn.ReLU(), nn.Linear(16, 10))


class Siamese(nn.Module):
    """One network is called on two inputs, and its outputs are compared."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(12, 20), nn.ReLU(), nn.Linear(20, 8))
        self.head = nn.Sequential(nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 1))

    def forward(self, left, right):
        left, right = self.encoder(left), self.encoder(right)
        similarity = F.cosine_similarity(left, right, dim=-1)
        return similarity, self.head(torch.cat([(left - right).abs(), left * right], -1))


class TiedLayers(nn.Module):
    """One layer is applied three times, and a decoder uses the transpose of the encoder's weight."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Linear(12, 16)
        self.shared = nn.Linear(16, 16)
        self.out_bias = nn.Parameter(torch.zeros(12))

    def forward(self, x):
        x = F.relu(self.encoder(x))
        for _ in range(3):
            x = x + torch.tanh(self.shared(x))
        return F.linear(x, self.encoder.weight.t(), self.out_bias)


class TwoInputs(nn.Module):
    """FiLM: a vector scales and shifts the channels of an image's features."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 12, 3, 2, 1), nn.Conv2d(12, 12, 3, padding=1)
        self.condition = nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 24))
        self.head = nn.Linear(12, 5)

    def forward(self, image, vector):
        scale, shift = self.condition(vector)[:, :, None, None].chunk(2, 1)
        x = F.relu(self.conv1(image))
        x = F.relu((1 + scale) * self.conv2(x) + shift)
        return self.head(x.mean((2, 3)))


class Tabular(nn.Module):
    """Named inputs: embeddings of categories are concatenated with numbers; wide and deep parts are added."""

    def __init__(self):
        super().__init__()
        self.embeddings = nn.ModuleDict({"colour": nn.Embedding(6, 4), "shape": nn.Embedding(5, 3)})
        self.numbers = nn.BatchNorm1d(5)
        self.deep = nn.Sequential(nn.Linear(12, 20), nn.ReLU(), nn.Linear(20, 12), nn.ReLU(), nn.Linear(12, 3))
        self.wide = nn.Linear(5, 3)

    def forward(self, numbers, colour, shape):
        categories = [self.embeddings["colour"](colour), self.embeddings["shape"](shape)]
        return self.deep(torch.cat([*categories, self.numbers(numbers)], -1)) + self.wide(numbers)


class KeepsActivation(nn.Module):
    """Stores a hidden activation on itself, which after a forward with gradients is not a leaf."""

    def __init__(self):
        super().__init__()
        self.fc1, self.fc2, self.fc3 = nn.Linear(12, 20), nn.Linear(20, 16), nn.Linear(16, 10)
        self.last = None

    def forward(self, x):
        x = F.relu(self.fc1(x))
        self.last = x
        return self.fc3(F.relu(self.fc2(x)))


class Checkpointed(nn.Module):
    """Recomputes its blocks in the backward pass of training."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(12, 16)
        self.blocks = nn.ModuleList(Residual(16, 24) for _ in range(2))
        self.head = nn.Linear(16, 10)

    def forward(self, x):
        x = self.embed(x)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.training else block(x)
        return self.head(x)


class Unused(nn.Module):
    """Has a layer and a buffer that the forward never uses, and features that go on without gradient."""

    def __init__(self):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(12, 16), nn.Linear(16, 10)
        self.left_over = nn.Linear(16, 7)
        self.probe = nn.Linear(16, 4)
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))

    def forward(self, x):
        x = F.relu(self.fc1(x))
        return self.fc2(x), self.probe(x.detach())


# --- Sets, graphs, sequences of numbers -------------------------------------------------------------------------------


class PointNet(nn.Module):
    """Convolutions of width 1 share weights over points; the maximum over points is concatenated to each of them."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv1d(3, 12, 1), nn.Conv1d(12, 16, 1)
        self.bn1 = nn.BatchNorm1d(12)
        self.conv3 = nn.Conv1d(28, 10, 1)
        self.out = nn.Conv1d(10, 4, 1)

    def forward(self, points):
        local = F.relu(self.bn1(self.conv1(points)))
        pooled = self.conv2(local).max(dim=2, keepdim=True)[0].repeat(1, 1, points.shape[2])
        return self.out(F.relu(self.conv3(torch.cat([local, pooled], 1))))


class GraphConvolution(nn.Module):
    """A second input, the adjacency matrix, multiplies node features from the left."""

    def __init__(self):
        super().__init__()
        self.lin1, self.lin2 = nn.Linear(8, 16), nn.Linear(16, 12)
        self.head = nn.Linear(12, 4)

    def forward(self, nodes, adjacency):
        adjacency = adjacency / adjacency.sum(-1, keepdim=True)
        x = F.relu(adjacency @ self.lin1(nodes))
        x = F.relu(torch.bmm(adjacency, self.lin2(x)))
        return self.head(x.sum(1))


def conv3d():
    """Convolutions, batch norms and pooling of volumes."""
    return nn.Sequential(
        nn.Conv3d(1, 8, 3, padding=1),
        nn.BatchNorm3d(8),
        nn.ReLU(),
        nn.MaxPool3d(2),
        nn.Conv3d(8, 12, 3, padding=1),
        nn.BatchNorm3d(12),
        nn.ReLU(),
        nn.AdaptiveAvgPool3d(1),
        nn.Flatten(),
        nn.Linear(12, 5),
    )


def separable_1d():
    """Depthwise separable convolutions over time."""
    layers = [nn.Conv1d(4, 8, 5, padding=2), nn.ReLU()]
    for inputs, outputs in ((8, 12), (12, 16)):
        layers += [nn.Conv1d(inputs, inputs, 3, padding=1, groups=inputs), nn.Conv1d(inputs, outputs, 1)]
        layers += [nn.BatchNorm1d(outputs), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveMaxPool1d(1), nn.Flatten(), nn.Linear(16, 5))


class WaveNet(nn.Module):
    """Dilated causal convolutions with tanh and sigmoid gates; residual and skip paths both add up."""

    def __init__(self, width=8, skip=12):
        super().__init__()
        dilations = (1, 2, 4)
        self.inputs = nn.Conv1d(4, width, 1)
        self.filters = nn.ModuleList(nn.Conv1d(width, width, 2, dilation=d) for d in dilations)
        self.gates = nn.ModuleList(nn.Conv1d(width, width, 2, dilation=d) for d in dilations)
        self.residuals = nn.ModuleList(nn.Conv1d(width, width, 1) for _ in dilations)
        self.skips = nn.ModuleList(nn.Conv1d(width, skip, 1) for _ in dilations)
        self.out = nn.Sequential(nn.ReLU(), nn.Conv1d(skip, 10, 1), nn.ReLU(), nn.Conv1d(10, 5, 1))

    def forward(self, x):
        x, total = self.inputs(x), 0
        for fil, gate, residual, skip in zip(self.filters, self.gates, self.residuals, self.skips, strict=True):
            padded = F.pad(x, (fil.dilation[0], 0))
            h = torch.tanh(fil(padded)) * torch.sigmoid(gate(padded))
            total = total + skip(h)
            x = x + residual(h)
        return self.out(total)


class TemporalBlock(nn.Module):
    """TCN: weight-normed dilated convolutions whose surplus of padding is cut off."""

    def __init__(self, inputs, outputs, dilation):
        super().__init__()
        self.cut = 2 * dilation
        options = {"padding": self.cut, "dilation": dilation}
        self.conv1 = parametrizations.weight_norm(nn.Conv1d(inputs, outputs, 3, **options))
        self.conv2 = parametrizations.weight_norm(nn.Conv1d(outputs, outputs, 3, **options))
        self.dropout = nn.Dropout(0.2)
        self.downsample = nn.Conv1d(inputs, outputs, 1) if inputs != outputs else None

    def forward(self, x):
        out = self.dropout(F.relu(self.conv1(x)[:, :, : -self.cut].contiguous()))
        out = self.dropout(F.relu(self.conv2(out)[:, :, : -self.cut].contiguous()))
        return F.relu(out + (x if self.downsample is None else self.downsample(x)))


class TemporalNet(nn.Module):
    """Temporal blocks, and a head on the last step."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.Sequential(TemporalBlock(4, 8, 1), TemporalBlock(8, 12, 2), TemporalBlock(12, 12, 4))
        self.head = nn.Linear(12, 5)

    def forward(self, x):
        return self.head(self.blocks(x)[:, :, -1])


class Recurrent(nn.Module):
    """A recurrent layer, which stays whole, between linear layers that need not."""

    def __init__(self, kind=nn.LSTM, **options):
        super().__init__()
        self.embed = nn.Linear(12, 16)
        self.rnn = kind(16, 10, batch_first=True, **options)
        self.middle = nn.Linear(20 if self.rnn.bidirectional else 10, 14)
        self.head = nn.Linear(14, 5)

    def forward(self, x):
        outputs, _ = self.rnn(torch.relu(self.embed(x)))
        return self.head(torch.relu(self.middle(outputs[:, -1])))


class GatedRecurrence(nn.Module):
    """A recurrence written as a loop over time, with the state in a Python variable."""

    def __init__(self, width=12):
        super().__init__()
        self.embed = nn.Linear(12, 14)
        self.candidate = nn.Linear(14 + width, width)
        self.gate = nn.Linear(14 + width, width)
        self.head = nn.Linear(width, 5)
        self.width = width

    def forward(self, x):
        state = x.new_zeros(x.shape[0], self.width)
        for step in F.relu(self.embed(x)).unbind(1):
            both = torch.cat([step, state], -1)
            gate = torch.sigmoid(self.gate(both))
            state = gate * state + (1 - gate) * torch.tanh(self.candidate(both))
        return self.head(state)


class CellLoop(nn.Module):
    """``nn.GRUCell`` in a loop, fed by convolutions over time."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Sequential(nn.Conv1d(4, 12, 3, padding=1), nn.ReLU(), nn.MaxPool1d(4))
        self.cell = nn.GRUCell(12, 10)
        self.head = nn.Sequential(nn.Linear(10, 12), nn.ReLU(), nn.Linear(12, 5))

    def forward(self, x):
        state = None
        for step in self.conv(x).permute(2, 0, 1):
            state = self.cell(step, state)
        return self.head(state)


class TextCNN(nn.Module):
    """Convolutions of three widths over word vectors, maximum over time, concatenation."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(50, 12, padding_idx=0)
        self.convs = nn.ModuleList(nn.Conv1d(12, 8, kernel) for kernel in (2, 3, 4))
        self.fc = nn.Linear(24, 5)

    def forward(self, ids):
        x = self.embedding(ids).transpose(1, 2)
        return self.fc(torch.cat([F.relu(conv(x)).max(dim=-1)[0] for conv in self.convs], 1))


# --- Attention and token mixing ---------------------------------------------------------------------------------------


class EncoderLayer(nn.Module):
    """``nn.TransformerEncoderLayer`` on batches first or second; norms after or before the branches."""

    def __init__(self, batch_first=True, **options):
        super().__init__()
        self.embed = nn.Linear(12, 16)
        self.layer = nn.TransformerEncoderLayer(16, 4, 24, batch_first=batch_first, **options)
        self.head = nn.Linear(16, 10)
        self.batch_first = batch_first

    def forward(self, x):
        x = self.embed(x)
        x = self.layer(x) if self.batch_first else self.layer(x.transpose(0, 1)).transpose(0, 1)
        return self.head(x.mean(1))


class Encoder(nn.Module):
    """``nn.TransformerEncoder`` with sinusoidal positions in a buffer, a causal mask in another and a padding mask."""

    def __init__(self, width=16, length=10):
        super().__init__()
        self.embedding = nn.Embedding(50, width)
        position = torch.arange(length).unsqueeze(1)
        frequency = torch.exp(torch.arange(0, width, 2) * (-math.log(10000.0) / width))
        encoding = torch.zeros(1, length, width)
        encoding[0, :, 0::2] = torch.sin(position * frequency)
        encoding[0, :, 1::2] = torch.cos(position * frequency)
        self.register_buffer("encoding", encoding)
        self.register_buffer("causal", torch.ones(length, length, dtype=torch.bool).triu(1), persistent=False)
        layer = nn.TransformerEncoderLayer(width, 2, 24, batch_first=True, activation="gelu")
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(width, 50)

    def forward(self, input_ids, attention_mask):
        length = input_ids.shape[1]
        x = self.embedding(input_ids) * math.sqrt(self.embedding.embedding_dim) + self.encoding[:, :length]
        padding = attention_mask == 0
        return self.head(self.encoder(x, mask=self.causal[:length, :length], src_key_padding_mask=padding))


class CrossAttention(nn.Module):
    """``nn.MultiheadAttention`` with keys and values of other widths than the queries; returns its weights too."""

    def __init__(self):
        super().__init__()
        self.query, self.key, self.value = nn.Linear(12, 16), nn.Linear(8, 10), nn.Linear(8, 14)
        self.attention = nn.MultiheadAttention(16, 4, kdim=10, vdim=14, batch_first=True)
        self.head = nn.Linear(16, 5)

    def forward(self, x, context):
        query, key, value = self.query(x), self.key(context), self.value(context)
        attended, weights = self.attention(query, key, value)
        return self.head(query + attended), weights


class Decoder(nn.Module):
    """``nn.TransformerDecoderLayer``: causal attention to itself and attention to a memory."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(50, 16)
        self.memory = nn.Linear(12, 16)
        self.layer = nn.TransformerDecoderLayer(16, 2, 24, batch_first=True, norm_first=True)
        self.norm = nn.LayerNorm(16)
        self.head = nn.Linear(16, 50)

    def forward(self, ids, memory):
        mask = nn.Transformer.generate_square_subsequent_mask(ids.shape[1], device=memory.device, dtype=memory.dtype)
        x = self.layer(self.embedding(ids), self.memory(memory), tgt_mask=mask, tgt_is_causal=True)
        return self.head(self.norm(x))


class SeparateAttention(nn.Module):
    """Heads from separate q, k and v layers, ``scaled_dot_product_attention`` and an output layer."""

    def __init__(self, width=16, heads=4, causal=False):
        super().__init__()
        self.heads, self.causal = heads, causal
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))

    def split(self, x):
        return x.view(x.shape[0], x.shape[1], self.heads, -1).transpose(1, 2)

    def forward(self, x):
        q, k, v = self.split(self.q(x)), self.split(self.k(x)), self.split(self.v(x))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.o(out.transpose(1, 2).flatten(2))


class FusedAttention(nn.Module):
    """Timm's: one layer for q, k and v, and heads in the reshapes of the forward; norms of q and k on request."""

    def __init__(self, width=16, heads=4, qk_norm=False):
        super().__init__()
        self.num_heads, self.head_dim = heads, width // heads
        self.qkv = nn.Linear(width, 3 * width)
        self.q_norm = nn.LayerNorm(self.head_dim) if qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(self.head_dim) if qk_norm else nn.Identity()
        self.proj = nn.Linear(width, width)

    def forward(self, x):
        batch, length, width = x.shape
        qkv = self.qkv(x).reshape(batch, length, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        x = F.scaled_dot_product_attention(self.q_norm(q), self.k_norm(k), v)
        return self.proj(x.transpose(1, 2).reshape(batch, length, width))


class ExplicitAttention(nn.Module):
    """minGPT's: softmax of a masked matmul, a causal mask in a buffer, splits of one layer's output."""

    def __init__(self, width=16, heads=2, length=10):
        super().__init__()
        self.heads, self.width = heads, width
        self.c_attn, self.c_proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.register_buffer("bias", torch.tril(torch.ones(length, length)).view(1, 1, length, length))

    def forward(self, x):
        batch, length, width = x.size()
        q, k, v = self.c_attn(x).split(self.width, dim=2)
        q, k, v = (each.view(batch, length, self.heads, width // self.heads).transpose(1, 2) for each in (q, k, v))
        scores = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
        scores = scores.masked_fill(self.bias[:, :, :length, :length] == 0, float("-inf"))
        out = F.softmax(scores, dim=-1) @ v
        return self.c_proj(out.transpose(1, 2).contiguous().view(batch, length, width))


class AlibiAttention(SeparateAttention):
    """A slope per head, in a buffer, times the distance is added to the scores."""

    def __init__(self, width=16, heads=4):
        super().__init__(width, heads)
        self.register_buffer("slopes", 2.0 ** -torch.arange(1, heads + 1).view(-1, 1, 1))

    def forward(self, x):
        q, k, v = self.split(self.q(x)), self.split(self.k(x)), self.split(self.v(x))
        position = torch.arange(x.shape[1], device=x.device)
        distance = -(position[:, None] - position[None, :]).abs()
        scores = torch.einsum("bhqd,bhkd->bhqk", q, k) / math.sqrt(q.shape[-1]) + self.slopes * distance
        out = torch.einsum("bhqk,bhkd->bhqd", scores.softmax(-1), v)
        return self.o(out.transpose(1, 2).flatten(2))


class RotaryAttention(nn.Module):
    """Rotated queries and keys, and fewer heads of keys and values than of queries: GQA, or MQA with one."""

    def __init__(self, width=16, heads=4, groups=4):
        super().__init__()
        self.heads, self.groups, self.size = heads, groups, width // heads
        self.wq = nn.Linear(width, width, bias=False)
        self.wk = nn.Linear(width, groups * self.size, bias=False)
        self.wv = nn.Linear(width, groups * self.size, bias=False)
        self.wo = nn.Linear(width, width, bias=False)
        inverse = 1.0 / (100 ** (torch.arange(0, self.size, 2).float() / self.size))
        self.register_buffer("inverse", inverse, persistent=False)

    def rotate(self, x):
        angle = torch.outer(torch.arange(x.shape[2], device=x.device), self.inverse).repeat(1, 2)
        left, right = x.chunk(2, dim=-1)
        return x * angle.cos() + torch.cat([-right, left], dim=-1) * angle.sin()

    def forward(self, x):
        batch, length, _ = x.shape
        q = self.wq(x).view(batch, length, self.heads, self.size).transpose(1, 2)
        k = self.wk(x).view(batch, length, self.groups, self.size).transpose(1, 2)
        v = self.wv(x).view(batch, length, self.groups, self.size).transpose(1, 2)
        q, k = self.rotate(q), self.rotate(k)
        k, v = (each.repeat_interleave(self.heads // self.groups, dim=1) for each in (k, v))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.wo(out.transpose(1, 2).reshape(batch, length, -1))


class LinearAttention(SeparateAttention):
    """No softmax: positive features of keys and values are summed first."""

    def forward(self, x):
        q, k, v = self.split(self.q(x)), self.split(self.k(x)), self.split(self.v(x))
        q, k = F.elu(q) + 1, F.elu(k) + 1
        context = k.transpose(-2, -1) @ v
        out = (q @ context) / (q @ k.sum(2).unsqueeze(-1))
        return self.o(out.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """A transformer block around any attention, with norms before its branches; parallel branches as in GPT-J."""

    def __init__(self, attention, width=16, norm=nn.LayerNorm, parallel=False, mlp=None):
        super().__init__()
        self.norm1, self.norm2 = norm(width), norm(width)
        self.attention, self.parallel = attention, parallel
        self.mlp = mlp or nn.Sequential(nn.Linear(width, 24), nn.GELU(), nn.Linear(24, width))

    def forward(self, x):
        if self.parallel:
            return x + self.attention(self.norm1(x)) + self.mlp(self.norm2(x))
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


def on_sequences(*blocks, norm=nn.LayerNorm, width=16):
    """Return blocks between a linear embedding and a head for each step."""
    return nn.Sequential(nn.Linear(12, width), *blocks, norm(width), nn.Linear(width, 5))


class VisionTransformer(nn.Module):
    """Patches by convolution, a class token in front, learned positions, and the class token into the head."""

    def __init__(self, width=16, depth=2, **options):
        super().__init__()
        self.patch_embed = nn.Conv2d(3, width, 4, 4)
        self.cls_token = nn.Parameter(0.5 * torch.randn(1, 1, width))
        self.pos_embed = nn.Parameter(0.5 * torch.randn(1, 17, width))
        self.blocks = nn.Sequential(*(Block(FusedAttention(width, **options), width) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 10)

    def forward(self, x):
        x = self.patch_embed(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1) + self.pos_embed
        return self.head(self.norm(self.blocks(x))[:, 0])


class LanguageModel(nn.Module):
    """Token and position embeddings, causal blocks, and a head that is tied to the token embedding on request."""

    def __init__(self, attention, tied=False, width=16, vocabulary=50):
        super().__init__()
        self.wte, self.wpe = nn.Embedding(vocabulary, width), nn.Embedding(10, width)
        self.blocks = nn.ModuleList(Block(attention()) for _ in range(2))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        if tied:
            self.head.weight = self.wte.weight

    def forward(self, ids):
        x = self.wte(ids) + self.wpe(torch.arange(ids.size(1), device=ids.device))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class Perceiver(nn.Module):
    """Learned latents, expanded over the batch, are the queries of ``nn.MultiheadAttention``."""

    def __init__(self, width=16, latents=4):
        super().__init__()
        self.latents = nn.Parameter(torch.randn(latents, width))
        self.embed = nn.Linear(12, width)
        self.cross = nn.MultiheadAttention(width, 2, batch_first=True)
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True)
        self.mlp = Residual(width, 24)
        self.head = nn.Linear(width, 5)

    def forward(self, x):
        x = self.embed(x)
        latents = self.latents.unsqueeze(0).expand(x.size(0), -1, -1)
        latents = latents + self.cross(latents, x, x, need_weights=False)[0]
        latents = latents + self.attention(latents, latents, latents, need_weights=False)[0]
        return self.head(self.mlp(latents).mean(1))


class MixerBlock(nn.Module):
    """MLP-Mixer: one MLP over tokens, on the transpose, and one over channels."""

    def __init__(self, length, width):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.tokens = nn.Sequential(nn.Linear(length, 12), nn.GELU(), nn.Linear(12, length))
        self.channels = nn.Sequential(nn.Linear(width, 24), nn.GELU(), nn.Linear(24, width))

    def forward(self, x):
        x = x + self.tokens(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        return x + self.channels(self.norm2(x))


class Mixer(nn.Module):
    """Mixer blocks on patches of an image."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 4, 4)
        self.blocks = nn.Sequential(MixerBlock(16, 12), MixerBlock(16, 12))
        self.norm, self.head = nn.LayerNorm(12), nn.Linear(12, 10)

    def forward(self, x):
        return self.head(self.norm(self.blocks(self.stem(x).flatten(2).transpose(1, 2))).mean(1))


class SpatialGate(nn.Module):
    """gMLP: half of the channels, normalised and mixed over time, gate the other half."""

    def __init__(self, length=6, width=16, hidden=24):
        super().__init__()
        self.norm, self.gate_norm = nn.LayerNorm(width), nn.LayerNorm(hidden // 2)
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden // 2, width)
        self.spatial = nn.Conv1d(length, length, 1)

    def forward(self, x):
        u, v = F.gelu(self.up(self.norm(x))).chunk(2, dim=-1)
        return x + self.down(u * self.spatial(self.gate_norm(v)))


class FourierMixing(nn.Module):
    """FNet: the real part of a Fourier transform over time and channels."""

    def forward(self, x):
        return torch.fft.fft2(x).real


# --- Networks of transformers, from configurations --------------------------------------------------------------------

TEXT = {
    "vocab_size": 50,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 24,
    "max_position_embeddings": 16,
    "initializer_range": 0.2,  # the usual 0.02 is for wide networks, and would leave a small one all but constant
}
CAUSAL = TEXT | {"num_key_value_heads": 2, "use_cache": False}
VISION = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 24,
    "image_size": 16,
    "patch_size": 4,
    "initializer_range": 0.2,
}


def hf(name, **config):
    """Build the model called ``name`` of ``transformers`` with random weights."""
    import transformers

    model = getattr(transformers, name)
    return model(model.config_class(**config))


class Logits(nn.Module):
    """Returns only the logits of what a model of ``transformers`` returns."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, *args, **kwargs):
        return self.model(*args, **kwargs).logits


def hf_resnet(layer_type, hidden_sizes):
    sizes = {"embedding_size": 8, "hidden_sizes": hidden_sizes, "depths": [1, 1]}
    return hf("ResNetForImageClassification", **sizes, layer_type=layer_type, num_labels=5)


def hf_convnext(version, **options):
    sizes = {"num_stages": 2, "hidden_sizes": [8, 12], "depths": [1, 1], "patch_size": 2}
    return hf(f"ConvNext{version}ForImageClassification", **sizes, initializer_range=0.2, num_labels=5, **options)


def hf_segformer():
    return hf(
        "SegformerForSemanticSegmentation",
        num_encoder_blocks=2,
        depths=[1, 1],
        sr_ratios=[2, 1],
        hidden_sizes=[8, 12],
        patch_sizes=[3, 3],
        strides=[2, 2],
        num_attention_heads=[1, 2],
        mlp_ratios=[2, 2],
        decoder_hidden_size=12,
        initializer_range=0.2,
        num_labels=5,
    )


def hf_t5():
    sizes = {"vocab_size": 50, "d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 1, "num_heads": 4}
    gated = {"feed_forward_proj": "gated-gelu", "relative_attention_num_buckets": 8}
    return hf("T5ForConditionalGeneration", **sizes, **gated, initializer_factor=1.0, use_cache=False)


def pixels():
    return {"pixel_values": images()}


HF: dict[str, Callable[[], tuple[nn.Module, Inputs]]] = {
    "hf_resnet": lambda: (Logits(hf_resnet("basic", [8, 12])), images()),
    "hf_resnet_bottleneck": lambda: (hf_resnet("bottleneck", [16, 24]), pixels()),  # a dictionary of named inputs
    "hf_mobilenet_v2": lambda: (  # widths are multiples of 8; padding depends on the size
        hf(
            "MobileNetV2ForImageClassification",
            image_size=32,
            depth_multiplier=0.05,
            initializer_range=0.35,
            num_labels=5,
        ),
        images(32),
    ),
    "hf_convnext": lambda: (hf_convnext("", layer_scale_init_value=0.1), images()),  # layer scale
    "hf_convnext_v2": lambda: (hf_convnext("V2"), pixels()),  # global response norm with zero gamma
    "hf_vit": lambda: (hf("ViTForImageClassification", **VISION, num_labels=5), images()),
    "hf_vit_eager": lambda: (  # attention by matmul and softmax, and all hidden states in the output
        hf("ViTModel", **VISION, attn_implementation="eager", output_hidden_states=True),
        pixels(),
    ),
    "hf_deit": lambda: (  # two heads, averaged
        hf("DeiTForImageClassificationWithTeacher", **VISION, num_labels=5),
        images(),
    ),
    "hf_swin": lambda: (  # shifted windows, tables of relative positions, merging of patches
        hf(
            "SwinForImageClassification",
            image_size=16,
            patch_size=2,
            embed_dim=8,
            depths=[2, 1],
            num_heads=[2, 4],
            window_size=4,
            initializer_range=0.2,
            num_labels=5,
        ),
        images(),
    ),
    "hf_segformer": lambda: (hf_segformer(), pixels()),  # convolutions inside attention and MLP; maps as output
    "hf_bert": lambda: (hf("BertForSequenceClassification", **TEXT, num_labels=5), text()),
    "hf_bert_masked_lm": lambda: (  # a decoder that is tied to the embeddings; inputs by position
        hf("BertForMaskedLM", **TEXT),
        tuple(text().values()),
    ),
    "hf_roberta": lambda: (  # positions are counted from the padding token
        hf("RobertaForTokenClassification", **TEXT | {"max_position_embeddings": 20}, num_labels=5),
        text(),
    ),
    "hf_distilbert": lambda: (
        hf(
            "DistilBertForSequenceClassification",
            vocab_size=50,
            dim=16,
            n_layers=2,
            n_heads=4,
            hidden_dim=24,
            max_position_embeddings=16,
            initializer_range=0.2,
            num_labels=5,
        ),
        text(),
    ),
    "hf_albert": lambda: (  # one layer used for all depths, and embeddings narrower than the layers
        hf("AlbertForSequenceClassification", **TEXT, embedding_size=8, num_labels=5),
        text(),
    ),
    "hf_gpt2": lambda: (  # layers whose weights are transposed, and a tied head
        hf(
            "GPT2LMHeadModel",
            vocab_size=50,
            n_embd=16,
            n_layer=2,
            n_head=4,
            n_positions=16,
            bos_token_id=0,
            eos_token_id=0,
            initializer_range=0.2,
            use_cache=False,
        ),
        tokens(),
    ),
    "hf_gpt_neox": lambda: (  # parallel branches, heads first in a fused layer, a part of each head rotated
        hf("GPTNeoXForCausalLM", **TEXT, use_cache=False, rotary_pct=0.5),
        text(),
    ),
    "hf_llama": lambda: (hf("LlamaForCausalLM", **CAUSAL), text()),  # RMSNorm, SwiGLU, rotary positions, GQA
    "hf_mistral": lambda: (  # a sliding window; the label is read at the last token that is not padding
        hf("MistralForSequenceClassification", **CAUSAL, sliding_window=3, num_labels=5, pad_token_id=0),
        tokens(),
    ),
    "hf_qwen2": lambda: (hf("Qwen2ForCausalLM", **CAUSAL, tie_word_embeddings=True), text()),  # biases in q, k and v
    "hf_gemma": lambda: (  # norms multiply by one plus a weight; heads are wider than the model divided by their number
        hf("GemmaForCausalLM", **CAUSAL, head_dim=6, pad_token_id=0),
        text(),
    ),
    "hf_mixtral": lambda: (  # the two best experts of a sequence's every token
        hf("MixtralForCausalLM", **CAUSAL, num_local_experts=4, experts_implementation="eager"),
        text(),
    ),
    "hf_t5": lambda: (hf_t5(), {**text(), "decoder_input_ids": tokens(5)}),  # encoder and decoder, relative positions
}


# --- By name ----------------------------------------------------------------------------------------------------------

ARCHITECTURES: dict[str, Callable[[], tuple[nn.Module, Inputs]]] = {
    # Convolutional classifiers
    "lenet": lambda: (LeNet(), images(28, channels=1)),
    "alexnet": lambda: (AlexNet(), images()),
    "vgg_bn": lambda: (vgg_bn(), images()),
    "resnet_basic": lambda: (ResNet([BasicBlock(8, 8), BasicBlock(8, 12, 2), BasicBlock(12, 12)], 12), images()),
    "resnet_option_a": lambda: (ResNet([BasicBlock(8, 8), OptionABlock(8, 14, 2), BasicBlock(14, 14)], 14), images()),
    "resnet_bottleneck": lambda: (ResNet([Bottleneck(8, 6), Bottleneck(12, 8, 2), Bottleneck(16, 8)], 16), images()),
    "preact_resnet": lambda: (ResNet([PreActBlock(8, 8), PreActBlock(8, 12, 2)], 12, final_norm=True), images()),
    "wide_resnet": lambda: (  # dropout between the convolutions
        ResNet([PreActBlock(8, 16, dropout=0.3), PreActBlock(16, 16, dropout=0.3)], 16, final_norm=True),
        images(),
    ),
    "resnext": lambda: (ResNet([Bottleneck(8, 8, groups=4), Bottleneck(16, 8, 2, groups=2)], 16), images()),
    "regnet": lambda: (ResNet([Bottleneck(8, 8, 1, 2, True), Bottleneck(16, 12, 2, 3, True)], 24), images()),
    "densenet": lambda: (densenet(), images()),
    "inception": lambda: (pooled_classifier(conv_norm_act(3, 8), Inception(8), Inception(22), width=22), images(12)),
    "googlenet": lambda: (GoogLeNet(), images()),
    "squeezenet": lambda: (squeezenet(), images()),
    "mobilenet_v1": lambda: (mobilenet_v1(), images()),
    "mobilenet_v2": lambda: (mobilenet_v2(), images()),
    "mobilenet_v3": lambda: (mobilenet_v3(), images()),
    "efficientnet": lambda: (efficientnet(), images()),
    "shufflenet_v1": lambda: (
        pooled_classifier(conv_norm_act(3, 16), ShuffleV1(16), ShuffleV1(16), width=16),
        images(8),
    ),
    "shufflenet_v2": lambda: (
        pooled_classifier(conv_norm_act(3, 16), ShuffleV2(16), ShuffleV2(16), width=16),
        images(8),
    ),
    "convnext": lambda: (ConvNeXt(), images()),
    "convnext_v2": lambda: (ConvNeXt(response_norm=True), images()),
    "ghostnet": lambda: (pooled_classifier(Ghost(3, 12), Ghost(12, 16), width=16), images(8)),
    "repvgg": lambda: (pooled_classifier(conv_norm_act(3, 12), RepVGGBlock(12), RepVGGBlock(12), width=12), images(8)),
    "squeeze_excitation": lambda: (norm_net(lambda width: SqueezeExcitation(width, 4)), images(8)),
    "block_attention": lambda: (norm_net(AttentionModule), images(8)),
    "non_local": lambda: (norm_net(NonLocal), images(8)),
    "maxout": lambda: (pooled_classifier(Maxout(3, 8), Maxout(8, 10), width=10), images(8)),
    "coord_conv": lambda: (CoordConv(), images(8)),
    "spatial_pyramid": lambda: (SpatialPyramid(), images(8)),
    "bilinear_pooling": lambda: (BilinearPooling(), images(8)),
    "group_norm": lambda: (norm_net(lambda width: nn.GroupNorm(4, width)), images(8)),
    "layer_norm_2d": lambda: (norm_net(lambda width: nn.GroupNorm(1, width)), images(8)),  # one group
    "instance_norm": lambda: (norm_net(lambda width: nn.InstanceNorm2d(width, affine=True)), images(8)),
    "prelu": lambda: (norm_net(nn.PReLU), images(8)),  # a slope per channel
    "frozen_batch_norm": lambda: (norm_net(FrozenBatchNorm), images(8)),
    "standardized_weights": lambda: (
        pooled_classifier(StandardizedConv2d(3, 8, 3), nn.ReLU(), StandardizedConv2d(8, 12, 3), nn.ReLU(), width=12),
        images(8),
    ),
    "weight_norm": lambda: (weight_normed(), images()),
    "spectral_norm": lambda: (spectral_normed(), images()),
    "one_channel": lambda: (one_channel(), images(8, channels=1)),
    "hard_coded_views": lambda: (HardCodedViews(), images()),
    # Images to images, several outputs
    "unet": lambda: (UNet(), images()),
    "unet_bilinear": lambda: (UNet(bilinear=True), images()),
    "feature_pyramid": lambda: (FeaturePyramid(), images()),
    "two_heads": lambda: (TwoHeads(), images()),
    "atrous_pyramid": lambda: (AtrousPyramid(), images()),
    "dict_output": lambda: (Detector(), images()),
    "dataclass_output": lambda: (DataclassOutput(), vectors()),
    "conv_autoencoder": lambda: (conv_autoencoder(), images(channels=1)),
    "vae": lambda: (VAE(), vectors()),
    "generator": lambda: (Generator(), vectors()),
    "super_resolution": lambda: (SuperResolution(), images(8)),
    # Vectors
    "mlp": lambda: (mlp(), vectors()),
    "mlp_batch_norm": lambda: (mlp_batch_norm(), vectors()),
    "residual_mlp": lambda: (residual_mlp(), vectors()),
    "layer_scale": lambda: (residual_mlp(lambda width: 0.1 * torch.ones(width)), vectors()),
    "rezero": lambda: (residual_mlp(lambda _: torch.zeros(1), norm=False), vectors()),  # branches start at zero
    "highway": lambda: (Highway(), vectors()),
    "siren": lambda: (Siren(), vectors()),
    "glu": lambda: (GLU(functional=True), vectors()),
    "silu_glu": lambda: (GLU(), sequences()),
    "swiglu": lambda: (nn.Sequential(nn.Linear(12, 16), SwiGLU(), nn.RMSNorm(16), nn.Linear(16, 10)), vectors()),
    "mixture_of_experts": lambda: (MixtureOfExperts(), vectors()),
    "lora": lambda: (lora(), vectors()),
    "siamese": lambda: (Siamese(), (vectors(), vectors())),
    "tied_layers": lambda: (TiedLayers(), vectors()),
    "two_inputs": lambda: (TwoInputs(), (images(), vectors(6, batch=3))),
    "tabular": lambda: (
        Tabular(),
        {"numbers": vectors(5), "colour": torch.tensor([0, 5, 2, 3]), "shape": torch.tensor([4, 0, 1, 2])},
    ),
    "keeps_activation": lambda: (KeepsActivation(), vectors()),
    "checkpointed": lambda: (Checkpointed(), vectors()),
    "unused": lambda: (Unused(), vectors()),
    # Sets, graphs, sequences of numbers
    "point_net": lambda: (PointNet(), signals(3)),
    "graph_convolution": lambda: (GraphConvolution(), (sequences(5, 8), torch.rand(3, 5, 5) + 0.1)),
    "conv3d": lambda: (conv3d(), torch.randn(2, 1, 6, 6, 6)),
    "separable_1d": lambda: (separable_1d(), signals()),
    "wavenet": lambda: (WaveNet(), signals()),
    "temporal": lambda: (TemporalNet(), signals()),
    "lstm": lambda: (Recurrent(nn.LSTM), sequences()),
    "lstm_bidirectional": lambda: (Recurrent(nn.LSTM, bidirectional=True), sequences()),
    "gru": lambda: (Recurrent(nn.GRU), sequences()),
    "gated_recurrence": lambda: (GatedRecurrence(), sequences()),
    "cell_loop": lambda: (CellLoop(), signals()),
    "text_cnn": lambda: (TextCNN(), tokens()),
    # Attention and token mixing
    "encoder_layer": lambda: (EncoderLayer(), sequences()),
    "encoder_layer_norm_first": lambda: (EncoderLayer(norm_first=True, activation="gelu"), sequences()),
    "encoder_layer_batch_second": lambda: (EncoderLayer(batch_first=False), sequences()),
    "encoder_layer_norm_first_batch_second": lambda: (EncoderLayer(batch_first=False, norm_first=True), sequences()),
    "encoder": lambda: (Encoder(), text()),
    "cross_attention": lambda: (CrossAttention(), (sequences(), sequences(5, 8))),
    "decoder_layer": lambda: (Decoder(), (tokens(), sequences())),
    "separate_attention": lambda: (on_sequences(Block(SeparateAttention())), sequences()),
    "fused_attention": lambda: (on_sequences(Block(FusedAttention())), sequences()),
    "qk_norm_attention": lambda: (on_sequences(Block(FusedAttention(qk_norm=True))), sequences()),
    "explicit_attention": lambda: (on_sequences(Block(ExplicitAttention())), sequences()),
    "alibi_attention": lambda: (on_sequences(Block(AlibiAttention())), sequences()),
    "rotary_attention": lambda: (on_sequences(Block(RotaryAttention(), norm=nn.RMSNorm, mlp=SwiGLU())), sequences()),
    "grouped_query_attention": lambda: (on_sequences(Block(RotaryAttention(groups=2)), norm=nn.RMSNorm), sequences()),
    "multi_query_attention": lambda: (on_sequences(Block(RotaryAttention(groups=1), parallel=True)), sequences()),
    "linear_attention": lambda: (on_sequences(Block(LinearAttention())), sequences()),
    "fourier_mixing": lambda: (on_sequences(Block(FourierMixing())), sequences()),
    "perceiver": lambda: (Perceiver(), sequences()),
    "vision_transformer": lambda: (VisionTransformer(), images()),
    "language_model": lambda: (LanguageModel(lambda: SeparateAttention(causal=True)), tokens()),
    "language_model_tied": lambda: (LanguageModel(ExplicitAttention, tied=True), tokens()),
    "mlp_mixer": lambda: (Mixer(), images()),
    "gmlp": lambda: (on_sequences(SpatialGate(), SpatialGate()), sequences()),
}
if importlib.util.find_spec("transformers"):
    ARCHITECTURES |= HF


def make(name: str, seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, Inputs]:
    """Build the architecture called ``name``, in eval mode, without the ones and zeros that networks start with."""
    torch.manual_seed(seed)
    net, inputs = ARCHITECTURES[name]()
    with torch.no_grad():
        for full_name, tensor in [*net.named_parameters(), *net.named_buffers()]:
            if tensor.is_floating_point() and tensor.numel() > 1:
                _randomize(full_name, tensor)
    inputs = tree_map(lambda x: x.to(dtype) if x.is_floating_point() else x, inputs)
    return net.eval().to(dtype), inputs


def _randomize(full_name, tensor):
    """Draw statistics, biases and what is constant, such as weights of norms; zeros with a purpose stay.

    Those are the matrices of LoRA, gains of global response norms and scalars of ReZero.
    """
    name = full_name.rpartition(".")[2]
    if name == "running_var":
        tensor.uniform_(0.5, 2)
    elif tensor.dim() == 1 and (name == "running_mean" or name.endswith("bias")):
        tensor.normal_(0, 0.3)
    elif (tensor == tensor.flatten()[0]).all() and (tensor.dim() == 1 or "position" in name or "token" in name):
        tensor += torch.rand_like(tensor) - 0.5
    elif tensor.dim() > 2 and name == "weight" and tensor.abs().max() < 1.01 * tensor[0].numel() ** -0.5:
        tensor *= 2  # torch's default for convolutions, which shrinks the signal to less than a half per layer
