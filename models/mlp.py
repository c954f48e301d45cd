"""The paper's tanh MLP, with noise after each activation."""

from collections import OrderedDict

from torch import nn

from pyro_bmrs import MultiplicativeNoise

__all__ = ["mlp"]


def mlp(
    in_features: int, hidden: int = 100, layers: int = 8, classes: int = 10, input_noise: bool = False
) -> nn.Sequential:
    """Return a tanh MLP on flattened inputs.

    Args:
        in_features: Elements of one input.
        hidden: Neurons of each hidden layer.
        layers: Number of hidden layers; the paper's "first and n further" are n + 1.
        classes: Number of outputs.
        input_noise: Whether each element of the inputs has noise too, and can go.
    """
    modules: OrderedDict[str, nn.Module] = OrderedDict(flatten=nn.Flatten())
    if input_noise:
        modules["input_noise"] = MultiplicativeNoise(in_features)
    for i in range(1, layers + 1):
        modules[f"fc{i}"] = nn.Linear(in_features if i == 1 else hidden, hidden)
        modules[f"fc{i}_activation"] = nn.Tanh()
        modules[f"fc{i}_noise"] = MultiplicativeNoise(hidden)
    modules["output"] = nn.Linear(hidden if layers else in_features, classes)
    return nn.Sequential(modules)
