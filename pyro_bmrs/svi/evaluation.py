"""How well a model does on examples, with every noise at its posterior mean: example by example, and in figures."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from pyro.distributions import Bernoulli, Categorical
from torch import Tensor
from torch.distributions import Distribution, Independent, constraints

from pyro_bmrs.structures.inputs import Inputs, output_tensors

__all__ = ["Evaluation", "evaluate"]

_MOST_CLASSES = 1000  # whose recall is worth a number each


@dataclass(frozen=True)
class Evaluation:
    """How each example has been predicted; all tensors of shape ``(n,)``, in float64, on the CPU.

    Attributes:
        log_likelihood: Log probability of its observation, in nats.
        correct: Fraction of its labels that are the most probable ones, where observations are labels.
        squared_error: Mean square of what its observation differs from the mean by, where observations are numbers.
        labels: The classes, where there is one label per example.
        classes: Their number.
    """

    log_likelihood: Tensor
    correct: Tensor | None = None
    squared_error: Tensor | None = None
    labels: Tensor | None = None
    classes: int = 0

    @property
    def accuracy(self) -> float | None:
        """Fraction of labels that are right."""
        return None if self.correct is None else float(self.correct.mean())

    @property
    def majority(self) -> float | None:
        """Accuracy of always naming the most frequent class."""
        return None if self.labels is None else float(self.labels.bincount().max()) / len(self.labels)

    @property
    def recall(self) -> list[float | None] | None:
        """Accuracy on the examples of each class; None where there are none."""
        if self.labels is None or self.correct is None or self.classes > _MOST_CLASSES:
            return None
        counts = self.labels.bincount(minlength=self.classes)
        right = self.labels.bincount(self.correct, minlength=self.classes)
        return [float(r / c) if c else None for r, c in zip(right, counts, strict=True)]

    def metrics(self) -> dict[str, Any]:
        """Return the figures of a record, by name."""
        found: dict[str, Any] = {"log_likelihood_validation": float(self.log_likelihood.mean())}
        if self.correct is not None:
            found["accuracy_validation"] = self.accuracy
        if self.recall is not None:
            found["recall_validation"] = self.recall
        if self.squared_error is not None:
            found["rmse_validation"] = math.sqrt(float(self.squared_error.mean()))
        return found


@torch.no_grad()
def evaluate(
    predict: Callable[[Inputs], Any],
    likelihood: Callable[[Any], Distribution],
    batches: Iterable[tuple[Inputs, Tensor]],
    most: int | None = None,
) -> Evaluation:
    """Return how well examples are predicted.

    Args:
        predict: From inputs to a network's outputs.
        likelihood: From these to the distribution of the observations.
        batches: Inputs and observations.
        most: Number of examples after which to stop, at the end of a batch.
    """
    parts: list[Evaluation] = []
    seen = 0
    for x, y in batches:
        output = predict(x)
        device = next((tensor.device for tensor in output_tensors(output)), y.device)
        parts.append(_evaluated(likelihood(output), y.to(device)))
        seen += len(y)
        if most is not None and seen >= most:
            break
    return Evaluation(
        torch.cat([part.log_likelihood for part in parts]),
        _joined([part.correct for part in parts]),
        _joined([part.squared_error for part in parts]),
        _joined([part.labels for part in parts]),
        max(part.classes for part in parts),
    )


def _evaluated(observed: Any, y: Tensor) -> Evaluation:
    log_likelihood = observed.log_prob(y).double().cpu()
    base = observed
    while isinstance(base, Independent):
        base = base.base_dist
    if isinstance(base, Categorical):
        correct = _by_example(base.logits.argmax(-1) == y)
        single = y.dim() == 1
        labels = y.long().cpu() if single else None
        return Evaluation(log_likelihood, correct, labels=labels, classes=base.logits.shape[-1] if single else 0)
    if isinstance(base, Bernoulli):
        return Evaluation(log_likelihood, _by_example((base.logits > 0) == (y > 0.5)))
    if base.support in (constraints.real, constraints.real_vector) and not y.is_complex():
        try:
            mean = observed.mean
        except NotImplementedError:
            return Evaluation(log_likelihood)
        if mean.shape == y.shape and bool(torch.isfinite(mean).all()):
            return Evaluation(log_likelihood, squared_error=_by_example((mean - y).square()))
    return Evaluation(log_likelihood)


def _by_example(values: Tensor) -> Tensor:
    return values.double().reshape(len(values), -1).mean(1).cpu()


def _joined(parts: list[Tensor | None]) -> Tensor | None:
    found = [part for part in parts if part is not None]
    return torch.cat(found) if len(found) == len(parts) else None
