"""The record of a network's structures: which position of which tensor belongs to which, and what goes with a mask.

Positions that can only go together form a *class*. A site's noise multiplies the channels of some classes, and where it
stands inside the network its products are channels of classes of their own. Everything that removes, counts or prices
structures reads this record and nothing else.
"""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Tensor

from pyro_bmrs.structures.folding import Maker
from pyro_bmrs.structures.labels import FIXED

if TYPE_CHECKING:
    from pyro_bmrs.structures.structure_set import Structure

__all__ = ["Argument", "Product", "Reader", "Record", "Site", "Slot", "positions", "renumbered"]

Slot = tuple[str, int]
"""A dimension of a parameter or buffer: its qualified name, and the dimension."""


class Argument(NamedTuple):
    """An argument of a module that holds channels.

    Attributes:
        key: Its position or name.
        dim: The dimension along which channels lie, counted from the end.
        batch: The dimension along which examples lie, counted from the start, or None where that is not known.
    """

    key: int | str
    dim: int
    batch: int | None


@dataclass(frozen=True)
class Reader:
    """A layer that reads channels.

    Attributes:
        module: Its qualified name.
        slot: The dimension of its parameter along which they lie.
        arguments: Which of the layer's arguments hold them.
    """

    module: str
    slot: Slot
    arguments: tuple[Argument, ...]


@dataclass(frozen=True)
class Site:
    """Where the noise of one site stands.

    Attributes:
        before: Class of each channel that is multiplied, of shape ``(size,)``.
        after: Class of each product, or None where the noise stands at the inputs of all readers.
        readers: Those readers.
        module: The module whose output is multiplied, where it is not a noise layer.
        dim: The dimension of that output, counted from the end.
        folds: Parameters that the noise can be multiplied into: those that read the products.
        maker: The layer that it can be multiplied into otherwise.
    """

    before: Tensor
    after: Tensor | None = None
    readers: tuple[Reader, ...] = ()
    module: str | None = None
    dim: int = 1
    folds: tuple[Slot, ...] = ()
    maker: Maker | None = None

    @property
    def size(self) -> int:
        """Number of structures."""
        return len(self.before)

    def relabelled(self, new: Tensor, kept: Tensor) -> "Site":
        """Return the site with the structures at ``kept``, its classes renumbered."""
        after = None if self.after is None else new[self.after[kept]]
        return replace(self, before=new[self.before[kept]], after=after)


@dataclass(frozen=True)
class Product:
    """A count in proportion to some extents: ``constant`` times how many positions each axis has.

    Attributes:
        constant: The factor.
        axes: For each axis the class of each position, ``FIXED`` for none.
    """

    constant: float
    axes: tuple[Tensor, ...]

    def total(self, dead: Tensor) -> float:
        """Return the count once classes are removed."""
        result = self.constant
        for axis in self.axes:
            result *= int((~_at(dead, axis)).sum())
        return result

    def add_savings(self, savings: Tensor, dead: Tensor) -> None:
        """Add to ``savings``, of shape ``(classes,)``, what the count loses with each class alone."""
        total = self.total(dead)
        if not total:
            return
        left = torch.full_like(savings, self.constant)
        for axis in self.axes:
            alive = axis[~_at(dead, axis)]
            left *= len(alive) - torch.bincount(alive[alive >= 0], minlength=len(savings))
        savings += total - left


def _mark(marks: Tensor, site: Site) -> None:
    """Mark all classes of a site, in place."""
    marks[site.before] = True
    if site.after is not None:
        marks[site.after] = True


def _at(marks: Tensor, axis: Tensor) -> Tensor:
    return torch.where(axis >= 0, marks[axis.clamp_min(0)], False)


@dataclass(frozen=True)
class Record:
    """See the module's docstring.

    Attributes:
        count: Number of classes.
        slots: Class of each position along each dimension of each parameter and buffer.
        parameters: Which of these are parameters; tied ones appear once, under their first name.
        reading: Slots along which channels are read.
        fixed: Classes that cannot be removed, bool of shape ``(count,)``.
        written: Classes whose channels are not zero where all noise in front of them is.
        read: Classes whose channels something reads besides noise sites.
        sites: By site name.
        heads: For each module that computes an attention, the classes of its heads.
        guessed: Those of them whose number of heads is known by its value, not by its name.
        counted: For each normalisation without tensors of its own, the class of each of its channels.
        work: Floating-point operations of a forward pass over the example.
        shared: Slots along which a parameter is read that has other uses too.
        low_precision: Whether the network computes anything in less precision than its own.
        averaged: For each layer norm or RMS norm whose channels can go one by one, the class of each.
        pairs: Classes of which a dimension keeps two, bool of shape ``(count,)``; of all others it keeps one.
    """

    count: int
    slots: dict[Slot, Tensor]
    parameters: frozenset[str]
    reading: frozenset[Slot]
    fixed: Tensor
    written: Tensor
    read: Tensor
    sites: dict[str, Site] = field(default_factory=dict)
    heads: dict[str, Tensor] = field(default_factory=dict)
    guessed: frozenset[str] = frozenset()
    counted: dict[str, Tensor] = field(default_factory=dict)
    work: tuple[Product, ...] = ()
    shared: frozenset[Slot] = frozenset()
    low_precision: bool = False
    pairs: Tensor | None = None
    averaged: dict[str, Tensor] = field(default_factory=dict)

    def nothing(self) -> Tensor:
        """Return no class, as bool of shape ``(count,)``."""
        return torch.zeros(self.count, dtype=torch.bool)

    def dead(self, masks: Mapping[str, Tensor], in_place: bool = False) -> Tensor:
        """Return which classes can go: bool of shape ``(count,)``.

        A class goes where nothing reads its channels any more, or where they are zero whatever the weights. A tensor
        never loses all of a dimension.

        Args:
            masks: For each site a bool tensor of shape ``(size,)``, True = keep.
            in_place: Whether noise stays in the network, so that each site loses the same structures on both sides,
                and none that its own mask keeps.
        """
        every = {name: torch.ones(site.size, dtype=torch.bool) for name, site in self.sites.items()}
        masks = every | {site: mask.cpu() for site, mask in masks.items()}
        zero, unread = self.nothing(), self.nothing()
        produced, multiplied = self.nothing(), self.nothing()
        for site in self.sites.values():
            multiplied[site.before] = True
            if site.after is not None:
                produced[site.after] = True
        while True:
            not_zero, needed = self.written.clone(), self.read.clone()
            for name, site in self.sites.items():
                if site.after is None:
                    needed[site.before[masks[name]]] = True
                else:
                    not_zero[site.after[masks[name] & ~zero[site.before]]] = True
                    needed[site.before[masks[name] & ~unread[site.after]]] = True
            new_zero, new_unread = produced & ~not_zero, multiplied & ~needed
            if torch.equal(new_zero, zero) and torch.equal(new_unread, unread):
                break
            zero, unread = new_zero, new_unread
        dead = (zero | unread) & ~self.fixed
        for axis in self.averaged.values() if in_place else ():  # a norm in training counts all of its channels
            dead[axis[axis >= 0]] = False
        self._revive(dead, masks if in_place else None)
        return dead

    def _revive(self, dead: Tensor, masks: Mapping[str, Tensor] | None) -> None:
        """Keep something of every dimension, in place; with masks, also what a site cannot lose on both sides."""
        while True:
            before = dead.clone()
            for axis in self.slots.values():
                removed = _at(dead, axis)
                least = 2 if self.pairs is not None and bool(_at(self.pairs, axis).any()) else 1
                short = least - int((~removed).sum())
                if short > 0 and bool(removed.any()):
                    dead[axis[removed].unique_consecutive()[:short]] = False
            for name, site in self.sites.items() if masks is not None else ():
                assert masks is not None
                removed = self.removed_structures(site, dead) & ~masks[name]
                removed[0] &= not bool(removed.all())
                dead[site.before[~removed]] = False
                if site.after is not None:
                    dead[site.after[~removed]] = False
            if torch.equal(before, dead):
                return

    def removed_structures(self, site: Site, dead: Tensor) -> Tensor:
        """Return which structures of a site are removed on both of its sides."""
        return dead[site.before] if site.after is None else dead[site.before] & dead[site.after]

    def removed(self, dead: Tensor) -> dict[Slot, Tensor]:
        """Return which positions go, for every dimension that loses any."""
        removed = {slot: _at(dead, axis) for slot, axis in self.slots.items()}
        return {slot: each for slot, each in removed.items() if bool(each.any())}

    def parameter_products(self) -> Iterator[Product]:
        """Iterate over the parameters' numbers of elements, a copy of those untied to take noise included."""
        shapes: dict[str, list[Tensor]] = {}
        for (name, _), axis in sorted(self.slots.items(), key=lambda item: item[0][1]):
            shapes.setdefault(name, []).append(axis)
        untied = [slot for site in self.sites.values() for slot in dict.fromkeys(site.folds) if slot in self.shared]
        for name in (*self.parameters, *(name for name, _ in untied)):
            yield Product(1, tuple(shapes.get(name, ())))

    def count_parameters(self, dead: Tensor) -> int:
        """Return the number of parameters once classes are removed."""
        return int(sum(each.total(dead) for each in self.parameter_products()))

    def count_if_masked(self, masks: Mapping[str, Tensor]) -> int:
        """Return the number of parameters if masked structures lost no more than the rows that make them."""
        removed = self.nothing()
        for site, mask in masks.items():
            removed[self.sites[site].before[~mask.cpu()]] = True
        kept = {slot: torch.full_like(self.slots[slot], FIXED) for slot in self.reading}
        return replace(self, slots=self.slots | kept, sites={}).count_parameters(removed)

    def savings(self, cost: Literal["parameters", "flops"], dead: Tensor) -> Tensor:
        """Return what each class costs, of shape ``(count,)``: what its removal alone would save."""
        savings = torch.zeros(self.count, dtype=torch.float64)
        for each in self.parameter_products() if cost == "parameters" else self.work:
            each.add_savings(savings, dead)
        return savings

    def costs(self) -> tuple[Tensor, Tensor]:
        """Return what each class costs in parameters and in floating-point operations, of shape ``(count,)`` each."""
        return self.savings("parameters", self.nothing()), self.savings("flops", self.nothing())

    def structure_costs(self, cost: Literal["parameters", "flops"], dead: Tensor) -> dict[str, Tensor]:
        """Return for each site what each structure costs, of shape ``(size,)``."""
        savings = self.savings(cost, dead)
        savings[dead | self.fixed] = 0
        sinks = self._counts([site.before for site in self.sites.values()])
        sources = self._counts([site.after for site in self.sites.values() if site.after is not None])
        alone = savings * (sinks <= 1) * ~self.read, savings * (sources <= 1) * ~self.written
        costs = {}
        for name, site in self.sites.items():
            costs[name] = alone[0][site.before].clone()
            if site.after is not None:
                costs[name] += alone[1][site.after]
        return costs

    def _counts(self, classes: list[Tensor]) -> Tensor:
        every = torch.cat([torch.empty(0, dtype=torch.long), *classes])
        return torch.bincount(every, minlength=self.count)

    def restricted(self, structures: Mapping[str, "Structure"], names: Collection[str]) -> "Record":
        """Return the record with the noise of these groups, and with sites inside the network that can only mask.

        Args:
            structures: Groups whose noise is to be there, by name.
            names: Sites of noise layers that may be removed, among others; the rest keep all their classes.
        """
        sites = dict(self.sites)
        written, read, fixed = self.written.clone(), self.read.clone(), self.fixed.clone()
        for name, site in self.sites.items():
            if site.module is None and name not in names:
                _mark(fixed, site)
            if site.module is not None and name.removesuffix(".theta") not in structures:
                del sites[name]
                read[site.before] = True
                written[site.after] = True
        for name, each in structures.items():
            if each.kind != "output":
                into = (reader for reader in each.readers if reader.module not in self.averaged)
                folds = tuple(dict.fromkeys(reader.slot for reader in into))
                sites[f"{name}.theta"] = Site(each.classes, readers=each.readers, folds=folds)
                read[each.classes] = False
        return replace(self, sites=sites, written=written, read=read, fixed=fixed)

    def guessing_heads(self, classes: Tensor) -> "Record":
        """Return the record in which attention with these classes has any attribute of its number of heads refitted."""
        names = [name for name, heads in self.heads.items() if bool(torch.isin(heads, classes).any())]
        return replace(self, guessed=self.guessed | set(names)) if set(names) - self.guessed else self

    def frozen(self, names: Collection[str]) -> "Record":
        """Return the record in which some sites can only mask."""
        fixed = self.fixed.clone()
        for name in names:
            _mark(fixed, self.sites[name])
        return replace(self, fixed=fixed)

    def without(self, dead: Tensor) -> "Record":
        """Return the record of the network that has lost these classes, noise still in place."""
        new = renumbered(dead)

        def left(axis: Tensor) -> Tensor:
            axis = axis[~_at(dead, axis)]
            return torch.where(axis >= 0, new[axis.clamp_min(0)], FIXED)

        sites = {}
        for name, site in self.sites.items():
            kept = ~self.removed_structures(site, dead)
            sites[name] = site.relabelled(new, kept)
        return replace(
            self,
            count=int((~dead).sum()),
            slots={slot: left(axis) for slot, axis in self.slots.items()},
            fixed=self.fixed[~dead],
            written=self.written[~dead],
            read=self.read[~dead],
            pairs=None if self.pairs is None else self.pairs[~dead],
            sites=sites,
            heads={module: left(classes) for module, classes in self.heads.items()},
            counted={module: left(axis) for module, axis in self.counted.items()},
            averaged={module: left(axis) for module, axis in self.averaged.items()},
            work=tuple(Product(each.constant, tuple(map(left, each.axes))) for each in self.work),
        )


def positions(classes: Tensor, axis: Tensor) -> Tensor:
    """Return, for each position of an axis, where its class stands among ``classes``, ``FIXED`` for nowhere."""
    ordered, order = classes.sort()
    at = torch.searchsorted(ordered, axis).clamp_max(len(classes) - 1)
    return torch.where(ordered[at] == axis, order[at], FIXED)


def renumbered(dead: Tensor) -> Tensor:
    """Return the number of each class once others are removed, ``FIXED`` for those, of shape ``(count,)``."""
    return torch.where(dead, FIXED, (~dead).cumsum(0) - 1)
