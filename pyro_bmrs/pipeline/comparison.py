"""A network before and after: what it costs, and how good it is on the same examples."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pyro_bmrs.eval_mode import evaluating
from pyro_bmrs.model.network import Likelihood
from pyro_bmrs.pipeline.tables import Row
from pyro_bmrs.randomness import local_seed
from pyro_bmrs.structures.cost import count_flops, count_parameters, measure_latency
from pyro_bmrs.structures.inputs import Inputs, batch_size, call, first_examples, on_device
from pyro_bmrs.svi.data.source import Source
from pyro_bmrs.svi.evaluation import Evaluation, evaluate

__all__ = ["Comparison", "compare", "paired_change"]


@dataclass(frozen=True)
class Comparison:
    """Two networks, the one before and the one after, in pairs of numbers.

    Attributes:
        parameters: Their numbers of parameters.
        flops: Floating-point operations of an example (2 per multiply-add).
        latency: Median seconds of a forward pass of ``batch`` examples, in interleaved rounds.
        batch: Number of examples of it.
        evaluations: How each did on each example.
        data: What these examples are called.
    """

    parameters: tuple[int, int]
    flops: tuple[int, int]
    latency: tuple[float, float]
    batch: int
    evaluations: tuple[Evaluation, Evaluation]
    data: str = "validation"

    def rows(self) -> list[Row]:
        """Return the rows of a table."""
        return [
            ("parameters", *self.parameters, ",.0f", ""),
            ("FLOPs per example", *self.flops, ",.0f", ""),
            (f"ms per batch of {self.batch}", 1e3 * self.latency[0], 1e3 * self.latency[1], ".2f", ""),
            *self._quality(),
        ]

    @property
    def better_than_a_constant(self) -> bool:
        """Whether the network before had learned anything: it does better than one answer to all examples."""
        before = self.evaluations[0]
        if before.accuracy is not None and before.majority is not None:
            return before.accuracy > before.majority
        return True

    def _quality(self) -> list[Row]:
        before, after = self.evaluations
        rows: list[Row] = []
        if before.correct is not None and after.correct is not None:
            dense, pruned = 100 * float(before.correct.mean()), 100 * float(after.correct.mean())
            change = paired_change(before.correct, after.correct)
            rows.append((f"{self.data} accuracy %", dense, pruned, ".2f", change))
        if before.squared_error is not None and after.squared_error is not None:
            dense, pruned = (math.sqrt(float(each.mean())) for each in (before.squared_error, after.squared_error))
            error = _standard_error(after.squared_error - before.squared_error) / max(dense + pruned, 1e-12)
            rows.append((f"{self.data} RMSE", dense, pruned, ".4g", f"  {pruned - dense:+.2g} ± {error:.1g}"))
        if not rows:
            gain = after.log_likelihood - before.log_likelihood
            dense, pruned = float(before.log_likelihood.mean()), float(after.log_likelihood.mean())
            change = f"  {float(gain.mean()):+.2g} ± {_standard_error(gain):.1g}"
            rows.append((f"{self.data} log likelihood", dense, pruned, ".4g", change))
        return rows


def paired_change(before: Tensor, after: Tensor) -> str:
    """Return the change of an accuracy in points with its standard error, and in examples where each has one label."""
    change = (after - before).double()
    text = f"  {100 * float(change.mean()):+.2f} ± {100 * _standard_error(change):.2f}"
    if bool(((change == 0) | (change.abs() == 1)).all()):
        text += f" ({abs(round(float(change.sum()))):,} of {len(change):,} examples)"
    return text


@torch.no_grad()
def compare(networks: Sequence[nn.Module], likelihood: Likelihood, example: Inputs, source: Source) -> Comparison:
    """Return how two networks on one device compare.

    Args:
        networks: The one before and the one after.
        likelihood: From their outputs to the distribution of the observations.
        example: Inputs to time them on.
        source: Examples to compare them on.
    """
    before, after = networks
    one = first_examples(example, 1)
    device = next((p.device for p in before.parameters()), torch.device("cpu"))
    with evaluating(before), evaluating(after), local_seed(devices=[device]):
        latency = measure_latency(networks, example, rounds=20)
        evaluations = [
            evaluate(partial(_outputs, net, device), likelihood, source.ordered()) for net in (before, after)
        ]
    return Comparison(
        (count_parameters(before), count_parameters(after)),
        (count_flops(before, one), count_flops(after, one)),
        (latency[0], latency[1]),
        batch_size(example),
        (evaluations[0], evaluations[1]),
        source.name if source.name == "validation" else "training",
    )


def _outputs(net: nn.Module, device: torch.device, x: Inputs) -> Any:
    return call(net, on_device(x, device, net))


def _standard_error(values: Tensor) -> float:
    return float(values.double().std(correction=0)) / math.sqrt(len(values))
