"""The gradients of training itself, taken as it goes: free-form evidence at next to no cost."""

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pyro_bmrs.bmr.free_form import GradientSums
from pyro_bmrs.checks import check_integer
from pyro_bmrs.model.guides.flat import FlatGuide, check_guide
from pyro_bmrs.randomness import local_seed
from pyro_bmrs.structures.inputs import Inputs
from pyro_bmrs.svi.free_form import FreeFormEvidence, curvature, evidence_of

__all__ = ["TrainingGradients"]


class TrainingGradients:
    r"""Takes the sums of gradients from training's own backward passes, which cost next to nothing more.

    It listens to the guide from its creation on: make it before ``fit``, and give it to ``FreeFormCriterion`` or ask it
    for ``evidence()``. Noise must have a draw for each example, or draws that examples share (``granularity`` of
    ``"example"`` or ``"shared"``). Steps must be neither compiled nor in less than float32, and of one process. A
    resumed fit listens anew.

    Args:
        guide: The guide.
        epochs: Number of last passes over the data that count: fewer are noisier, more are of older weights.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), bmrs.MultiplicativeNoise(8), nn.Linear(8, 3))
        >>> model = bmrs.NoisyNetwork(net)
        >>> guide = bmrs.TruncatedLogNormalGuide(model)
        >>> gradients = bmrs.TrainingGradients(guide)
        >>> data = torch.randn(50, 4), torch.arange(50) % 3
        >>> few = {"epochs": 3, "fine_tune_epochs": 0, "progress": False}
        >>> _ = bmrs.fit(model, guide, data, criterion=bmrs.FreeFormCriterion(gradients), **few)
        >>> gradients.evidence(data[0]).standard_error["2.theta"].shape
        torch.Size([8])
    """

    def __init__(self, guide: FlatGuide, epochs: int = 10) -> None:
        check_guide(guide)
        self.guide, self._epochs = guide, check_integer("epochs", epochs, low=1, high=10**6)
        self._passes: list[GradientSums] = []
        self._current: GradientSums | None = None
        self._steps = 0
        guide.listeners.append(self._listen)

    @property
    def sums(self) -> GradientSums | None:
        """The sums so far, of the structures that there are; None where no step with noise has been taken."""
        now = [] if self._current is None else [_of_mean_loss(self._current, self._steps)]
        structures = sum(self.guide.sizes.values())
        known = [each for each in (*self._passes, *now) if each.values.shape[1] == structures]
        return _added(known) if known else None

    def evidence(self, x: Inputs) -> FreeFormEvidence:
        """Return the free-form evidence that the sums so far imply.

        Args:
            x: Inputs of a hundred training examples or more, for the Gauss-Newton curvature: gradients alone leave that
                of a narrow posterior open.

        Raises:
            ValueError: If there are none: no step with noise has been taken.
        """
        sums = self.sums
        if sums is None:
            raise ValueError("no gradients have been taken yet: train with noise first, not compiled")
        with local_seed(0, [self.guide.device], validate=False):
            sums = sums + curvature(self.guide.model, self.guide, x)
        return evidence_of(self.guide, sums, self.examples)

    @property
    def examples(self) -> int:
        """Number of examples that the likelihood counts: the model's, or those of a pass."""
        if self.guide.model.num_data is not None:
            return self.guide.model.num_data
        last = self._passes[-1] if self._passes else self._current
        return 0 if last is None else int(last.values[0, 0])

    def __deepcopy__(self, memo: Any) -> "TrainingGradients":
        return self  # of the guide that it listens to, whoever copies a criterion to try it

    def _listen(self, draws: Mapping[str, Tensor]) -> None:
        parts: dict[str, tuple[Tensor, Tensor]] = {}
        for site, theta in draws.items():
            if not theta.requires_grad:
                return
            if theta.dim() != 2:
                raise ValueError(
                    "training's gradients tell of each structure only where examples have noise of their own: use "
                    'granularity="example" or "shared"'
                )
            theta.register_hook(partial(self._hear, parts, list(draws), site, theta.detach()))

    def _hear(
        self, parts: dict[str, tuple[Tensor, Tensor]], sites: list[str], site: str, theta: Tensor, gradient: Tensor
    ) -> None:
        parts[site] = theta, gradient
        if len(parts) == len(sites):
            self._add(*(torch.cat([parts[name][i] for name in sites], -1) for i in range(2)))

    def _add(self, theta: Tensor, gradient: Tensor) -> None:
        """Add the sums of one step, whose loss falls as the log likelihood grows."""
        sums = GradientSums.of(theta, -gradient)
        fresh = self._current is None or self._current.values.shape != sums.values.shape  # or the network has shrunk
        self._current = sums if fresh or self._current is None else self._current + sums
        self._steps = 1 if fresh else self._steps + 1
        if float(self._current.values[0, 0]) >= (self.guide.model.num_data or math.inf):
            self._passes = [*self._passes, _of_mean_loss(self._current, self._steps)][-self._epochs :]
            self._current, self._steps = None, 0


def _of_mean_loss(sums: GradientSums, steps: int) -> GradientSums:
    """Return the sums for gradients of single examples, from those of losses that are means over batches.

    Each batch counts by its size over the mean size, so that the latter is the factor for all of them.
    """
    size = sums.values[0] / steps
    powers = torch.stack([torch.ones_like(size)] * 3 + [size, size, size * size])
    return GradientSums(sums.values * powers, sums.curvature, sums.curvature_count)


def _added(sums: list[GradientSums]) -> GradientSums:
    first, *others = sums
    for each in others:
        first = first + each
    return first
