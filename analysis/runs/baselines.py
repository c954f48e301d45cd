"""Baselines on the same work: torch-pruning's importances at our parameter budgets, and small networks from scratch."""

import copy
import warnings
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any, Literal, get_args

import torch
import torch_pruning
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import pyro_bmrs as bmrs
from analysis.runs.config import Ranking
from analysis.runs.dense import PlainNetwork, cosine_rates, train_dense
from pyro_bmrs.eval_mode import evaluating
from pyro_bmrs.randomness import local_seed
from pyro_bmrs.structures.compact import without_noise
from pyro_bmrs.structures.inputs import to_input
from pyro_bmrs.structures.layers import ChannelScale
from pyro_bmrs.structures.points import replace_everywhere
from pyro_bmrs.svi.training import Trainer

__all__ = ["Importance", "narrowed", "train_baseline", "train_from_scratch"]

Importance = Literal["magnitude", "taylor", "group_norm"]
_TAYLOR_EXAMPLES = 1024  # whose mean loss is differentiated before each pruning


def train_baseline(
    net: nn.Module,
    data: tuple[Tensor, Tensor],
    importance: Importance,
    budget: float,
    epochs: int,
    batch_size: int,
    lr: float,
    seed: int,
    ranking: Ranking = "layer",
) -> nn.Module:
    """Train a network without noise, prune it by torch-pruning's iterative pruner on the way, and return it.

    Half of the epochs are dense. In the next quarter each begins with a pruning of the same fraction of the parameters
    that are left, down to the budget; the rest are fine-tuning. Structures go one at a time, and the others are judged
    anew; the output layer keeps its units. Adam, its learning rate falling along a cosine over all epochs as that of
    ``pyro_bmrs.fit`` does, starts afresh after each pruning.

    Args:
        net: The network, left as it is; its noise layers are dropped.
        data: Inputs (bytes are divided by 255) and class labels, on the network's device.
        importance: What removes first. ``"magnitude"``: the smallest L2 norm of the weights that produce a structure.
            ``"taylor"``: the least first-order change of the loss, over all layers that the structure touches.
            ``"group_norm"``: the smallest L2 norm over all these layers, trained towards group sparsity until the last
            pruning (``GroupNormPruner``, its default strength).
        budget: Fraction of the parameters to remove, at least, and no more than the last structures to go make it.
        epochs: Of all training.
        batch_size: At most this many examples per step.
        lr: Initial learning rate.
        seed: Of the data order.
        ranking: ``"layer"``, the pruner's default: the same fraction of every layer goes. ``"network"``: all structures
            are ranked together, which may wear some layers down to a single one.

    Raises:
        ValueError: If importance or ranking is none of these, ``budget`` does not lie in [0, 1), there are fewer than
            two epochs, or the network cannot lose so many parameters with a structure left in every layer.

    References:
        DepGraph: Towards Any Structural Pruning (Fang et al., 2023)
        Importance Estimation for Neural Network Pruning (Molchanov et al., 2019)
    """
    for name, value, allowed in (("importance", importance, Importance), ("ranking", ranking, Ranking)):
        if value not in get_args(allowed):
            raise ValueError(f"{name} must be one of {get_args(allowed)}, but got {value!r}")
    if not 0 <= budget < 1:
        raise ValueError(f"budget must be a fraction of the parameters in [0, 1), but got {budget}")
    if epochs < 2:
        raise ValueError(f"epochs must be at least 2, one dense and one pruned, but got {epochs}")
    net = without_noise(net)
    x, y = data
    kept, parameters = _fractions_kept(budget, epochs), bmrs.count_parameters(net)
    pruner = _make_pruner(net, importance, ranking, to_input(x[:2]))
    network = PlainNetwork(net, data, batch_size, seed)
    trainer = Trainer(network, cosine_rates(lr, epochs))
    for epoch in range(epochs):
        if kept[epoch] < kept[max(epoch - 1, 0)]:
            if importance == "taylor":
                sample = torch.randperm(len(x), generator=network.order)[:_TAYLOR_EXAMPLES].to(x.device)
                _set_gradients(net, x[sample], y[sample])
            _prune(net, pruner, kept[epoch] * parameters)
            trainer.start_optimizer()  # the pruner replaces parameters by smaller ones
        with ExitStack() as hooks:
            if importance == "group_norm" and kept[epoch] > kept[-1]:
                hooks.callback(trainer.optimizer.register_step_pre_hook(lambda *_: pruner.regularize(net)).remove)
            trainer.fine_tune_epoch()
    return net.eval()


def _fractions_kept(budget: float, epochs: int) -> list[float]:
    """Return which fraction of the parameters each epoch trains."""
    dense, prunings = epochs // 2, max(1, epochs // 4)
    return [(1 - budget) ** min(max(epoch - dense + 1, 0) / prunings, 1) for epoch in range(epochs)]


def _make_pruner(net: nn.Module, importance: Importance, ranking: Ranking, example_input: Tensor) -> Any:
    """Return a pruner whose every step removes at most one structure of a layer, or of the network."""
    layers = [module for module in net.modules() if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d)]
    scores: dict[Importance, Callable[[], Any]] = {
        "magnitude": lambda: torch_pruning.importance.MagnitudeImportance(p=2, group_reduction="first"),
        "taylor": torch_pruning.importance.TaylorImportance,
        "group_norm": lambda: torch_pruning.importance.GroupMagnitudeImportance(p=2),
    }
    make = torch_pruning.pruner.GroupNormPruner if importance == "group_norm" else torch_pruning.pruner.BasePruner
    with evaluating(net), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about modules it cannot prune
        return make(
            net,
            example_input,
            scores[importance](),
            global_pruning=ranking == "network",
            pruning_ratio=1.0,
            iterative_steps=sum(layer.weight.shape[0] for layer in layers[:-1]),
            # Half a structure off whole numbers, which the pruner would round down by two for want of one digit.
            iterative_pruning_ratio_scheduler=lambda ratio, steps: [
                ratio * max(step - 0.5, 0) / steps for step in range(steps + 1)
            ],
            ignored_layers=layers[-1:],
        )


def _set_gradients(net: nn.Module, x: Tensor, y: Tensor) -> None:
    net.zero_grad()
    with evaluating(net):
        cross_entropy(net(to_input(x)), y).backward()


def _prune(net: nn.Module, pruner: Any, parameters: float) -> None:
    """Remove structures of ``net`` until it has at most so many parameters."""
    while bmrs.count_parameters(net) > parameters:
        if pruner.current_step == pruner.iterative_steps:
            raise ValueError(
                f"this network cannot have fewer than {bmrs.count_parameters(net):,} parameters with a structure left "
                f"in every layer, but the budget leaves {parameters:,.0f}; choose a smaller budget"
            )
        pruner.step()
    pruner.update_regularizer()
    if isinstance(pruner, torch_pruning.pruner.GroupNormPruner):
        # It divides by the range of the importances in a group, which a single structure has none of.
        pruner._groups = [group for group in pruner._groups if len(group[0].idxs) > 1]


def narrowed(net: nn.Module, kept: Mapping[str, int], example_input: Tensor) -> nn.Module:
    """Return the plain network of ``net``'s architecture with only so many structures left at each noise layer.

    Args:
        net: Network with noise layers, left as it is.
        kept: Numbers of structures by noise layer, as in a run's results; layers left out keep all.
        example_input: Inputs of shape ``(batch, ...)`` to trace it with.

    Raises:
        ValueError: If there is no such layer, or it has fewer structures.
    """
    model = bmrs.NoisyNetwork(copy.deepcopy(net), num_data=1)
    masks = {}
    for layer, count in kept.items():
        site = f"{layer}.theta"
        if not 0 <= count <= model.sizes.get(site, -1):
            raise ValueError(
                f"cannot keep {count} structures of layer {layer!r}; the noise layers have "
                f"{ {name.removesuffix('.theta'): size for name, size in model.sizes.items()} }"
            )
        masks[site] = torch.arange(model.sizes[site]) < count
    return bmrs.compact(model, bmrs.TruncatedLogNormalGuide(model), masks, to_input(example_input))


def train_from_scratch(
    pruned: nn.Module, data: tuple[Tensor, Tensor], epochs: int, batch_size: int, lr: float, seed: int
) -> nn.Module:
    """Return a dense network of a pruned one's architecture, drawn anew and trained as any dense network.

    Args:
        pruned: Network from ``pyro_bmrs.compact`` or ``narrowed``, left as it is.
        data: Inputs and class labels, on the network's device.
        epochs: As many as the pruned network had in all.
        batch_size: At most this many examples per step.
        lr: Initial learning rate.
        seed: Of initial weights and data order.

    References:
        Rethinking the Value of Network Pruning (Liu et al., 2019)
    """
    net = copy.deepcopy(pruned)
    for scale in [module for module in net.modules() if isinstance(module, ChannelScale)]:
        net = replace_everywhere(net, scale, nn.Identity())
    with local_seed(devices=[]):
        torch.manual_seed(seed)
        for module in net.modules():
            reset: Any = getattr(module, "reset_parameters", None)
            if reset is not None:
                reset()
    train_dense(net, data, epochs, batch_size, lr, seed)
    return net
