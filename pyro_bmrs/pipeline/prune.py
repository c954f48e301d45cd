"""One call: structures found, noise attached to a copy, fitted, and what the evidence does not support removed."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from pyro.distributions import TorchDistribution
from torch import nn

from pyro_bmrs.checks import check_function, check_module
from pyro_bmrs.eval_mode import evaluating
from pyro_bmrs.model.attach import attach_noise
from pyro_bmrs.model.guides.truncated_log_normal import TruncatedLogNormalGuide
from pyro_bmrs.model.network import Likelihood, NoisyNetwork
from pyro_bmrs.model.noise import noise_layers
from pyro_bmrs.pipeline.comparison import Comparison, compare
from pyro_bmrs.pipeline.guessing import after, guessed
from pyro_bmrs.pipeline.tables import cost_table, structure_table
from pyro_bmrs.structures.compact import compact, without_noise
from pyro_bmrs.structures.copying import copied, undisturbed
from pyro_bmrs.structures.cost import count_parameters
from pyro_bmrs.structures.discovery import find_structures
from pyro_bmrs.structures.inputs import Inputs, call, first_examples, on_device, refusing
from pyro_bmrs.structures.structure_set import StructureSet
from pyro_bmrs.svi.data.making import Data, make_source
from pyro_bmrs.svi.data.source import Source
from pyro_bmrs.svi.data.unpacking import Unpack
from pyro_bmrs.svi.fit import fit
from pyro_bmrs.svi.pruning import ToSize
from pyro_bmrs.svi.result import FitResult
from pyro_bmrs.svi.settings import check_keywords

__all__ = ["Pruned", "prune"]

_TIMED = 128  # examples
_FEW = 8


@dataclass(frozen=True)
class Pruned:
    """What has become of a network; ``print`` it.

    Attributes:
        network: The smaller network, of the class of the one that was given, without noise, in eval mode.
        result: Masks, scores and history of the fit.
        model: The Pyro model, fitted.
        guide: Its posterior.
        structures: What could be removed, with the reasons for what could not.
        comparison: The network as it was given, and the smaller one.
        masked_parameters: Parameters that would be left if every removed structure lost only the rows that make it, as
            papers count whose networks are only masked; None where noise was placed by hand.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 2))
        >>> x = torch.randn(64, 4)
        >>> pruned = bmrs.prune(net, (x, (x[:, 0] > 0).long()), epochs=100, seed=0, progress=False)
        >>> pruned.network[0].out_features == pruned.result.masks["0.theta"].sum()
        tensor(True)
    """

    network: nn.Module
    result: FitResult
    model: NoisyNetwork
    guide: TruncatedLogNormalGuide
    structures: StructureSet | None
    comparison: Comparison
    masked_parameters: int | None = None

    def __str__(self) -> str:
        masks = {site.removesuffix(".theta"): mask for site, mask in self.result.masks.items()}
        sizes = {layer: len(mask) for layer, mask in masks.items()}
        kept = {layer: int(mask.sum()) for layer, mask in masks.items()}
        text = f"{structure_table(sizes, kept)}\n\n{cost_table(self.comparison.rows(), 'as given')}"
        offered = {} if self.structures is None else self.structures
        if self.masked_parameters is not None and any(each.kind == "output" for each in offered.values()):
            text += (
                f"\n\nParameters left, as papers count whose networks are only masked: {self.masked_parameters:,} "
                "(rows of masked outputs alone)"
            )
        if not self.comparison.better_than_a_constant:
            text += (
                "\n\nThe network as given names no more classes right than always the same one: it had not been "
                "trained.\nTrain it first, if its quality is to be compared with."
            )
        refused = {} if self.structures is None else self.structures.refused
        if refused:
            text += f"\n\nNot offered for removal: {', '.join(refused)} (print .structures for the reasons)"
        return text


def prune(
    net: nn.Module,
    train: Data,
    validation: Data | None = None,
    *,
    remove: float | None = None,
    cost: Literal["parameters", "flops"] = "parameters",
    likelihood: Likelihood | None = None,
    output: Callable[[Any], Any] | None = None,
    unpack: Unpack | None = None,
    structures: StructureSet | None = None,
    prior: TorchDistribution | Mapping[str, TorchDistribution] | None = None,
    kl_weight: float | Mapping[str, float] = 1.0,
    **settings: Any,
) -> Pruned:
    """Return a smaller network that predicts as well: the structures removed that the model evidence does not support.

    What ``find_structures``, ``attach_noise``, ``NoisyNetwork``, ``TruncatedLogNormalGuide``, ``fit`` and ``compact``
    do one after the other, on a copy: the network that is given stays as it is.

    Args:
        net: Any feed-forward network, trained before or not. Noise layers of its own are used as they stand.
        train: Data to train on, see ``fit``.
        validation: Data to compare the networks on, never used to decide anything; without, the training data are.
        remove: Fraction of the cost to remove. By default the evidence decides, and says how much that is.
        cost: ``"parameters"``, or ``"flops"`` of a forward pass.
        likelihood: From the network's output to the distribution of the observations, see ``NoisyNetwork``; integer
            observations are class labels by default.
        output: What to take out of the network's result, for instance ``lambda out: out.logits``.
        unpack: From a batch to inputs and observations, see ``fit``.
        structures: What may be removed, of all that ``find_structures(net, ...)`` returned; by default all of it.
        prior: Prior on the noise, see ``attach_noise``.
        kl_weight: See ``NoisyNetwork``; more removes more.
        settings: Keywords of ``fit``.

    Returns:
        The smaller network, on the device of ``net``, and how it came about.

    Raises:
        TypeError, ValueError: If an argument does not fit, nothing can be removed, or there is more than one likelihood
            for such observations; says what to write.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 2))
        >>> x = torch.randn(64, 4)
        >>> data = (x, (x[:, 0] > 0).long())
        >>> pruned = bmrs.prune(net, data, data, epochs=200, seed=0, progress=False)
        >>> bmrs.count_parameters(pruned.network) < bmrs.count_parameters(net)
        True
    """
    check_module("net", net)
    check_keywords(settings, prune, fit)
    if output is not None:
        check_function("output", output, "of the network's result")
    if remove is not None:
        if "pruning" in settings:
            raise TypeError("remove and pruning exclude each other: remove=0.8 is pruning=ToSize(0.8)")
        settings["pruning"] = ToSize(remove, cost)
    elif cost != "parameters":
        raise ValueError(f"cost={cost!r} is the cost of which remove= is the fraction: give both, or neither")
    dtype = next((p.dtype for p in net.parameters() if p.is_floating_point()), torch.get_default_dtype())
    batch_size = settings.pop("batch_size", None)
    source = make_source(train, "train", dtype, unpack, batch_size)
    held_out = None if validation is None else make_source(validation, "validation", dtype, unpack, batch_size)
    plain = copied(net)
    device = next((p.device for p in net.parameters()), torch.device("cpu"))
    example = first_examples(source.first[0], _TIMED)
    example = on_device(example, device, plain)
    few = first_examples(example, _FEW)
    likelihood = _likelihood(plain, few, source, likelihood, output)
    noisy: nn.Module = plain
    if not noise_layers(plain):
        structures = find_structures(plain, few) if structures is None else structures
        if not structures:
            raise ValueError(f"nothing of this network can be removed:\n{structures}")
        noisy = attach_noise(plain, structures, prior)
    model = NoisyNetwork(noisy, likelihood, kl_weight=kl_weight)
    guide = TruncatedLogNormalGuide(model)
    result = fit(model, guide, source, held_out, **settings)
    smaller = compact(model, guide, None, few).to(device)
    comparison = compare([without_noise(net), smaller], likelihood, example, held_out or source)
    masked = None if structures is None else count_parameters(net, structures, result.masks, rows_only=True)
    return Pruned(smaller, result, model, guide, structures, comparison, masked)


def _likelihood(
    net: nn.Module,
    example: Inputs,
    source: Source,
    likelihood: Likelihood | None,
    output: Callable[[Any], Any] | None,
) -> Likelihood:
    """Return the likelihood that was asked for, or else the one that the observations call for."""
    if likelihood is None:
        with undisturbed(net), evaluating(net), refusing("the network does not run on the inputs of train"):
            result = call(net, example)
        if output is not None:
            what = f"output does not take a {type(result).__name__}, which the network returns"
            with refusing(what, "write another"):
                result = output(result)
        likelihood = guessed(result, source.first[1][:_FEW])
    return likelihood if output is None else partial(after, output, likelihood)
