"""Pruning to a size: by steering the weight of the KL, or step by step where the criterion only ranks."""

import math
from collections.abc import Mapping
from typing import Literal

from torch import Tensor

from pyro_bmrs.structures.cost import count_flops, count_parameters
from pyro_bmrs.svi.pruner import Pruner

__all__ = ["Gradual", "Steering", "Target"]

_FIRST_MULTIPLIER = 0.05  # of the KL's weight: it rises while weights learn, in the place of a warm-up
_TURNS = 60  # of a fit
_GAIN = 0.2  # nats of the multiplier's logarithm, a turn, for each nat that the size's logarithm is off
_LARGEST_STEP = 0.4  # nats per turn
_FIRST_REMOVAL = 1 / 3  # of the steps: by then the multiplier has settled
_REMOVAL_AT_ALL_COSTS = 0.7  # of the steps: from here on by score, if the size that is removable is still too small
_CLOSE = 0.05  # nats of the size's logarithm
_NEARLY_THERE = 0.14  # nats of the size's logarithm that one more structure may be too many for
_LARGEST = 1e6
_SMALLEST_SIZE = 1e-4


class Target:
    """A size to reach while training, in turns, each of which also says what to multiply the weight of the KL by next.

    Args:
        pruner: Asks the criterion and removes.
        remove: Fraction of the cost to remove.
        cost: What is counted.
        steps: Number of steps with noise.

    Attributes:
        first_multiplier: What to multiply it by at first.

    Raises:
        ValueError: If there is no criterion, or the size is out of reach even with one structure per site.
    """

    first_multiplier = _FIRST_MULTIPLIER

    def __init__(self, pruner: Pruner, remove: float, cost: Literal["parameters", "flops"], steps: int) -> None:
        self.pruner, self.remove, self.cost, self.steps = pruner, remove, cost, steps
        if pruner.criterion is None:
            raise ValueError("a size needs a criterion that says what to remove first, but criterion is None")
        self._dense = self._cost(None)
        if not self._dense:
            raise ValueError(f"the network has no {cost} to remove")
        smallest = {site: mask & (mask.cumsum(0) == 1) for site, mask in pruner.masks.items()}
        if (most := self.cost_removed(smallest)) < remove:
            raise ValueError(
                f"remove={remove:g} is out of reach: with one structure left of each site, {most:.3f} of the "
                f"{cost} are removed; put noise on more structures"
            )

    def is_due(self, step: int) -> bool:
        """Return whether there is a turn after ``step`` steps."""
        return step < self.steps and step % max(self.steps // _TURNS, 1) == 0

    def turn(self, step: int, multiplier: float) -> tuple[dict[str, int], float]:
        """Remove what is due after ``step`` steps; return how many structures those were and the next multiplier."""
        raise NotImplementedError

    def complete(self) -> dict[str, int]:
        """Remove what the size still lacks, by score, and return how many structures those were."""
        return self.pruner.remove_within(self.cost_removed, self.remove, removable_only=False)

    def cost_removed(self, masks: Mapping[str, Tensor]) -> float:
        """Return the fraction of the cost that masks remove."""
        return 1 - self._cost(masks) / self._dense

    def _cost(self, masks: Mapping[str, Tensor] | None) -> int:
        net, structures = self.pruner.model.net, self.pruner.structures
        if self.cost == "parameters":
            return count_parameters(net, structures, masks)
        return count_flops(net, self.pruner.example, structures, masks)


class Steering(Target):
    """Says how to change the weight of the KL, and removes what is removable under it.

    The multiplier of the weight grows while the network that the criterion would leave is too large, and falls while it
    is too small, in proportion to the logarithm of the ratio. It must change slowly: posteriors follow it within some
    hundred steps, and a weight that has shot past its goal takes whole layers with it.
    """

    def turn(self, step: int, multiplier: float) -> tuple[dict[str, int], float]:
        off = self._off(self.pruner.masks_without_removable())
        removed: dict[str, int] = {}
        if step >= _FIRST_REMOVAL * self.steps and (off > -_CLOSE or step > _REMOVAL_AT_ALL_COSTS * self.steps):
            removed = self.pruner.remove_within(self.cost_removed, self.remove, removable_only=True)
        if off > 0 and self._off(self.pruner.masks) < _NEARLY_THERE:
            return removed, multiplier
        bound, step_size = math.log(_LARGEST), min(_GAIN * off, _LARGEST_STEP)
        return removed, math.exp(min(max(math.log(multiplier) + step_size, -bound), bound))

    def _off(self, masks: Mapping[str, Tensor]) -> float:
        """Return how much larger than the goal the network is that masks leave, as the logarithm of the ratio."""
        return math.log(max(1 - self.cost_removed(masks), _SMALLEST_SIZE) / (1 - self.remove))


class Gradual(Target):
    r"""Removes by score alone, for criteria without a decision line, much at first and less and less.

    In the first third of the steps the weight of the KL warms up. With t from 0 to 1 between that and 70 % of the
    steps, :math:`1 - (1 - t)^3` of what is to be removed is; later turns only see to it that it stays so.

    References:
        To prune, or not to prune: exploring the efficacy of pruning for model compression (Zhu and Gupta, 2017)
    """

    def turn(self, step: int, multiplier: float) -> tuple[dict[str, int], float]:
        begin, end = _FIRST_REMOVAL * self.steps, _REMOVAL_AT_ALL_COSTS * self.steps
        warm = _FIRST_MULTIPLIER + (1 - _FIRST_MULTIPLIER) * min(step / begin, 1)
        if step < begin:
            return {}, warm
        due = self.remove * (1 - (1 - min((step - begin) / (end - begin), 1)) ** 3)
        return self.pruner.remove_within(self.cost_removed, due, removable_only=False), warm
