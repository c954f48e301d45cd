"""What a fit returns."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

__all__ = ["FitResult", "FitWarning"]


class FitWarning(UserWarning):
    """Says that a fit does, or has done, something other than its caller may expect."""


@dataclass(frozen=True)
class FitResult:
    """What ``fit`` returns; the model and the guide themselves are fitted in place.

    Attributes:
        masks: For each site a bool tensor of shape ``(size,)``, True = kept, in the numbering of the network that was
            given to ``fit``. Where the fit has shrunk it, ``compact(model, guide, None, ...)`` takes the model's own.
        scores: For each site the criterion's score of each structure when it was last judged, of shape ``(size,)``;
            removed where >= 0. Empty if nothing was judged.
        history: One record per epoch: ``epoch``, ``phase``, ``loss`` (nats per example), ``kl`` (nats), ``kl_weight``,
            ``structures``, ``parameters``, ``compression``, ``seconds``, and with validation data
            ``log_likelihood_validation`` (nats per example) and, for class labels, ``accuracy_validation``.
        seconds: Wall time of the whole fit, all sessions of a resumed one together.
    """

    masks: dict[str, Tensor]
    scores: dict[str, Tensor]
    history: list[dict[str, Any]]
    seconds: float

    @property
    def kl_weight(self) -> float:
        """Weight of the KL in the end: the model's, times the multiplier that has reached the size of ``ToSize``."""
        return self.history[-1]["kl_weight"] if self.history else 1.0

    @property
    def compression(self) -> float:
        """Fraction of the trainable weights and biases that the masks remove."""
        return self.history[-1]["compression"] if self.history else 0.0
