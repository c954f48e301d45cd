"""What a network costs: parameters (of a real one, or of one still masked), floating-point operations, time."""

import math
import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from pyro_bmrs.checks import check_flag, check_integer, check_module, described
from pyro_bmrs.structures.compact import plain_copy, structures_of
from pyro_bmrs.structures.copying import undisturbed
from pyro_bmrs.structures.inputs import Inputs, call, call_example, to_network
from pyro_bmrs.structures.masks import check_mapping, check_masks
from pyro_bmrs.structures.points import noise_points
from pyro_bmrs.structures.record import Record
from pyro_bmrs.structures.removal import cut, fixed_copy
from pyro_bmrs.structures.sampled_weights import with_fixed_weights
from pyro_bmrs.structures.structure_set import StructureSet, check_structures

__all__ = [
    "cost_kl_weights",
    "cost_log_odds",
    "count_flops",
    "count_parameters",
    "measure_latency",
]


def count_parameters(
    net: nn.Module,
    structures: StructureSet | None = None,
    masks: Mapping[str, Tensor] | None = None,
    *,
    rows_only: bool = False,
) -> int:
    """Return the number of parameters, of ``net`` as it is or as masks would leave it once it is compacted.

    Tied parameters count once, frozen ones and weights with a prior too. The posterior's own parameters are the guide's
    and do not count.

    Args:
        net: The network.
        structures: What ``find_structures`` has said of it, where there are masks.
        masks: For each site a bool tensor of shape ``(size,)``, True = keep, in the numbering of the original network.
        rows_only: Whether a masked structure loses no more than the rows that make it, as papers count whose networks
            are only masked; what reads it stays, and so does a channel of a sum that others write too.

    Raises:
        TypeError, ValueError: If a mask does not fit.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> structures = bmrs.find_structures(net, torch.randn(2, 4))
        >>> bmrs.count_parameters(net), bmrs.count_parameters(net, structures, {"0.theta": torch.arange(8) < 5})
        (67, 43)
    """
    check_module("net", net)
    check_flag("rows_only", rows_only)
    if structures is None or masks is None:
        return sum(parameter.numel() for parameter in with_fixed_weights(net).parameters())
    record, masks = _masked(net, structures, masks)
    return record.count_if_masked(masks) if rows_only else record.count_parameters(record.dead(masks))


def count_flops(
    net: nn.Module,
    example_input: Inputs,
    structures: StructureSet | None = None,
    masks: Mapping[str, Tensor] | None = None,
) -> int:
    """Return the floating-point operations of one forward pass over ``example_input`` (2 per multiply-add).

    Those that torch's counter knows: products of matrices, convolutions and attention. With masks those of the network
    that is really cut.

    Args:
        net: The network.
        example_input: A tensor, a tuple of positional inputs or a mapping of named ones.
        structures: See ``count_parameters``.
        masks: See ``count_parameters``.

    Raises:
        ValueError: If a mask does not fit.

    Example:
        >>> bmrs.count_flops(nn.Linear(4, 8), torch.randn(1, 4))
        64
    """
    check_module("net", net)
    plain = with_fixed_weights(plain_copy(net)).requires_grad_(False).eval()
    with undisturbed(plain):
        if structures is not None and masks is not None:
            record, masks = _masked(net, structures, masks)
            values = {site: mask.to(torch.get_default_dtype()) for site, mask in masks.items()}
            plain = cut(fixed_copy(plain, record, values), record, masks, values)
        with FlopCounterMode(display=False) as counter:
            call_example(plain, to_network(example_input, plain))
    return counter.get_total_flops()


def cost_log_odds(
    net: nn.Module, example_input: Inputs, mean: float, cost: Literal["parameters", "flops"] = "parameters"
) -> dict[str, Tensor]:
    """Return prior log-odds of absence proportional to what each structure costs: expensive ones have more to prove.

    Args:
        net: Network with noise layers.
        example_input: Inputs of shape ``(batch, ...)`` to trace it with.
        mean: Mean log-odds over all structures, for instance ``math.log(3)``.
        cost: ``"parameters"`` or ``"flops"`` of the layers that produce and consume the structure.

    Returns:
        For each site a tensor of shape ``(size,)``, to give to an evidence criterion as ``prior_log_odds``.

    Raises:
        ValueError: If ``cost`` is neither, or ``mean`` not a finite number.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), bmrs.MultiplicativeNoise(8), nn.Linear(8, 3))
        >>> bmrs.cost_log_odds(net, torch.randn(2, 4), mean=1.0)["2.theta"].mean()
        tensor(1.)
    """
    _check(net, mean, cost)
    costs = _costs(net, example_input, cost, None)
    average = torch.cat(list(costs.values())).mean()
    return {site: mean * each / average for site, each in costs.items()}


def cost_kl_weights(
    net: nn.Module,
    example_input: Inputs,
    mean: float,
    cost: Literal["parameters", "flops"] = "parameters",
    masks: Mapping[str, Tensor] | None = None,
) -> dict[str, float]:
    """Return a weight of each site's KL proportional to what one of its structures costs, on average over the site.

    With one weight for all sites, narrow layers of cheap structures lose as many of them as wide layers of expensive
    ones, which costs accuracy and saves little. A KL that is scaled by a price, nats per parameter, does not do so.
    What a structure costs falls with the number of its neighbours: an input of a layer with 500 units is expensive,
    and cheap once 10 are left. So give prices at the size that you want to reach, that of an earlier fit for instance.

    Args:
        net: Network with noise layers.
        example_input: Inputs of shape ``(batch, ...)`` to trace it with.
        mean: Mean weight over all structures, or over those that ``masks`` keeps.
        cost: See ``cost_log_odds``.
        masks: For each site a tensor of shape ``(size,)``, True where the structure is there when prices are taken; by
            default all are. A ``FitResult`` has such masks.

    Returns:
        For each site a number, to give to a model as ``kl_weight``.

    Raises:
        ValueError: If ``cost`` is neither, ``mean`` not a finite number, or ``masks`` are not of the network's sites or
            keep nothing of one.

    Example:
        >>> layers = [nn.Linear(4, 8), nn.Tanh(), bmrs.MultiplicativeNoise(8), nn.Linear(8, 2)]
        >>> layers += [nn.Tanh(), bmrs.MultiplicativeNoise(2), nn.Linear(2, 3)]
        >>> weights = bmrs.cost_kl_weights(nn.Sequential(*layers), torch.randn(2, 4), mean=1.0)
        >>> weights["5.theta"] > weights["2.theta"]  # a unit with 8 inputs costs more than one with 4
        True
    """
    _check(net, mean, cost)
    costs = _costs(net, example_input, cost, masks)
    average = torch.cat(list(costs.values())).mean()
    return {site: mean * float(each.mean() / average) for site, each in costs.items()}


def _masked(net: nn.Module, structures: StructureSet, masks: Mapping[str, Tensor]) -> tuple[Record, dict[str, Tensor]]:
    """Return the record with the sites that masks name, and a mask for each of its sites."""
    check_structures(net, structures)
    check_mapping(masks)
    record = structures.with_noise(masks).record
    return record, check_masks(masks, noise_points(net), {site: each.size for site, each in record.sites.items()})


def _check(net: nn.Module, mean: float, cost: str) -> None:
    check_module("net", net)
    if cost not in ("parameters", "flops"):
        raise ValueError(f'cost must be "parameters" or "flops", but got {cost!r}')
    if not (isinstance(mean, int | float) and math.isfinite(mean)):
        raise ValueError(f"mean must be a finite number, but got {mean!r}")


def _costs(
    net: nn.Module, example_input: Inputs, cost: Literal["parameters", "flops"], masks: Mapping[str, Tensor] | None
) -> dict[str, Tensor]:
    """Return for each site what each of the structures costs that are kept, in the network that the masks leave."""
    record = structures_of(net, example_input, trial=False).record
    kept = _kept(net, record, masks)
    costs = record.structure_costs(cost, record.dead(kept))
    return {site: costs[site][kept[site]].float() for site in kept}


def _kept(net: nn.Module, record: Record, masks: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    sizes = {site: each.size for site, each in record.sites.items()}
    if masks is None:
        return {site: torch.ones(size, dtype=torch.bool) for site, size in sizes.items()}
    if isinstance(masks, Mapping) and masks.keys() != sizes.keys():
        raise ValueError(f"masks must have one entry for each structure of the sites {sizes}, but name {list(masks)}")
    kept = {site: mask.cpu() for site, mask in check_masks(masks, noise_points(net), sizes).items()}
    for site, mask in kept.items():
        if not bool(mask.any()):
            raise ValueError(f"masks must keep a structure of every site, or it has no price, but {site} keeps none")
    return kept


def measure_latency(nets: Sequence[nn.Module], example_input: Inputs, rounds: int = 50) -> list[float]:
    """Return the median seconds of a forward pass of each network, timed in interleaved rounds.

    Raises:
        TypeError: If ``nets`` are no modules, or ``rounds`` is no integer.
        ValueError: If ``rounds`` is not positive, or a network does not run on the example.

    Example:
        >>> net = nn.Linear(4, 8)
        >>> len(bmrs.measure_latency([net, net], torch.randn(1, 4), rounds=3))
        2
    """
    check_integer("rounds", rounds, low=1, high=10**6)
    if not isinstance(nets, Sequence):
        raise TypeError(f"nets must be a sequence of networks, but got {described(nets)}")
    for net in nets:
        check_module("each of nets", net)
    times: list[list[float]] = [[] for _ in nets]
    with torch.no_grad():
        for net in nets:
            call_example(net, example_input)
        for _ in range(rounds + 3):
            for net, record in zip(nets, times, strict=True):
                start = time.perf_counter()
                call(net, example_input)
                if next((p.is_cuda for p in net.parameters()), False):
                    torch.cuda.synchronize()
                record.append(time.perf_counter() - start)
    return [statistics.median(record[3:]) for record in times]
