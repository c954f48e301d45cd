"""What a fit asks of data, whatever they are."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Generator, Tensor

from pyro_bmrs.model.network import NoisyNetwork
from pyro_bmrs.structures.inputs import Inputs
from pyro_bmrs.svi.checkpoint import State

if TYPE_CHECKING:
    from lightning_fabric import Fabric

__all__ = ["Batch", "Source"]

Batch = tuple[Inputs, Tensor]


class Source:
    """Examples to train on or to report on.

    Attributes:
        name: What errors call it.
        size: Number of examples.
        batch_size: Number of examples of a batch, over all processes; the last ones of an epoch may be smaller.
        steps: Number of batches of an epoch.
        first: Its first examples: inputs and observations, where the data are.
        lost_on_resume: What of it a resumed fit cannot bring back, in words; empty where there is nothing.
    """

    name: str
    size: int
    batch_size: int
    steps: int
    first: Batch
    lost_on_resume: str = ""

    def check(self, model: NoisyNetwork) -> None:
        """Raise ``ValueError`` if the network or its likelihood does not take the examples."""
        raise NotImplementedError

    def shuffled(self, order: Generator, fabric: "Fabric") -> Iterator[tuple[Batch, float]]:
        """Iterate over an epoch to train on.

        Args:
            order: What the order is drawn from; in the same state in all processes.
            fabric: The processes.

        Yields:
            This process's share of a batch, and its size over the mean share of all processes.
        """
        raise NotImplementedError

    def ordered(self) -> Iterator[Batch]:
        """Iterate over all examples in one order, the same every time."""
        raise NotImplementedError

    def fingerprint(self) -> Any:
        """Return what a checkpoint keeps, to know the data by."""
        raise NotImplementedError

    def place(self, device: torch.device) -> None:
        """Move the data to a device, if there is room for them."""

    def state(self) -> State:
        """Return all that a resumed fit needs to know, between two epochs."""
        return State()

    def restore(self, state: State) -> None:
        """Take up what ``state`` returned."""
