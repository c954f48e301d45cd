"""The record of each epoch."""

import time
from typing import Any

from pyro.distributions import Categorical
from torch import Tensor

from pyro_bmrs.model.guides.flat import FlatGuide
from pyro_bmrs.model.network import NoisyNetwork
from pyro_bmrs.model.prediction import predict
from pyro_bmrs.structures.cost import count_parameters
from pyro_bmrs.svi.checkpoint import State
from pyro_bmrs.svi.pruner import Pruner

__all__ = ["History"]


class History:
    """Records what each epoch came to.

    Args:
        model: The model.
        guide: Its guide.
        pruner: Knows what the masks would leave of the network.
        validation: Inputs and observations to report on, or None.

    Attributes:
        entries: One record an epoch, see ``FitResult.history``.
    """

    def __init__(
        self, model: NoisyNetwork, guide: FlatGuide, pruner: Pruner, validation: tuple[Tensor, Tensor] | None
    ) -> None:
        self.model, self.guide, self.pruner, self.validation = model, guide, pruner, validation
        self.entries: list[dict[str, Any]] = []
        self._parameters_dense = count_parameters(model.net)
        self._last = time.perf_counter()

    def record(self, phase: str, loss: float, **extra: float) -> dict[str, Any]:
        """Append and return the record of the epoch that has just ended."""
        masks = self.model.masks
        parameters = count_parameters(self.model.net, self.pruner.structures, masks)
        metrics = self._validate()
        now = time.perf_counter()
        entry: dict[str, Any] = {
            "epoch": len(self.entries) + 1,
            "phase": phase,
            "loss": loss,
            "kl": self.guide.kl().item(),
            "kl_weight": self.model.kl_weight,
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

    def state(self) -> State:
        """Return all that a resumed fit needs to know."""
        return State(info={"entries": self.entries})

    def restore(self, state: State) -> None:
        """Take up what ``state`` returned."""
        self.entries = state.info["entries"]

    def _validate(self) -> dict[str, float]:
        if self.validation is None:
            return {}
        x, y = self.validation
        observed = self.model.likelihood(predict(self.model, self.guide, x))
        metrics = {"log_likelihood_validation": observed.log_prob(y).mean().item()}
        if isinstance(observed, Categorical):
            metrics["accuracy_validation"] = (observed.logits.argmax(-1) == y).double().mean().item()
        return metrics
