"""What to remove first: one protocol for evidence, signal-to-noise, norms, gradients and chance.

Every criterion gives each structure a score, **higher = remove first**. Most have a decision line of their own and
shift the score so that it lies at 0: remove where ``score >= 0``. The others only rank, and remove as much as another
criterion would.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from pyro_bmrs.checks import described
from pyro_bmrs.model.network import NoisyNetwork
from pyro_bmrs.structures.any_guide import noise_posterior
from pyro_bmrs.structures.inputs import Inputs
from pyro_bmrs.structures.pair import NoisePosterior
from pyro_bmrs.structures.structure_set import StructureSet

__all__ = ["Criterion", "PruningContext", "Scores", "checked_scores"]

Scores = dict[str, Tensor]


@dataclass(frozen=True)
class PruningContext:
    """What a criterion may look at.

    Attributes:
        model: The model, whose masks say what has been removed already.
        guide: Its guide, of any kind: what ``noise_posterior(model, guide, x, y)`` makes of it.
        structures: What ``find_structures`` has said of the network, or the noise was attached to.
        x: A batch of training inputs, of shape ``(batch, ...)``, or a tuple or dictionary of such.
        y: Their observations.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), bmrs.MultiplicativeNoise(8), nn.Linear(8, 3))
        >>> model = bmrs.NoisyNetwork(net)
        >>> guide = bmrs.TruncatedLogNormalGuide(model)
        >>> x = torch.randn(5, 4)
        >>> context = bmrs.PruningContext(model, guide, bmrs.find_structures(net, x), x, torch.arange(5) % 3)
        >>> list(context.guide.posterior())
        ['2.theta']
    """

    model: NoisyNetwork
    guide: NoisePosterior
    structures: StructureSet
    x: Inputs
    y: Tensor

    def __post_init__(self) -> None:
        object.__setattr__(self, "guide", noise_posterior(self.model, self.guide, self.x, self.y))


class Criterion:
    """A rule for what to remove.

    Attributes:
        has_line: Whether it says by itself how much to remove; a criterion that only ranks does not.

    Example:
        >>> class SmallMean(bmrs.Criterion):
        ...     def scores(self, context):
        ...         return {site: 0.5 - q.mean for site, q in context.guide.posterior().items()}
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), bmrs.MultiplicativeNoise(8), nn.Linear(8, 3))
        >>> model = bmrs.NoisyNetwork(net)
        >>> guide = bmrs.TruncatedLogNormalGuide(model)
        >>> x = torch.randn(5, 4)
        >>> context = bmrs.PruningContext(model, guide, bmrs.find_structures(net, x), x, torch.arange(5) % 3)
        >>> SmallMean().removable(context)["2.theta"].sum()
        tensor(0)
    """

    has_line: ClassVar[bool] = True

    def scores(self, context: PruningContext) -> Scores:
        """Return a tensor of shape ``(size,)`` for each site; higher = remove first."""
        raise NotImplementedError

    def removable(self, context: PruningContext, scores: Scores | None = None) -> Scores:
        """Return for each site which of the remaining structures the criterion would remove, as bool tensors.

        A score that is not finite never removes anything.

        Args:
            context: What to score.
            scores: The criterion's scores of it, if they are known already.
        """
        scores = self.scores(context) if scores is None else scores
        masks = context.model.masks
        return {site: (score >= 0) & score.isfinite() & masks[site] for site, score in scores.items()}


def checked_scores(criterion: Criterion, context: PruningContext) -> Scores:
    """Return what a criterion makes of ``context``, without gradients.

    Raises:
        TypeError: If it is no tensor for each site.
        ValueError: If sites or shapes are not those of the model.
    """
    name, sizes = type(criterion).__name__, context.model.sizes
    scores: Any = criterion.scores(context)
    if not isinstance(scores, Mapping):
        raise TypeError(f"scores of {name} must map each site to a tensor, but it returned {described(scores)}")
    if scores.keys() != sizes.keys():
        raise ValueError(f"scores of {name} must be for the sites {list(sizes)}, but are for {list(scores)}")
    for site, score in scores.items():
        real = isinstance(score, Tensor) and not score.is_complex()
        if not (real and score.shape == (sizes[site],)):
            raise (ValueError if real else TypeError)(
                f"scores of {name} for site {site!r} must be a tensor of shape ({sizes[site]},), but are "
                f"{described(score)}"
            )
    return {site: scores[site].detach().to(context.guide.device) for site in sizes}
