"""Asking the criterion, and removing what it says."""

import copy
import itertools
import math
import warnings
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.optim import Optimizer

from pyro_bmrs.criteria import Criterion, PruningContext
from pyro_bmrs.criteria.base import checked_scores
from pyro_bmrs.model.guides.flat import FlatGuide
from pyro_bmrs.model.network import NoisyNetwork
from pyro_bmrs.modes import evaluating
from pyro_bmrs.structures.compact import structures_of
from pyro_bmrs.structures.shrink import shrink_known
from pyro_bmrs.structures.structure_set import StructureSet
from pyro_bmrs.svi.checkpoint import State
from pyro_bmrs.svi.schedule import PostTraining

__all__ = ["Pruner"]


class Pruner:
    """Removes structures, and keeps scores and the posteriors for which they were removed.

    Args:
        model: The model, its masks changed in place.
        guide: Its guide.
        criterion: What to remove; None removes nothing.
        batch: Inputs and observations that criteria may look at.
        structures: What is known of the network's structures, if anything.

    Attributes:
        scores: For each site the score of each structure when it was last judged, of shape ``(original_size,)``.
        structures: What is known of the network's structures.
    """

    def __init__(
        self,
        model: NoisyNetwork,
        guide: FlatGuide,
        criterion: Criterion | None,
        batch: tuple[Tensor, Tensor],
        structures: StructureSet | None = None,
    ) -> None:
        self.model, self.guide, self.criterion, self.batch = model, guide, criterion, batch
        self.structures = structures_of(model.net, batch[0][:2]) if structures is None else structures
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
            devices = [self.guide.device] if self.guide.device.type == "cuda" else []
            with torch.random.fork_rng(devices), evaluating(self.model):
                self._scores(copy.deepcopy(self.criterion))  # which may count how often it is asked

    def remove_supported(self) -> dict[str, int]:
        """Remove what the criterion supports removing, and return how many that were for each site."""
        if self.criterion is None:
            return dict.fromkeys(self.model.noise, 0)
        supported, _ = self._judge(self.criterion)
        return self._remove(supported)

    def rank(self, schedule: PostTraining) -> None:
        """Fix the order in which ``remove_to`` removes: what the criterion supports first, by score."""
        if self.criterion is None:
            return
        by_site, scores = self._judge(self.criterion)
        supported = torch.cat(list(by_site.values()))
        flat = torch.cat(list(scores.values())).nan_to_num(nan=-math.inf)
        by_score = flat.argsort(descending=True)
        self._order = by_score[supported[by_score].argsort(descending=True, stable=True)]
        self._limit = int(supported.sum()) if schedule.stop else len(flat)

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
        known = self.model, self.guide, optimizer, self.batch[0][:2], self.structures
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

    def _judge(self, criterion: Criterion) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return which structures the criterion would remove, and its scores, which are noted."""
        self.model.eval()
        scores = self._scores(criterion)
        self._note(scores)
        return criterion.supported(self._context(), scores), scores

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
            judged = layer.keep.to(score.device) | known[positions].isnan()
            known[positions] = torch.where(judged, score, known[positions])

    def _remove(self, removed: Mapping[str, Tensor]) -> dict[str, int]:
        newly = torch.cat([removed[site] for site in self.guide.sizes]) & self.guide.keep
        for saved, parameter in zip(self._at_removal, self.guide.parameters(), strict=True):
            saved[newly] = parameter.detach()[newly]
        counts = {}
        for site, layer in self.model.noise.items():
            before = int(layer.keep.sum())
            layer.remove(removed[site])
            after = int(layer.keep.sum())
            counts[site] = before - after
            if before and not after:
                warnings.warn(
                    f"{site!r} has lost all its structures: nothing passes through them any more; lower "
                    "model.kl_weight, or prune later",
                    RuntimeWarning,
                    stacklevel=6,
                )
        return counts
