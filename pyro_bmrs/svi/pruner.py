"""Asking the criterion, and removing what it says."""

import copy
import itertools
import math
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.optim import Optimizer

from pyro_bmrs.criteria import Criterion, PruningContext
from pyro_bmrs.criteria.base import checked_scores
from pyro_bmrs.eval_mode import evaluating
from pyro_bmrs.model.guides.flat import FlatGuide
from pyro_bmrs.model.network import NoisyNetwork
from pyro_bmrs.randomness import local_seed
from pyro_bmrs.structures.compact import structures_of
from pyro_bmrs.structures.inputs import Inputs, first_examples
from pyro_bmrs.structures.shrink import shrink_known
from pyro_bmrs.structures.structure_set import StructureSet
from pyro_bmrs.svi.checkpoint import State
from pyro_bmrs.warn import warn

__all__ = ["CostRemoved", "Pruner"]

_CLOSE_ENOUGH = 0.005  # fraction of the cost that need not be made up by removing what the evidence is against

CostRemoved = Callable[[Mapping[str, Tensor]], float]


class Pruner:
    """Removes structures, and keeps scores and the posteriors for which they were removed.

    Args:
        model: The model, its masks changed in place.
        guide: Its guide.
        criterion: What to remove; None removes nothing.
        batch: Inputs and observations that criteria may look at.
        structures: What is known of the network's structures, if anything.

    Attributes:
        scores: For each site the score of each structure when it was last evaluated, of shape ``(original_size,)``.
        structures: What is known of the network's structures.
        example: Inputs of two examples.
    """

    def __init__(
        self,
        model: NoisyNetwork,
        guide: FlatGuide,
        criterion: Criterion | None,
        batch: tuple[Inputs, Tensor],
        structures: StructureSet | None = None,
    ) -> None:
        self.model, self.guide, self.criterion, self.batch = model, guide, criterion, batch
        self.example = first_examples(batch[0], 2)
        self.structures = structures_of(model.net, self.example) if structures is None else structures
        self.scores: dict[str, Tensor] = {}
        self._at_removal = [parameter.detach().clone() for parameter in guide.parameters()]
        self._order = torch.empty(0, dtype=torch.long)
        self._limit = 0

    @property
    def masks(self) -> dict[str, Tensor]:
        """Which structures of the original network remain: bool tensors of shape ``(original_size,)``, True = kept."""
        return {site: layer.original_keep for site, layer in self.model.noise.items()}

    @property
    def positions(self) -> dict[str, Tensor]:
        """The original index of each structure that is physically there, by site."""
        return {site: layer.index for site, layer in self.model.noise.items()}

    def check_criterion(self) -> None:
        """Raise unless the criterion scores every structure; the random state is left alone.

        Raises:
            TypeError, ValueError: If what it returns are no scores.
        """
        if self.criterion is not None:
            with local_seed(devices=[self.guide.device]), evaluating(self.model):
                self._scores(copy.deepcopy(self.criterion))  # which may count how often it is asked

    def remove_by_criterion(self) -> dict[str, int]:
        """Remove what the criterion supports removing, and return how many that were for each site."""
        if self.criterion is None:
            return dict.fromkeys(self.model.noise, 0)
        removable, _ = self._evaluate(self.criterion)
        return self._remove(removable)

    def masks_without_removable(self) -> dict[str, Tensor]:
        """Return what would remain if all that the criterion supports removing now were removed."""
        assert self.criterion is not None
        removable, _ = self._evaluate(self.criterion)
        masks = self.masks
        for site, layer in self.model.noise.items():
            masks[site] = masks[site] & ~layer.in_original(removable[site], False)
        return masks

    def remove_within(self, cost_removed: CostRemoved, target: float, removable_only: bool) -> dict[str, int]:
        """Remove structures by score, as long as no more than ``target`` of the cost is removed; return how many.

        The last structure of a site is never removed.

        Args:
            cost_removed: From masks to the fraction of the cost that they remove.
            target: Fraction that may be removed.
            removable_only: Whether to remove only what the criterion supports; otherwise whatever it takes to come as
                close to the target as possible, from either side.
        """
        assert self.criterion is not None
        scores = self._noted_scores(self.criterion)
        flat = self.guide.join({site: self._spared(site, score) for site, score in scores.items()})
        candidates = flat > -math.inf
        if removable_only:
            candidates &= self.guide.join(self.criterion.removable(self._context(), scores))
        order = flat.argsort(descending=True, stable=True)
        order = order[candidates[order]]

        def removed(count: int) -> dict[str, Tensor]:
            chosen = torch.zeros_like(candidates)
            chosen[order[:count]] = True
            return self.guide.split(chosen)

        def fraction(count: int) -> float:
            first = removed(count)
            return cost_removed(
                {
                    site: layer.original_keep & ~layer.in_original(first[site], False)
                    for site, layer in self.model.noise.items()
                }
            )

        # the largest number of structures whose cost is within the target
        count = bisect_right(range(1, len(order) + 1), target, key=fraction)
        if not removable_only:  # the smallest that is close enough to it, or the closer one of the two around it
            fewest = bisect_left(range(len(order)), target - _CLOSE_ENOUGH, key=fraction)
            if fewest <= count:
                count = fewest
            elif count < len(order) and fraction(count + 1) - target < target - fraction(count):
                count += 1
        return self._remove(removed(count))

    def rank(self, stop: bool) -> None:
        """Fix the order in which ``remove_to`` removes: what the criterion supports first, by score.

        Args:
            stop: Whether to remove no more than the criterion supports.
        """
        if self.criterion is None:
            return
        by_site, scores = self._evaluate(self.criterion)
        removable = self.guide.join(by_site)
        flat = self.guide.join(scores).nan_to_num(nan=-math.inf)
        by_score = flat.argsort(descending=True)
        self._order = by_score[removable[by_score].argsort(descending=True, stable=True)]
        self._limit = int(removable.sum()) if stop else len(flat)

    def remove_to(self, level: float) -> dict[str, int]:
        """Remove the first structures of the order, up to a fraction ``level`` of all, and return how many are new."""
        removed = torch.zeros(len(self._order), dtype=torch.bool, device=self._order.device)
        removed[self._order[: self.count(level)]] = True
        return self._remove(self.guide.split(removed))

    def count(self, level: float) -> int:
        """Return how many structures are removed at ``level``, at most what the criterion supports."""
        return min(round(level * len(self._order)), self._limit)

    def is_exhausted(self, level: float | None) -> bool:
        """Return whether nothing more can be removed after ``level`` (None: before the first one)."""
        return self.criterion is None or (level is not None and self.count(level) == self._limit)

    def shrink(self, optimizer: Optimizer) -> bool:
        """Cut removed structures out of network, guide and optimiser, and return whether there were any."""
        sizes = self.model.sizes
        known = self.model, self.guide, optimizer, self.example, self.structures
        kept, self.structures = shrink_known(*known)
        if sizes == self.model.sizes:
            return False
        starts = itertools.accumulate(sizes.values(), initial=0)
        flat = torch.cat([index + start for index, start in zip(kept.values(), starts, strict=False)])
        self._at_removal = [saved[flat.to(saved.device)] for saved in self._at_removal]
        return True

    def shrink_to(self, positions: Mapping[str, Tensor], optimizer: Optimizer) -> None:
        """Cut a network that is whole down to those positions, as an interrupted fit had done.

        Raises:
            ValueError: If they are none of this network's.
        """
        for site, layer in self.model.noise.items():
            found = positions.get(site)
            if (
                found is None
                or found.dtype != torch.long
                or not torch.isin(found, layer.index.cpu()).all()
                or not bool((found.diff() > 0).all() and len(found))
            ):
                raise ValueError(f"its positions of the structures of {site!r} are none of this network")
        for site, layer in self.model.noise.items():
            layer.remove(~torch.isin(layer.index.cpu(), positions[site]))
        self.shrink(optimizer)

    def restore_removed(self) -> None:
        """Give removed structures back the posteriors they were removed for; Adam's momentum has moved them on."""
        removed = ~self.guide.keep
        with torch.no_grad():
            for saved, parameter in zip(self._at_removal, self.guide.parameters(), strict=True):
                parameter[removed] = saved[removed]

    def state(self) -> State:
        """Return all that a resumed fit needs to know."""
        tensors = {f"at_removal.{i}": saved for i, saved in enumerate(self._at_removal)}
        tensors |= {f"score.{site}": score for site, score in self.scores.items()}
        return State({**tensors, "order": self._order}, {"limit": self._limit})

    def restore(self, state: State) -> None:
        """Take up what ``state`` returned, once the network has been shrunk to the same positions."""
        device = self.guide.device
        self._at_removal = [state.tensors[f"at_removal.{i}"].to(device) for i in range(len(self._at_removal))]
        self.scores = {
            site: state.tensors[f"score.{site}"].to(device)
            for site in self.model.noise
            if f"score.{site}" in state.tensors
        }
        self._order, self._limit = state.tensors["order"].to(device), state.info["limit"]

    def _evaluate(self, criterion: Criterion) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return which structures the criterion would remove, and its scores, which are noted."""
        scores = self._noted_scores(criterion)
        return criterion.removable(self._context(), scores), scores

    def _noted_scores(self, criterion: Criterion) -> dict[str, Tensor]:
        self.model.eval()
        scores = self._scores(criterion)
        self._note(scores)
        return scores

    def _spared(self, site: str, score: Tensor) -> Tensor:
        """Return the scores of a site, minus infinity where nothing may be removed: removed, unknown, or last."""
        keep = self.model.noise[site].keep.to(score.device)
        score = score.nan_to_num(nan=-math.inf).masked_fill(~keep, -math.inf)
        if bool(keep.any()):
            best = int(score.masked_fill(~keep, math.inf).argmin())
            score[best] = -math.inf
        return score

    def _scores(self, criterion: Criterion) -> dict[str, Tensor]:
        return checked_scores(criterion, self._context())

    def _context(self) -> PruningContext:
        return PruningContext(self.model, self.guide, self.structures, *self.batch)

    def _note(self, scores: Mapping[str, Tensor]) -> None:
        """Keep the scores of structures that remain; those of removed ones stay what they were at removal."""
        for site, score in scores.items():
            layer = self.model.noise[site]
            known = self.scores.setdefault(site, score.new_full((layer.original_size,), math.nan))
            positions = layer.index.to(score.device)
            evaluated = layer.keep.to(score.device) | known[positions].isnan()
            known[positions] = torch.where(evaluated, score, known[positions])

    def _remove(self, removed: Mapping[str, Tensor]) -> dict[str, int]:
        newly = self.guide.join(removed) & self.guide.keep
        for saved, parameter in zip(self._at_removal, self.guide.parameters(), strict=True):
            saved[newly] = parameter.detach()[newly]
        counts = {}
        for site, layer in self.model.noise.items():
            before = int(layer.keep.sum())
            layer.remove(removed[site])
            after = int(layer.keep.sum())
            counts[site] = before - after
            if before and not after:
                warn(
                    f"{site!r} has lost all its structures: nothing passes through them any more. In a branch beside "
                    "which the signal goes on that may be right; otherwise lower kl_weight, or prune later",
                    RuntimeWarning,
                )
        return counts
