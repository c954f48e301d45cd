"""What cannot be removed later is refused before training, with what to do about it."""

from typing import Literal, get_args

from torch import nn

from pyro_bmrs.structures.compact import plain_copy, structures_of, without_noise
from pyro_bmrs.structures.discovery import find_structures
from pyro_bmrs.structures.inputs import Inputs
from pyro_bmrs.structures.points import Attachment
from pyro_bmrs.structures.structure_set import StructureSet
from pyro_bmrs.structures.trial import Bench, proved

__all__ = ["Unremovable", "removable_structures"]

Unremovable = Literal["refuse", "mask"]


def removable_structures(
    net: nn.Module, example_input: Inputs, structures: StructureSet | None = None, unremovable: Unremovable = "refuse"
) -> StructureSet:
    """Return the proved structures of a network with noise, before it is trained.

    Args:
        net: The network, with noise inside or attached.
        example_input: Inputs like those it will be trained on.
        structures: What is known of it already.
        unremovable: What to do with sites whose structures cannot be removed later: ``"refuse"`` them, or ``"mask"``
            them only.

    Raises:
        ValueError: If a site cannot be removed, unless it is to be masked only.
    """
    if unremovable not in get_args(Unremovable):
        raise ValueError(f"unremovable must be one of {get_args(Unremovable)}, but got {unremovable!r}")
    if structures is None or isinstance(net, Attachment):
        structures = structures_of(net, example_input)
    if not structures.proved:
        plain = plain_copy(net)
        structures = proved(structures, Bench.of(plain, example_input, structures.record.low_precision))
    sites = {f"{name.removesuffix('.theta')}.theta": why for name, why in structures.refused.items()}
    for site in structures.record.sites:
        if site in sites and unremovable == "refuse":
            raise ValueError(
                f"the structures of {site!r} cannot be removed: {sites[site]}; {_remedy(net, example_input)}"
            )
    return structures


def _remedy(net: nn.Module, example_input: Inputs) -> str:
    """Return what to do about it in this network."""
    mask = 'to mask them only, give fit unremovable="mask"'
    offered = list(find_structures(without_noise(net), example_input))
    if not offered:
        return f"take this noise out, or {mask}"
    shown = ", ".join(map(repr, offered[:6])) + (", ..." if len(offered) > 6 else "")
    return (
        f"take this noise out, and where it is to be replaced use attach_noise(net, find_structures(net, x)), which "
        f"finds {shown} in the network without noise; or {mask}"
    )
