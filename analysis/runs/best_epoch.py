"""Going back to the best of the last epochs, by its validation accuracy."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from pyro_bmrs.svi.callbacks import Callback
from pyro_bmrs.svi.checkpoint import State, read_checkpoint, write_checkpoint

__all__ = ["BestEpoch"]


class BestEpoch(Callback):
    """Keeps the state of the best of the last epochs, the first of equals; for a training that may be interrupted.

    Args:
        modules: What is restored, by name; nothing is removed from them during those epochs.
        last: How many epochs at the end of the training compete; with 0 its end is what counts.
        folder: Where to keep the best so far.
    """

    def __init__(self, modules: Mapping[str, nn.Module], last: int, folder: Path) -> None:
        self.modules, self.last, self.path = nn.ModuleDict(modules), last, folder / "best.safetensors"

    def on_start(self, epochs: int, history: list[dict[str, Any]]) -> None:
        self.first = epochs - self.last + 1
        self.accuracy = max((r["accuracy_validation"] for r in history if r["epoch"] >= self.first), default=-1.0)

    def on_epoch_end(self, record: dict[str, Any]) -> None:
        if record["epoch"] < self.first or record["accuracy_validation"] <= self.accuracy:
            return
        self.accuracy = record["accuracy_validation"]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_checkpoint(self.path, State(self.modules.state_dict(), {"epoch": record["epoch"]}))

    def restore(self) -> None:
        """Take the modules back to the best epoch."""
        if self.last:
            self.modules.load_state_dict(read_checkpoint(self.path).tensors)
