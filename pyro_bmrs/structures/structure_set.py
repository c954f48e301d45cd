"""What can be removed from a network, by name: what a caller looks at, selects from and prints."""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal, get_args

from torch import Tensor, nn

from pyro_bmrs.checks import described
from pyro_bmrs.structures.points import Attachment
from pyro_bmrs.structures.record import Reader, Record, Slot, positions, renumbered
from pyro_bmrs.structures.sampled_weights import with_fixed_weights

__all__ = ["Kind", "Structure", "StructureSet"]

Kind = Literal["channel", "head", "width", "output"]


@dataclass(frozen=True)
class Structure:
    """A group of structures: channels, heads or the like that lie on the same tensors.

    Attributes:
        name: Name of the layer that makes them.
        kind: ``"channel"``, ``"head"``, ``"width"`` (of a stream that several layers add to, such as a residual one) or
            ``"output"`` (of a module that was named).
        classes: Each structure's class in the record, of shape ``(size,)``.
        members: For every dimension of every tensor that they lie on, the structure that each position belongs to, -1
            for none.
        readers: The layers that read them.
        norms: Names of the normalisations on the way.
        parameters: How many parameters each of them costs, of shape ``(size,)``.
        flops: How many floating-point operations of a forward pass over the example.
    """

    name: str
    kind: Kind
    classes: Tensor
    members: dict[Slot, Tensor]
    readers: tuple[Reader, ...]
    norms: tuple[str, ...]
    parameters: Tensor
    flops: Tensor

    @property
    def size(self) -> int:
        """Number of structures."""
        return len(self.classes)

    @classmethod
    def of(
        cls,
        record: Record,
        name: str,
        kind: Kind,
        classes: Tensor,
        readers: tuple[Reader, ...],
        norms: tuple[str, ...],
        costs: tuple[Tensor, Tensor],
    ) -> "Structure":
        """Return the group of these classes of a record, given what all classes cost."""
        members = {slot: positions(classes, axis) for slot, axis in record.slots.items()}
        members = {slot: index for slot, index in members.items() if bool((index >= 0).any())}
        return cls(name, kind, classes, members, readers, norms, costs[0][classes], costs[1][classes])


class StructureSet(Mapping[str, Structure]):
    """What can be removed from a network, by name.

    Args:
        structures: Groups of structures by name.
        refused: Why other groups cannot be removed, by name.
        record: The network's record, with the sites of its noise layers.
        proved: Whether their removal has been tried.

    Attributes:
        refused: As given, and so are ``record`` and ``proved``.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 6), nn.Softmax(-1))
        >>> structures = bmrs.find_structures(net, torch.randn(2, 4))
        >>> list(structures), structures["0"].size, structures.proved
        (['0'], 8, True)
    """

    def __init__(
        self, structures: Mapping[str, Structure], refused: Mapping[str, str], record: Record, proved: bool = False
    ) -> None:
        self._structures = dict(structures)
        self.refused, self.record, self.proved = dict(refused), record, proved

    def __getitem__(self, name: str) -> Structure:
        if name not in self._structures:
            why = f": {self.refused[name]}" if name in self.refused else f"; there are {list(self._structures)}"
            raise KeyError(f"there are no structures called {name!r} to remove{why}")
        return self._structures[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._structures)

    def __len__(self) -> int:
        return len(self._structures)

    def select(
        self, kinds: Kind | tuple[Kind, ...] | None = None, names: str | tuple[str, ...] = "*"
    ) -> "StructureSet":
        """Return the groups of some kinds whose names match a pattern, such as ``"encoder.*"``.

        Raises:
            ValueError: If there is no such kind, or nothing is left.
        """
        kinds = (kinds,) if isinstance(kinds, str) else kinds
        if kinds is not None and (none := [kind for kind in kinds if kind not in get_args(Kind)]):
            raise ValueError(
                f"there is no kind {none[0]!r}, only {', '.join(get_args(Kind))}; for names write names=..."
            )
        patterns = (names,) if isinstance(names, str) else tuple(names)
        chosen = {
            name: each
            for name, each in self._structures.items()
            if (kinds is None or each.kind in kinds) and any(fnmatchcase(name, pattern) for pattern in patterns)
        }
        if not chosen:
            raise ValueError(f"no structures of kinds {kinds} match {names!r}; there are {list(self._structures)}")
        return StructureSet(chosen, self.refused, self.record, self.proved)

    def with_noise(self, sites: Collection[str] | None = None) -> "StructureSet":
        """Return the set with a site in the record for each of its groups, or for those whose sites are named.

        Sites of noise layers inside the network are there anyway.
        """
        chosen = {name: each for name, each in self.items() if sites is None or f"{name}.theta" in sites}
        placed = [name for name, site in self.record.sites.items() if site.module is None]
        return StructureSet(chosen, self.refused, self.record.restricted(chosen, placed), self.proved)

    def without(self, dead: Tensor) -> "StructureSet":
        """Return what is left once classes are removed, noise still in place."""
        record = self.record.without(dead)
        new, costs = renumbered(dead), record.costs()
        left = {}
        for name, each in self.items():
            site = record.sites.get(f"{name}.theta")
            classes = new[each.classes[~dead[each.classes]]] if site is None else site.before
            left[name] = Structure.of(record, name, each.kind, classes, each.readers, each.norms, costs)
        return StructureSet(left, self.refused, record, self.proved)

    def __repr__(self) -> str:
        return f"StructureSet({len(self)} groups, {sum(each.size for each in self.values())} structures)"

    def __str__(self) -> str:
        rows = [("structures", "kind", "size", "parameters each", "MFLOPs each", "read by")]
        for name, each in self.items():
            readers = ", ".join(dict.fromkeys(reader.module for reader in each.readers))
            flops = f"{float(each.flops.mean()) / 1e6:,.3f}"
            parameters = f"{float(each.parameters.mean()):,.0f}"
            rows.append((name, each.kind, str(each.size), parameters, flops, _shortened(readers, 60)))
        widths = [max(len(row[i]) for row in rows) for i in range(6)]
        lines = [_aligned(row, widths) for row in rows]
        refused = [f"  {name}: {why}" for name, why in self.refused.items()]
        return "\n".join([*lines, *(["refused:"] if refused else []), *refused])


def _aligned(row: tuple[str, ...], widths: list[int]) -> str:
    """Return a row of the table: words to the left, numbers to the right."""
    words = {0, 1, 5}
    cells = zip(row, widths, strict=True)
    return "  ".join(cell.ljust(w) if i in words else cell.rjust(w) for i, (cell, w) in enumerate(cells)).rstrip()


def _shortened(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[: length - 3]}..."


def check_structures(net: nn.Module, structures: StructureSet) -> None:
    """Raise unless ``structures`` are those of ``net``.

    Raises:
        TypeError: If they are no ``StructureSet``.
        ValueError: If they were found in another network.
    """
    if not isinstance(structures, StructureSet):
        raise TypeError(f"structures must be what find_structures returned, but got {described(structures)}")
    own = with_fixed_weights(net.net if isinstance(net, Attachment) else net)
    shapes = {name: tuple(tensor.shape) for name, tensor in (*own.named_parameters(), *own.named_buffers())}
    for (name, d), axis in structures.record.slots.items():
        found = shapes.get(name)
        if found is None or d >= len(found) or found[d] != len(axis):
            raise ValueError(
                f"structures were found in another network: there {name!r} had {len(axis)} positions along dimension "
                f"{d}, here its shape is {found}"
            )
