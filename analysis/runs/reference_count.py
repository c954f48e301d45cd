"""How the paper's reference implementation counts the parameters that pruning removes."""

from collections.abc import Mapping

from torch import nn

from pyro_bmrs.model.noise import MultiplicativeNoise

__all__ = ["reference_compression"]

_NOTHING = "", nn.Identity()  # before the first layer and behind the last


def reference_compression(net: nn.Module, kept: Mapping[str, int]) -> float:
    """Return the fraction of parameters that the reference would say is removed; what the paper's tables have.

    It counts the posteriors' two parameters a structure as the network's own, and biases as never removed. Inputs of a
    layer go with the structures before it only where they are as many: behind the flattened maps of LeNet-5's filters
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
