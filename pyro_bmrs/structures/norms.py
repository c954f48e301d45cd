"""Layer norms and RMS norms over channels that are removed one by one: which there are, and what becomes of them.

Both divide by an average over all channels. Once some are removed, a plain layer norm averages over the rest, which is
something else; one that still counts the channels that are removed, as zeros, does not. An RMS norm needs no new layer:
the mean square over K of D channels is D/K times that over all, whose others are zero.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pyro_bmrs.structures.layers import ChannelScale, CountedLayerNorm
from pyro_bmrs.structures.points import replace_everywhere
from pyro_bmrs.structures.record import Record

__all__ = ["averaging_norms", "legible_norms", "narrow_norms"]

_EPS = ("eps", "variance_epsilon", "epsilon")


class _LegibleRMSNorm(nn.Module):
    """An RMS norm in one operation, where another class computes it in several."""

    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.weight, self.eps = norm.weight, getattr(norm, _eps_name(norm))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.rms_norm(x, (len(self.weight),), self.weight, self.eps)


class _LegibleLayerNorm(nn.Module):
    """A layer norm that counts channels which are removed, as one operation that reads the same tensors."""

    scale: Tensor

    def __init__(self, norm: CountedLayerNorm) -> None:
        super().__init__()
        self.weight, self.bias = norm.weight, norm.bias
        self.register_buffer("scale", norm.scale)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.layer_norm(x * self.scale, (len(self.scale),), self.weight, self.bias)


def averaging_norms(net: nn.Module) -> set[str]:
    """Return the names of the layer norms and RMS norms with a weight for each channel, in whatever class.

    Those inside ``nn.TransformerEncoderLayer`` are left out, whose fast path reads their attributes.
    """
    read_by_others = {
        id(child)
        for module in net.modules()
        if isinstance(module, nn.TransformerEncoderLayer)
        for child in module.children()
    }
    return {
        name
        for name, module in net.named_modules()
        if id(module) not in read_by_others and (_is_layer_norm(module) or _is_rms_norm(module))
    }


def legible_norms(net: nn.Module) -> nn.Module:
    """Have norms that are written out run as one operation, which labels can follow; in place, weights kept."""
    for module in list(net.modules()):
        if isinstance(module, CountedLayerNorm):
            net = replace_everywhere(net, module, _LegibleLayerNorm(module))
        elif _is_rms_norm(module) and type(module) is not nn.RMSNorm:
            net = replace_everywhere(net, module, _LegibleRMSNorm(module))
    return net


def _is_layer_norm(module: nn.Module) -> bool:
    return type(module) in (nn.LayerNorm, _LegibleLayerNorm) and _is_vector(module.weight)


def _is_rms_norm(module: Any) -> bool:
    """Return whether a module divides by the root of the mean square over its last dimension: by trying it."""
    if type(module) in (nn.RMSNorm, _LegibleRMSNorm):
        return _is_vector(module.weight)
    if "RMSNorm" not in type(module).__name__ and type(module).__name__ != "T5LayerNorm":
        return False
    own = [(name, each) for name, each in module.named_parameters()]
    if [name for name, _ in own] != ["weight"] or not _is_vector(module.weight) or _eps_name(module) is None:
        return False
    weight, eps = module.weight.detach(), getattr(module, _eps_name(module))
    x = torch.linspace(-2, 3, 3 * len(weight), dtype=weight.dtype, device=weight.device).sin().view(3, -1)
    expected = nn.functional.rms_norm(x.double(), (len(weight),), weight.double(), eps)
    try:
        with torch.no_grad():
            found = module(x)
    except Exception:  # it takes something else
        return False
    return isinstance(found, Tensor) and torch.allclose(found.double(), expected, rtol=1e-5, atol=1e-6)


def _is_vector(weight: Any) -> bool:
    return isinstance(weight, Tensor) and weight.dim() == 1


def _eps_name(module: Any) -> Any:
    return next((name for name in _EPS if isinstance(getattr(module, name, None), float)), None)


def narrow_norms(net: nn.Module, record: Record, dead: Tensor, scales: Mapping[str, Tensor]) -> nn.Module:
    """Have norms whose tensors have been cut go on counting the channels that are removed, and return the network.

    Args:
        net: The network, in place.
        record: Its record, before the cut.
        dead: The classes that are removed.
        scales: For each norm what its input is multiplied with, of shape ``(channels before the cut,)``.
    """
    for name, axis in record.averaged.items():
        norm: Any = net.get_submodule(name)
        kept = ~torch.where(axis >= 0, dead[axis.clamp_min(0)], False)
        scale = scales[name][kept].to(norm.weight)
        if bool(kept.all()) and bool((scale == 1).all()):
            continue
        if type(norm) is CountedLayerNorm:
            new: nn.Module = CountedLayerNorm(norm.weight, norm.bias, norm.scale * scale, norm.count, norm.eps)
        elif type(norm) is nn.LayerNorm:
            new = CountedLayerNorm(norm.weight, norm.bias, scale, len(axis), norm.eps)
        else:
            _count_in_rms_norm(norm, len(axis) / len(scale))
            new = nn.Sequential(ChannelScale(scale, -1), norm)
        net = replace_everywhere(net, norm, new)
    return net


def _count_in_rms_norm(norm: Any, share: float) -> None:
    """Have an RMS norm divide by the mean square over ``share`` as many channels, in place."""
    name = _eps_name(norm) or "eps"
    eps = getattr(norm, name)
    setattr(norm, name, share * (torch.finfo(norm.weight.dtype).eps if eps is None else eps))
    norm.weight.data *= math.sqrt(share)
