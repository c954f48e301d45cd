"""How the paper's reference implementation counts the parameters that pruning removes."""

from collections.abc import Mapping

from torch import nn

from pyro_bmrs.noise import MultiplicativeNoise

__all__ = ["reference_compression"]


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
    total = left = 0
    before: tuple[int, int] | None = None  # structures of the noise before the next layer, and how many of them stay
    layers = [
        (name, m) for name, m in net.named_modules() if isinstance(m, nn.Linear | nn.Conv2d | MultiplicativeNoise)
    ]
    for i, (name, layer) in enumerate(layers):
        if isinstance(layer, MultiplicativeNoise):
            before = layer.size, kept[name]
            total, left = total + 2 * layer.size, left + 2 * kept[name]
            continue
        outputs, inputs = layer.weight.shape[:2]
        each, biases = layer.weight[0, 0].numel(), 0 if layer.bias is None else layer.bias.numel()
        behind = layers[i + 1] if i + 1 < len(layers) else None
        outputs_left = kept[behind[0]] if behind and isinstance(behind[1], MultiplicativeNoise) else outputs
        inputs_left = before[1] if before and before[0] == inputs else inputs
        total, left = total + layer.weight.numel() + biases, left + outputs_left * inputs_left * each + biases
        before = None
    return 1 - left / total
