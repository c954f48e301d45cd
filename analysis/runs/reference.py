"""What the paper's reference implementation does otherwise: its log-odds, its weights of the KL, its count."""

import math
from collections.abc import Mapping

from torch import nn

from pyro_bmrs.checks import check_integer, check_module
from pyro_bmrs.model.noise import MultiplicativeNoise, noise_layers

__all__ = ["REFERENCE_LOG_ODDS", "reference_compression", "reference_kl_weights"]

REFERENCE_LOG_ODDS = 0.5 * math.log(2 * math.pi)
"""The reference leaves the term -log(2 pi) / 2 of eq. 8 out, so that its Delta F is that much too large everywhere."""

_NOTHING = "", nn.Identity()  # before the first layer and behind the last


def reference_compression(net: nn.Module, kept: Mapping[str, int]) -> float:
    """Return the fraction of parameters that the reference would say is removed; what the paper's tables have.

    It counts the posteriors' two parameters per structure as the network's own, and biases as never removed. Inputs of
    a layer go with the structures before it only where they are as many: behind the flattened maps of LeNet-5's filters
    no input of the dense layer goes, which has 48,000 of its 61,706 parameters.

    Args:
        net: The dense network, noise between its layers.
        kept: Structures kept, by the name of their noise layer.

    References:
        BMRS: Bayesian Model Reduction for Structured Pruning (Wright et al., 2024), its published code
    """
    layers = [
        (name, m) for name, m in net.named_modules() if isinstance(m, nn.Linear | nn.Conv2d | MultiplicativeNoise)
    ]
    chain: list[tuple[str, nn.Module]] = [_NOTHING, *layers, _NOTHING]
    total = left = 0
    for before, (name, layer), behind in zip(chain, layers, chain[2:], strict=False):
        if isinstance(layer, MultiplicativeNoise):
            total, left = total + 2 * layer.size, left + 2 * kept[name]
            continue
        outputs, inputs = layer.weight.shape[:2]
        each, biases = layer.weight[0, 0].numel(), 0 if layer.bias is None else layer.bias.numel()
        total += layer.weight.numel() + biases
        left += _left(outputs, behind, kept) * _left(inputs, before, kept) * each + biases
    return 1 - left / total


def _left(width: int, neighbour: tuple[str, nn.Module], kept: Mapping[str, int]) -> int:
    """Return how many of a layer's outputs or inputs stay, given what is next to them."""
    name, noise = neighbour
    return kept[name] if isinstance(noise, MultiplicativeNoise) and noise.size == width else width


def reference_kl_weights(net: nn.Module, num_data: int) -> dict[str, float]:
    r"""Return the weights of each site's KL that the paper's reference code has, for ``NoisyNetwork(kl_weight=...)``.

    Its loss is the mean cross-entropy plus the mean over layers of the mean KL over a layer's structures. Against the
    exact ELBO, mean cross-entropy plus the sum of all KL over the number of examples N, a layer of n structures among
    L layers is weighted :math:`N / (L n)` times.

    Args:
        net: Network with noise layers.
        num_data: Number of training examples N.
    """
    check_module("net", net)
    check_integer("num_data", num_data, low=1, what="the number of training examples")
    layers = noise_layers(net)
    return {site: num_data / (len(layers) * layer.size) for site, layer in layers.items()}
