"""What a network costs: parameters (of a real one, or of one still masked), floating-point operations, time."""

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from pyro_bmrs.modes import evaluating
from pyro_bmrs.structures import Structures, find_structures

__all__ = [
    "cost_kl_weights",
    "cost_log_odds",
    "count_flops",
    "count_parameters",
    "measure_latency",
    "removed_positions",
]


def count_parameters(
    net: nn.Module, structures: Mapping[str, Structures] | None = None, masks: Mapping[str, Tensor] | None = None
) -> int:
    """Return the number of trainable parameters, of ``net`` as it is or as its masks would leave it.

    The posterior's own parameters are the guide's and do not count.
    """
    total = 0
    removed = removed_positions(structures or {}, masks or {})
    for name, module in net.named_modules():
        out_removed, in_removed = (removed.get((name, side), None) for side in ("out", "in"))
        for parameter in module.parameters(recurse=False):
            if not parameter.requires_grad:
                continue
            count = parameter.numel()
            if out_removed is not None:
                count = count // len(out_removed) * int((~out_removed).sum())
            if in_removed is not None and parameter.dim() > 1:
                count = count // len(in_removed) * int((~in_removed).sum())
            total += count
    return total


def removed_positions(
    structures: Mapping[str, Structures], masks: Mapping[str, Tensor]
) -> dict[tuple[str, str], Tensor]:
    """Return, for every layer and side, which positions go: those of structures that are not kept.

    A layer must not become empty, so a site that keeps none leaves its first structure, whose noise is zero.
    """
    removed: dict[tuple[str, str], Tensor] = {}
    for site, parts in structures.items():
        gone = ~masks[site].cpu()
        gone[0] &= not bool(gone.all())
        gone = torch.cat([gone, torch.tensor([False])])  # index -1: positions that belong to no structure stay
        for axis in parts.axes:
            key = (axis.module, axis.side)
            removed[key] = removed.get(key, torch.zeros(len(axis.index), dtype=torch.bool)) | gone[axis.index]
    return removed


def count_flops(net: nn.Module, example_input: Tensor) -> int:
    """Return the floating-point operations of one forward pass over ``example_input`` (2 a multiply-add)."""
    return _run_counter(net, example_input).get_total_flops()


def _run_counter(net: nn.Module, example_input: Tensor) -> FlopCounterMode:
    with evaluating(net), torch.no_grad(), FlopCounterMode(display=False) as counter:
        net(example_input)
    return counter


def cost_log_odds(
    net: nn.Module, example_input: Tensor, mean: float, cost: Literal["parameters", "flops"] = "parameters"
) -> dict[str, Tensor]:
    """Return prior log-odds of absence proportional to what each structure costs: dear ones have more to prove.

    Args:
        net: Network with noise layers.
        example_input: Inputs of shape ``(batch, ...)`` to trace it with.
        mean: Mean log-odds over all structures, for instance ``math.log(3)``.
        cost: ``"parameters"`` or ``"flops"`` of the layers that produce and consume the structure.

    Returns:
        For each site a tensor of shape ``(size,)``, to give to an evidence criterion as ``prior_log_odds``.

    Raises:
        ValueError: If ``cost`` is neither, or ``mean`` not a finite number.
    """
    _check(mean, cost)
    costs = _costs(net, example_input, cost, None)
    average = torch.cat(list(costs.values())).mean()
    return {site: mean * each / average for site, each in costs.items()}


def cost_kl_weights(
    net: nn.Module,
    example_input: Tensor,
    mean: float,
    cost: Literal["parameters", "flops"] = "parameters",
    masks: Mapping[str, Tensor] | None = None,
) -> dict[str, float]:
    """Return a weight of each site's KL proportional to what one of its structures costs, on average over the site.

    With one weight for all sites narrow layers of cheap structures are worn down as fast as wide layers of dear ones,
    which loses accuracy and saves little. Scaling a KL is stating its price: so many nats a parameter. What a structure
    costs falls with the number of its neighbours: an input of a layer with 500 units is dear, and cheap once 10 are
    left. So state prices at the size that you are after, that of an earlier fit for instance.

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
    """
    _check(mean, cost)
    costs = _costs(net, example_input, cost, masks)
    average = torch.cat(list(costs.values())).mean()
    return {site: mean * float(each.mean() / average) for site, each in costs.items()}


def _check(mean: float, cost: str) -> None:
    if cost not in ("parameters", "flops"):
        raise ValueError(f'cost must be "parameters" or "flops", but got {cost!r}')
    if not (isinstance(mean, int | float) and math.isfinite(mean)):
        raise ValueError(f"mean must be a finite number, but got {mean!r}")


def _costs(net: nn.Module, example_input: Tensor, cost: str, masks: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    """Return for each site what each of the structures costs that are kept, in the network that the masks leave."""
    structures = find_structures(net, example_input[:2])
    kept = _kept(structures, masks)
    removed = removed_positions(structures, kept)

    def left(module: str, side: str) -> Tensor:
        return ~removed.get((module, side), torch.zeros(1, dtype=torch.bool))

    side_cost = _parameters_by_side(net) if cost == "parameters" else _flops_by_side(net, example_input)
    costs = {}
    for site, parts in structures.items():
        costs[site] = torch.zeros(len(kept[site]))
        for axis in parts.axes:
            other = "in" if axis.side == "out" else "out"
            share = side_cost(axis.module, axis.side, float(left(axis.module, other).double().mean())) / len(axis.index)
            there = left(axis.module, axis.side) & (axis.index >= 0)
            owned = axis.index[there]
            costs[site] = costs[site].index_add(0, owned, torch.full((len(owned),), share))
        costs[site] = costs[site][kept[site]]
    return costs


def _kept(structures: Mapping[str, Structures], masks: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    sizes = {site: max(int(axis.index.max()) for axis in parts.axes) + 1 for site, parts in structures.items()}
    if masks is None:
        return {site: torch.ones(size, dtype=torch.bool) for site, size in sizes.items()}
    if {site: tuple(mask.shape) for site, mask in masks.items()} != {site: (size,) for site, size in sizes.items()}:
        shapes = {site: tuple(mask.shape) for site, mask in masks.items()}
        raise ValueError(f"masks must have one entry for each structure of the sites {sizes}, but have shapes {shapes}")
    for site, mask in masks.items():
        if not bool(mask.any()):
            raise ValueError(f"masks must keep a structure of every site, or it has no price, but {site} keeps none")
    return {site: masks[site].cpu() for site in sizes}


def _parameters_by_side(net: nn.Module) -> Callable[[str, str, float], float]:
    """Return what a layer's outputs own (all its parameters) and its inputs (those with an input axis).

    The last argument is how much of the other side's axis is left.
    """

    def total(name: str, side: str, other_left: float) -> float:
        parameters = list(net.get_submodule(name).parameters(recurse=False))
        weights = sum(p.numel() for p in parameters if p.dim() > 1)
        others = sum(p.numel() for p in parameters if p.dim() <= 1)
        return other_left * weights + (others if side == "out" else 0)

    return total


def _flops_by_side(net: nn.Module, example_input: Tensor) -> Callable[[str, str, float], float]:
    """Return a layer's operations, which its outputs and its inputs own alike."""
    counts = _run_counter(net, example_input[:1]).get_flop_counts()
    flops = {name.partition(".")[2]: sum(each.values()) for name, each in counts.items()}  # names start with the class
    return lambda name, _, other_left: other_left * flops.get(name, 0)


def measure_latency(nets: Sequence[nn.Module], example_input: Tensor, rounds: int = 50) -> list[float]:
    """Return the median seconds of a forward pass of each network, timed in interleaved rounds."""
    times: list[list[float]] = [[] for _ in nets]
    with torch.no_grad():
        for _ in range(rounds + 3):
            for net, record in zip(nets, times, strict=True):
                start = time.perf_counter()
                net(example_input)
                if example_input.is_cuda:
                    torch.cuda.synchronize()
                record.append(time.perf_counter() - start)
    return [statistics.median(record[3:]) for record in times]
