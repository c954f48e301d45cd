"""What to remove first: one protocol for evidence, signal-to-noise, norms, gradients and chance.

Every criterion gives each structure a score, **higher = remove first**. Most have a decision line of their own and
shift the score so that it lies at 0: remove where ``score >= 0``. The others only rank, and remove as much as another
criterion would.
"""

from dataclasses import dataclass

from torch import Tensor

from pyro_bmrs.model.guides.flat import FlatGuide
from pyro_bmrs.model.network import NoisyNetwork
from pyro_bmrs.structures.structure_set import StructureSet

__all__ = ["Criterion", "PruningContext", "Scores"]

Scores = dict[str, Tensor]


@dataclass(frozen=True)
class PruningContext:
    """What a criterion may look at.

    Attributes:
        model: The model, whose masks say what has been removed already.
        guide: Its guide.
        structures: What ``find_structures`` has said of the network, or the noise was attached to.
        x: A batch of training inputs, of shape ``(batch, ...)``.
        y: Their observations.
    """

    model: NoisyNetwork
    guide: FlatGuide
    structures: StructureSet
    x: Tensor
    y: Tensor


class Criterion:
    """A rule for what to remove."""

    def scores(self, context: PruningContext) -> Scores:
        """Return a tensor of shape ``(size,)`` for each site; higher = remove first."""
        raise NotImplementedError

    def supported(self, context: PruningContext, scores: Scores | None = None) -> Scores:
        """Return for each site which of the remaining structures the criterion would remove, as bool tensors.

        A score that is not finite never removes anything.

        Args:
            context: What to judge.
            scores: The criterion's scores of it, if they are known already.
        """
        scores = self.scores(context) if scores is None else scores
        masks = context.model.masks
        return {site: (score >= 0) & score.isfinite() & masks[site] for site, score in scores.items()}
