"""From masks to a smaller network in the middle of its training: weights, posterior and optimiser state, in place."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from pyro_bmrs.checks import described
from pyro_bmrs.structures.compact import structures_of
from pyro_bmrs.structures.copying import copied, undisturbed
from pyro_bmrs.structures.inputs import Inputs
from pyro_bmrs.structures.pair import check_pair
from pyro_bmrs.structures.points import Attachment, noise_points
from pyro_bmrs.structures.removal import cut_tensors, take
from pyro_bmrs.structures.structure_set import StructureSet
from pyro_bmrs.structures.trial import Bench

if TYPE_CHECKING:
    from pyro_bmrs.model.guides.flat import FlatGuide
    from pyro_bmrs.model.network import NoisyNetwork

__all__ = ["shrink", "shrink_known"]


def shrink(model: "NoisyNetwork", guide: "FlatGuide", optimizer: Optimizer, example_input: Inputs) -> dict[str, Tensor]:
    """Take the structures that the model's masks remove out of network, guide and optimiser, and train on faster.

    The steps that follow are those of the masked network: same losses, same weights, same posteriors of what remains.
    That holds for a structure from which, with its noise at zero, nothing reaches the layers behind, whatever the
    weights. Others stay, masked: where ``f(0)`` of what stands behind the noise is not zero (a sigmoid), or may become
    so (batch normalisation), the next layer's weights for them are a bias that goes on learning. So do structures that
    no layer produces one by one (pixels of a filter's map), those that share a layer's positions with structures which
    are kept, and the first of a layer that would lose all: layers cannot be empty.

    "The same" is up to rounding, of which Adam makes whole steps where a gradient is nothing else: a bias in front of
    batch normalisation drifts differently, which the loss does not feel, and running means follow it.

    Parameters stay the same objects with smaller data, and lose their gradients; what the optimiser remembers of them
    is cut alike. Whatever has recorded their sizes or addresses (a compiled or captured step, a DDP wrapper, a graph
    kept from an earlier loss) has to be made again.

    Args:
        model: The model, its network cut in place.
        guide: Its guide, cut in place.
        optimizer: Any optimiser that remembers, for each parameter, numbers and tensors of the parameter's shape.
        example_input: Inputs of any batch size; only their shapes and types matter.

    Returns:
        For each site the positions kept, among those before the call: increasing integers of shape ``(new size,)``, on
        the CPU.

    Raises:
        TypeError: If ``model``, ``guide`` or ``optimizer`` is something else.
        ValueError: If the guide is another model's or has other latent sites, or the optimiser remembers something
            else.
        RuntimeError: If a copy, cut first, has other outputs than the masked network. Nothing has been changed then.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), bmrs.MultiplicativeNoise(8), nn.Linear(8, 3))
        >>> model = bmrs.NoisyNetwork(net, num_data=100)
        >>> guide = bmrs.TruncatedLogNormalGuide(model)
        >>> optimizer = torch.optim.Adam([*model.parameters(), *guide.parameters()])
        >>> model.noise["2.theta"].remove(torch.arange(8) < 5)
        >>> bmrs.shrink(model, guide, optimizer, torch.randn(2, 4))
        {'2.theta': tensor([5, 6, 7])}
        >>> net[0]
        Linear(in_features=4, out_features=3, bias=True)
    """
    check_pair(model, guide)
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"optimizer must be a torch.optim.Optimizer, but got {described(optimizer)}")
    if guide.latents is not None:
        raise ValueError("shrink is for noise alone, but the guide has other latent sites: compact in the end instead")
    if bool(guide.keep.all()):
        return {site: torch.arange(size) for site, size in model.sizes.items()}
    return shrink_known(model, guide, optimizer, example_input, structures_of(model.net, example_input))[0]


@torch.no_grad()
def shrink_known(
    model: "NoisyNetwork", guide: "FlatGuide", optimizer: Optimizer, example_input: Inputs, structures: StructureSet
) -> tuple[dict[str, Tensor], StructureSet]:
    """Do what ``shrink`` does with what is known of the network, and return what is known of it afterwards."""
    if bool(guide.keep.all()):
        return {site: torch.arange(size) for site, size in model.sizes.items()}, structures
    _check_state(optimizer)
    record = structures.record
    dead = record.dead(model.masks, in_place=True)
    kept = {name: (~record.removed_structures(record.sites[name], dead)).nonzero().squeeze(1) for name in model.sizes}
    _try_on_copy(model.net, structures, dead, example_input)
    net = model.net.net if isinstance(model.net, Attachment) else model.net
    parameters = dict(net.named_parameters())
    for (name, d), removed in record.removed(dead).items():
        if name in parameters:
            _keep_memory(optimizer, [parameters[name]], d, (~removed).nonzero().squeeze(1))
    cut_tensors(net, record, dead)
    for name, layer in model.noise.items():
        layer.forget()
        if len(kept[name]) < layer.size:
            layer.select(kept[name])
    left = structures.without(dead)
    if isinstance(model.net, Attachment):
        model.net.follow(left)
    ends = torch.tensor(list(guide.sizes.values())).cumsum(0).tolist()
    starts = [0, *ends[:-1]]
    flat = torch.cat([start + kept[site] for start, site in zip(starts, guide.sizes, strict=True)]).to(guide.device)
    _keep_memory(optimizer, guide.parameters(), 0, flat)
    guide.select(flat)
    return kept, left


def _try_on_copy(net: nn.Module, structures: StructureSet, dead: Tensor, example_input: Inputs) -> None:
    """Raise unless the network that only masks has the same outputs once it is cut."""
    copy: Any = copied(net).eval()
    bench = Bench.of(copy, example_input, structures.record.low_precision, trials=1, randomise=False)
    record, copy = structures.record, bench.net
    with undisturbed(copy):
        expected, masked = bench.run(copy, 0), copied(copy)
        runs_in_training = bench.runs_in_training(copy)
        cut_tensors(copy.net if isinstance(copy, Attachment) else copy, record, dead)
        for name, point in noise_points(copy).items():
            point.select((~record.removed_structures(record.sites[name], dead)).nonzero().squeeze(1))
        if isinstance(copy, Attachment):
            copy.follow(structures.without(dead))
        off = bench.error(bench.run(copy, 0), expected, masked, 0)
        if runs_in_training and not bench.runs_in_training(copy):
            raise RuntimeError(
                "the network uses layers in train mode that it does not use in eval mode, where its structures were "
                "found, and cannot be shrunk while it trains; leave shrink out, and compact it in the end"
            )
    if off is not None:
        raise RuntimeError(
            f"the smaller network differs from the masked one by {off:.2g} of its outputs' spread: its structures were "
            "misread; please report the architecture"
        )


def _keep_memory(optimizer: Optimizer, parameters: Iterable[nn.Parameter], dim: int, kept: Tensor) -> None:
    """Cut what the optimiser remembers of parameters, before they are cut themselves."""
    for parameter in parameters:
        if parameter.dim() > dim and parameter in optimizer.state:
            memory: dict[str, Any] = optimizer.state[parameter]
            for name, value in memory.items():
                if isinstance(value, Tensor) and value.dim() == parameter.dim():
                    memory[name] = take(value, dim, kept)


def _check_state(optimizer: Optimizer) -> None:
    for parameter, memory in optimizer.state.items():
        for name, value in memory.items():
            cuttable = isinstance(value, Tensor) and (value.dim() == 0 or value.shape == parameter.shape)
            if not (cuttable or value is None or isinstance(value, int | float)):
                found = f"tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
                raise ValueError(
                    f"{type(optimizer).__name__} remembers {name!r}, a {found}, of a parameter of shape "
                    f"{tuple(parameter.shape)}, which cannot be cut with it; use an optimiser such as Adam or SGD, or "
                    "leave the structures masked"
                )
