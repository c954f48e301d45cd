"""What a fit returns."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from pyro_bmrs.svi.diagnostics import Diagnostics

__all__ = ["FitResult", "FitWarning", "validation_figure"]


class FitWarning(UserWarning):
    """Says that a fit does, or has done, something other than its caller may expect."""


@dataclass(frozen=True)
class FitResult:
    """What ``fit`` returns; the model and the guide themselves are fitted in place. ``print`` gives a line.

    Attributes:
        masks: For each site a bool tensor of shape ``(size,)``, True = kept, in the numbering of the network that was
            given to ``fit``. Where the fit has shrunk it, ``compact(model, guide, None, ...)`` takes the model's own.
        scores: For each site the criterion's score of each structure when it was last evaluated, of shape ``(size,)``;
            removed where >= 0. Empty if the criterion was never asked.
        history: One record per epoch: ``epoch``, ``phase``, ``loss`` (nats per example), ``kl`` (nats), ``kl_weight``,
            ``structures``, ``parameters``, ``compression``, ``seconds``, and with validation data
            ``log_likelihood_validation`` (nats per example); for labels ``accuracy_validation``, and for one label per
            example ``recall_validation``, the accuracy on each class (None where it has no examples); for numbers
            ``rmse_validation``.
        seconds: Wall time of the whole fit, all sessions of a resumed one together.
        diagnostics: How the posterior stood in the end: which structures have not moved, which had not converged,
            and how much of each is still the prior. ``print`` gives three lines.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), bmrs.MultiplicativeNoise(8), nn.Linear(8, 3))
        >>> model = bmrs.NoisyNetwork(net)
        >>> guide = bmrs.TruncatedLogNormalGuide(model)
        >>> data = torch.randn(32, 4), torch.arange(32) % 3
        >>> few = {"epochs": 1, "fine_tune_epochs": 1, "criterion": None, "progress": False}
        >>> result = bmrs.fit(model, guide, data, data, **few)
        >>> sorted(result.history[-1])[:4]
        ['accuracy_validation', 'compression', 'epoch', 'kl']
        >>> result.masks["2.theta"].sum()
        tensor(8)
    """

    masks: dict[str, Tensor]
    scores: dict[str, Tensor]
    history: list[dict[str, Any]]
    seconds: float
    diagnostics: Diagnostics | None = None

    def __str__(self) -> str:
        total = sum(len(mask) for mask in self.masks.values())
        left = sum(int(mask.sum()) for mask in self.masks.values())
        text = (
            f"{len(self.history)} epochs in {self.seconds:.0f} s: {100 * self.compression:.1f} % of the parameters "
            f"removed, {left:,} of {total:,} structures left"
        )
        last = self.history[-1] if self.history else {}
        for name, value in validation_figure(last).items():
            text += f", validation {name} {value}"
        recall = [(each, label) for label, each in enumerate(last.get("recall_validation", [])) if each is not None]
        if len(recall) > 1:
            lowest, label = min(recall)
            text += f", lowest on class {label} with {100 * lowest:.1f} %"
        return text

    @property
    def kl_weight(self) -> float:
        """Weight of the KL in the end: the model's, times the multiplier that has reached the size of ``ToSize``."""
        return self.history[-1]["kl_weight"] if self.history else 1.0

    @property
    def compression(self) -> float:
        """Fraction of the trainable weights and biases that the masks remove."""
        return self.history[-1]["compression"] if self.history else 0.0


def validation_figure(record: Mapping[str, Any]) -> dict[str, str]:
    """Return the one figure that says how good an epoch's network is, by name, if there is validation data."""
    for key, name, form in (
        ("accuracy_validation", "accuracy", "{:.2%}"),
        ("rmse_validation", "RMSE", "{:.4g}"),
        ("log_likelihood_validation", "log likelihood", "{:.4g}"),
    ):
        if key in record:
            return {name: form.format(record[key]).replace("%", " %")}
    return {}
