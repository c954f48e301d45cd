"""Weights with a prior (Pyro's ``PyroSample``): in copies that are traced and cut they are ordinary parameters."""

from collections.abc import Mapping

import torch
from pyro.nn import PyroModule
from torch import Tensor, nn

from pyro_bmrs.structures.copying import copied, undisturbed

__all__ = ["fix_sampled_weights", "sampled_weights", "with_fixed_weights"]


def sampled_weights(net: nn.Module) -> dict[str, tuple[PyroModule, str]]:
    """Return the modules and attributes that have a prior, by the name of their sample site.

    The name is known once the network is in a ``NoisyNetwork``; before, it is that within the network.
    """
    found = {}
    for path, module in net.named_modules():
        if isinstance(module, PyroModule):
            for attribute in module._pyro_samples:
                name = module._pyro_name or path
                found[f"{name}.{attribute}" if name else attribute] = (module, attribute)
    return found


def with_fixed_weights(net: nn.Module) -> nn.Module:
    """Return the network, or where weights have a prior a copy in which they are parameters, drawn from it."""
    if not sampled_weights(net):
        return net
    net = copied(net)
    with undisturbed(net):
        fix_sampled_weights(net)
    return net


@torch.no_grad()
def fix_sampled_weights(net: nn.Module, values: Mapping[str, Tensor] | None = None) -> None:
    """Make every weight that has a prior an ordinary parameter, in place.

    Args:
        net: The network, a copy.
        values: Its values, by the name of the sample site; by default they are drawn from the priors.

    Raises:
        ValueError: If one of them has no value.
    """
    weights = sampled_weights(net)
    lacking = [name for name in weights if values is not None and name not in values]
    if lacking:
        raise ValueError(
            f"the guide has no posterior of the weights {lacking[0]!r}, which have a prior: add one, "
            "guide.add_latents(AutoNormal), and fit it"
        )
    drawn = {name: getattr(*weight) if values is None else values[name] for name, weight in weights.items()}
    for name, (module, attribute) in weights.items():
        delattr(module, attribute)
        setattr(module, attribute, nn.Parameter(drawn[name].detach().clone()))
