"""Weights with a prior (Pyro's ``PyroSample``): in copies that are traced and cut they are ordinary parameters."""

from collections.abc import Iterator, Mapping

import torch
from pyro.nn import PyroModule
from torch import Tensor, nn

from pyro_bmrs.structures.copying import copied, undisturbed

__all__ = ["fix_sampled_weights", "sampled_sites", "with_fixed_weights"]


def sampled_sites(net: nn.Module) -> list[str]:
    """Return the names of the sample sites of weights that have a prior.

    Pyro names such a weight after the ``PyroModule`` modules that it is in: in plain ones by its attribute alone.
    """
    return [site for site, _, _ in _sampled_weights(net)]


def with_fixed_weights(net: nn.Module) -> nn.Module:
    """Return the network, or where weights have a prior a copy in which they are parameters, drawn from it."""
    if not sampled_sites(net):
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
    weights = list(_sampled_weights(net))
    lacking = [site for site, _, _ in weights if values is not None and site not in values]
    if lacking:
        raise ValueError(
            f"the guide has no posterior of the weights {lacking[0]!r}, which have a prior: add one, "
            "guide.add_latents(AutoNormal), and fit it"
        )
    fixed = [getattr(module, attribute) if values is None else values[site] for site, module, attribute in weights]
    for (_, module, attribute), value in zip(weights, fixed, strict=True):
        delattr(module, attribute)
        setattr(module, attribute, nn.Parameter(value.detach().clone()))


def _sampled_weights(net: nn.Module) -> Iterator[tuple[str, PyroModule, str]]:
    """Iterate over site, module and attribute of each weight that has a prior."""
    for module in net.modules():
        if isinstance(module, PyroModule):
            for attribute in module._pyro_samples:
                yield f"{module._pyro_name}.{attribute}" if module._pyro_name else attribute, module, attribute
