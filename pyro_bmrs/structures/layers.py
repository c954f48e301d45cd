"""Plain layers that surgery leaves behind, where what remains cannot be said by smaller layers alone."""

import torch
from torch import Tensor, nn

__all__ = ["ChannelGather", "ChannelScale", "ChannelScatter", "CountedLayerNorm"]


class ChannelScale(nn.Module):
    """Multiply each channel by a constant: noise at a fixed value, where it cannot be folded into weights.

    Args:
        scale: Factors, of shape ``(channels,)``.
        dim: Dimension of the input that indexes channels.
    """

    scale: Tensor

    def __init__(self, scale: Tensor, dim: int = 1) -> None:
        super().__init__()
        self.register_buffer("scale", scale)
        self.dim = dim

    def forward(self, x: Tensor) -> Tensor:
        shape = [1] * x.dim()
        shape[self.dim] = -1
        return x * self.scale.to(x.dtype).view(shape)


class ChannelGather(nn.Module):
    """Pass on some of the channels: where what remains is finer than what a layer makes, or is an input.

    Args:
        index: Channels to pass on, of shape ``(channels,)``.
        dim: Dimension of the input that indexes channels.
    """

    index: Tensor

    def __init__(self, index: Tensor, dim: int = 1) -> None:
        super().__init__()
        self.register_buffer("index", index)
        self.dim = dim

    def forward(self, x: Tensor) -> Tensor:
        return x.index_select(self.dim, self.index)


class ChannelScatter(nn.Module):
    """Put the channels that are still computed where a sum expects them, and zeros elsewhere.

    Args:
        index: For each channel of the input its place in the output, of shape ``(channels,)``.
        size: Number of channels of the output.
        dim: Dimension that indexes channels.
    """

    index: Tensor

    def __init__(self, index: Tensor, size: int, dim: int = 1) -> None:
        super().__init__()
        self.register_buffer("index", index)
        self.size, self.dim = size, dim

    def forward(self, x: Tensor) -> Tensor:
        shape = list(x.shape)
        shape[self.dim] = self.size
        return torch.zeros(shape, dtype=x.dtype, device=x.device).index_copy(self.dim, self.index, x)


class CountedLayerNorm(nn.Module):
    r"""Normalise the K channels that are left of ``count``, as a layer norm over all would whose others are zero.

    With :math:`x` the scaled input, :math:`m = \sum_K x / D` and :math:`D` = ``count`` the variance is
    :math:`(\sum_K (x - m)^2 + (D - K) m^2) / D`.

    Args:
        weight: Of shape ``(channels,)``.
        bias: Of the same shape, or None.
        scale: What the input is multiplied with first, of the same shape.
        count: Number of channels that are counted.
        eps: What the variance is increased by.
    """

    scale: Tensor

    def __init__(
        self, weight: nn.Parameter, bias: nn.Parameter | None, scale: Tensor, count: int, eps: float = 1e-5
    ) -> None:
        super().__init__()
        self.weight, self.bias = weight, bias
        self.register_buffer("scale", scale)
        self.count, self.eps = count, eps

    def forward(self, x: Tensor) -> Tensor:
        x = x * self.scale
        mean = x.sum(-1, keepdim=True) / self.count
        off = x - mean
        removed = self.count - x.shape[-1]
        variance = (off.square().sum(-1, keepdim=True) + removed * mean.square()) / self.count
        y = off * torch.rsqrt(variance + self.eps) * self.weight
        return y if self.bias is None else y + self.bias

    def extra_repr(self) -> str:
        return f"{len(self.scale)} of {self.count}, eps={self.eps}"
