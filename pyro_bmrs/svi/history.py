"""The record of each epoch."""

import time
from typing import Any

from pyro_bmrs.model.guides.flat import FlatGuide
from pyro_bmrs.model.network import NoisyNetwork
from pyro_bmrs.model.prediction import predict
from pyro_bmrs.structures.cost import count_parameters
from pyro_bmrs.svi.checkpoint import State
from pyro_bmrs.svi.data.source import Source
from pyro_bmrs.svi.evaluation import Evaluation, evaluate
from pyro_bmrs.svi.pruner import Pruner

__all__ = ["History"]


class History:
    """Records the figures of each epoch.

    Args:
        model: The model.
        guide: Its guide.
        pruner: Knows what the masks would leave of the network.
        validation: What to report on, or None.

    Attributes:
        entries: One record per epoch, see ``FitResult.history``.
        evaluation: How well the model did on it after the last one.
    """

    def __init__(self, model: NoisyNetwork, guide: FlatGuide, pruner: Pruner, validation: Source | None) -> None:
        self.model, self.guide, self.pruner, self.validation = model, guide, pruner, validation
        self.entries: list[dict[str, Any]] = []
        self.evaluation: Evaluation | None = None
        self._parameters_dense = count_parameters(model.net)
        self._last = time.perf_counter()

    def record(self, phase: str, loss: float, kl_weight: float, **extra: float) -> dict[str, Any]:
        """Append and return the record of the epoch that has just ended."""
        masks = self.model.masks
        parameters = count_parameters(self.model.net, self.pruner.structures, masks)
        self.evaluation = None if self.validation is None else self.evaluate(self.validation)
        metrics = {} if self.evaluation is None else self.evaluation.metrics()
        now = time.perf_counter()
        entry: dict[str, Any] = {
            "epoch": len(self.entries) + 1,
            "phase": phase,
            "loss": loss,
            "kl": self.guide.kl().item(),
            "kl_weight": kl_weight,
            "structures": sum(int(mask.sum()) for mask in masks.values()),
            "parameters": parameters,
            "compression": 1 - parameters / self._parameters_dense if self._parameters_dense else 0.0,
            **extra,
            **metrics,
            "seconds": now - self._last,
        }
        self._last = now
        self.entries.append(entry)
        return entry

    @property
    def ends_fine_tuned(self) -> bool:
        """Whether the noise was at fixed values in the last epoch."""
        return bool(self.entries) and self.entries[-1]["phase"] != "noisy"

    def state(self) -> State:
        """Return all that a resumed fit needs to know."""
        return State(info={"entries": self.entries})

    def restore(self, state: State) -> None:
        """Take up what ``state`` returned."""
        self.entries = state.info["entries"]

    def evaluate(self, source: Source, most: int | None = None) -> Evaluation:
        """Return how well the model does on the examples of ``source``, or on about ``most`` of them."""
        model, guide = self.model, self.guide
        return evaluate(lambda x: predict(model, guide, x), model.likelihood, source.ordered(), most)
