"""From the labels of a forward pass to a record of classes, and to groups of structures or why they are refused."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from pyro_bmrs.structures.labels import Classes, squeeze, support
from pyro_bmrs.structures.points import NoisePoint
from pyro_bmrs.structures.record import Argument, Product, Reader, Record, Site, Slot
from pyro_bmrs.structures.structure_set import Kind, Structure, StructureSet
from pyro_bmrs.structures.tracer import Read, Tracer

__all__ = ["Reading"]

_READERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


class Reading:
    """Makes classes of labels, and structures of classes."""

    def __init__(
        self,
        tracer: Tracer,
        net: nn.Module,
        points: dict[str, NoisePoint],
        outputs: Sequence[str],
        batches: dict[tuple[str, int | str], int],
    ) -> None:
        self.tracer, self.net, self.points, self.outputs, self.batches = tracer, net, points, outputs, batches
        self.classes: Classes = tracer.labels.resolve()
        for check in tracer.checks:
            self.classes.refuse(check.offenders(self.classes), check.reason)
        self.slots = {slot: self.classes(labels) for slot, labels in tracer.slots.items()}
        self.norms = self._by_class((labels, name) for labels, name in tracer.norms)
        self.heads = self._by_class((labels, name) for labels, name in tracer.heads)
        self.summed = self.classes.marked(tracer.sums)
        self.averaged = self.classes.marked([labels for labels, _ in tracer.averaged])

    def _by_class(self, marks: Iterable[tuple[Tensor, str]]) -> dict[int, set[str]]:
        result: dict[int, set[str]] = defaultdict(set)
        for labels, name in marks:
            for each in self.classes(labels).unique().tolist():
                result[each].add(name)
        return result

    def structures(self) -> StructureSet:
        """Return what labels say, refused groups with their reason."""
        record = self._record()
        groups, refused = self._groups(record)
        costs = record.costs()
        found: dict[str, Structure] = {}
        for name, kind, classes, readers in groups:
            norms = sorted(set().union(*(self.norms.get(each, set()) for each in classes.tolist())))
            found[name] = Structure.of(record, name, kind, classes, readers, tuple(norms), costs)
        for site in self.points:
            why = self._site_trouble(site, record)
            if why:
                refused[site] = why
        return StructureSet(found, refused, record)

    def _site_trouble(self, name: str, record: Record) -> str | None:
        """Return why the noise of a layer inside the network should not be fitted, if there is a reason."""
        site = record.sites[name]
        if site.size == 1:
            return None  # a layer keeps its last structure, with noise 0 once it is removed
        if name in self.tracer.folds.normed:
            return self._normed(name)
        mask = torch.zeros(site.size, dtype=torch.bool)
        all_gone = {each: torch.zeros(other.size, dtype=torch.bool) for each, other in record.sites.items()}
        own = torch.cat([site.before, *([] if site.after is None else [site.after])])
        if bool(record.dead({name: mask}).any()) or bool(record.dead(all_gone)[own].any()):
            return None
        assert site.after is not None
        before = self._first_reason(site.before, "other layers read the same channels without it")
        after = self._first_reason(site.after, "other layers add to the same channels")
        return f"nothing can shrink in front of the noise ({before}) nor behind it ({after})"

    def _normed(self, site: str) -> str:
        """Return why there should be no noise in front of a batch norm."""
        norm = self.tracer.folds.normed[site]
        kind = type(self.net.get_submodule(norm)).__name__
        return f"{norm!r}, a {kind} behind it, divides the noise out again in training"

    def _first_reason(self, classes: Tensor, otherwise: str) -> str:
        reasons = [self.classes.reasons[each] for each in classes.tolist() if each in self.classes.reasons]
        return reasons[0] if reasons else otherwise

    def _record(self) -> Record:
        tracer, classes = self.tracer, self.classes
        fixed = torch.zeros(classes.count, dtype=torch.bool)
        fixed[list(classes.reasons)] = True
        parameters = frozenset(name for name, _ in self.net.named_parameters())
        counts = Counter(read.slot for read in tracer.reads)
        shared = {slot for slot, count in counts.items() if tracer.folds.uses(slot[0]) > count}
        heads: dict[str, list[Tensor]] = defaultdict(list)
        for labels, name in tracer.heads:
            heads[name].append(classes(labels).reshape(-1))
        return Record(
            count=classes.count,
            slots=self.slots,
            parameters=parameters,
            reading=frozenset(counts),
            fixed=fixed,
            written=classes.marked(tracer.written) | fixed,
            read=classes.marked(tracer.read) | fixed,  # by what it was that froze them
            sites={site: self._site(site, *labels) for site, labels in tracer.points.items()},
            heads={name: torch.cat(each).unique() for name, each in heads.items()},
            counted={name: classes(labels).reshape(-1) for labels, name in tracer.counted},
            work=tuple(Product(work.constant, tuple(map(classes, work.axes))) for work in tracer.work),
            shared=frozenset(shared),
            low_precision=tracer.low_precision,
            pairs=classes.marked(tracer.pairs) if tracer.pairs else None,
            averaged={name: classes(labels).reshape(-1) for labels, name in tracer.averaged},
        )

    def _site(self, name: str, before: Tensor, after: Tensor) -> Site:
        folds = self.tracer.folds
        after_classes = self.classes(after)
        readers = folds.readers(name) if len(after_classes.unique()) == len(after_classes) else []
        if not all(torch.isin(self.slots[slot], after_classes).all() for slot in readers):
            readers = []
        before_classes, maker = self.classes(before), folds.maker(name)
        if maker is not None:
            made = self.slots[maker.weight, maker.dim]
            if len(before_classes.unique()) != len(before_classes) or not torch.isin(made, before_classes).all():
                maker = None
        point = self.points.get(name)
        return Site(
            before_classes,
            after_classes,
            module=None if point is not None else name.removesuffix(".theta"),
            dim=self.tracer.point_dims[name] if point is None else point.dim,
            folds=tuple(readers),
            maker=maker,
        )

    def _groups(self, record: Record) -> tuple[list[tuple[str, Kind, Tensor, tuple[Reader, ...]]], dict[str, str]]:
        """Return groups of classes that lie on the same tensors, and why other groups are refused."""
        touched = record.nothing()
        for site in record.sites.values():
            touched[site.before] = True
            if site.after is not None:
                touched[site.after] = True
        groups: list[tuple[str, Kind, Tensor, tuple[Reader, ...]]] = []
        refused: dict[str, str] = {}
        names: Counter[str] = Counter()
        for classes, slots in self._alike(touched):
            if not any(slot in record.reading for slot in slots) and not self._makers(slots):
                continue
            makers = [slot for slot in slots if self._makers([slot])]
            writers = [slot for slot in slots if slot not in record.reading and slot[0] in record.parameters]
            name = _unique(_owner((makers or writers or slots)[0]), names)
            reason = self._reason(classes, slots, record) or (len(classes) == 1 and "it is the only one of its layer")
            if reason:
                refused[name] = str(reason)
                continue
            groups.append((name, self._kind(classes, slots), classes, self._readers(slots)))
        for name in dict.fromkeys(self.outputs):
            own = f"{name}.theta"
            if own in self.tracer.folds.normed:
                refused[name] = self._normed(own)
            else:
                groups.append((name, "output", record.sites[own].before, ()))
        return groups, refused

    def _kind(self, classes: Tensor, slots: list[Slot]) -> Kind:
        if any(each in self.heads for each in classes.tolist()):
            return "head"
        summed = bool(self.summed[classes].any()) and self._makers(slots) > 1
        return "width" if summed or bool(self.averaged[classes].any()) else "channel"

    def _makers(self, slots: list[Slot]) -> int:
        """Return how many layers make channels along these dimensions."""
        count = 0
        for name, d in slots:
            layer = self.net.get_submodule(name.rpartition(".")[0])
            made = 1 if isinstance(layer, nn.modules.conv._ConvTransposeNd) else 0
            count += isinstance(layer, _READERS) and name.endswith("weight") and d == made
        return count

    def _alike(self, left_out: Tensor) -> list[tuple[Tensor, list[Slot]]]:
        """Return classes that lie on the same dimensions of the same tensors, cannot shrink for the same reason, ..."""
        generator = torch.Generator().manual_seed(0)
        signature = torch.zeros(self.classes.count, dtype=torch.int64)
        for axis in self.slots.values():
            own = axis[axis >= 0].unique()
            signature[own] += torch.randint(2**62, (), generator=generator)
        for reason in dict.fromkeys(self.classes.reasons.values()):
            same = [each for each, why in self.classes.reasons.items() if why == reason]
            signature[same] += torch.randint(2**62, (), generator=generator)
        signature[left_out] = 0
        where: dict[int, list[Slot]] = defaultdict(list)
        for slot, axis in self.slots.items():
            for each in signature[axis[axis >= 0].unique()].unique().tolist():
                where[each].append(slot)
        order = signature.argsort(stable=True)
        values, counts = signature[order].unique_consecutive(return_counts=True)
        found = dict(zip(values.tolist(), order.split(counts.tolist()), strict=True))
        return [(found[value], slots) for value, slots in where.items() if value != 0]

    def _reason(self, classes: Tensor, slots: list[Slot], record: Record) -> str | None:
        first = int(classes[0])
        if first in self.classes.reasons:
            return self.classes.reasons[first]
        for read in self.tracer.reads:
            if read.slot in slots and not self._arguments(read):
                kind = type(self.net.get_submodule(read.module)).__name__
                return (
                    f"{read.module or 'the network'!r}, a {kind}, multiplies what it has computed itself by this "
                    "weight: for noise to stand in front, make the product a module, such as nn.Linear"
                )
        if not any(name in self.tracer.used for name, _ in slots):
            return "it is not used in a forward pass on the example"
        return None

    def _readers(self, slots: list[Slot]) -> tuple[Reader, ...]:
        """Return what reads a group; a module inside another that reads the same tensor needs no noise of its own."""
        reads = [(read, self._arguments(read)) for read in self.tracer.reads if read.slot in slots]
        scaled = {(read.module, tensor) for read, arguments in reads for _, _, tensor in arguments}
        readers = []
        for read, arguments in reads:
            outer = {tensor for module, tensor in scaled if _is_inside(read.module, module)}
            own = [(key, dim) for key, dim, tensor in arguments if tensor not in outer]
            held = (Argument(key, dim, self.batches.get((read.module, key))) for key, dim in own)
            readers.append(Reader(read.module, read.slot, tuple(held)))
        return tuple(dict.fromkeys(readers))

    def _arguments(self, read: Read) -> list[tuple[int | str, int, int]]:
        """Return the arguments of a module that hold the channels it reads along one dimension, with their tensors."""
        found = []
        for key, labels, tensor in read.arguments:
            channels = squeeze(self.classes(labels))
            if len(support(channels)) != 1:
                continue
            flat, slot = channels.reshape(-1), self.slots[read.slot]
            if len(flat) == len(slot) and bool(((flat == slot) | (flat < 0)).all()):  # others are inputs, say
                found.append((key, next(iter(support(channels))) - channels.dim(), tensor))
        return found


def _owner(slot: Slot) -> str:
    return slot[0].rpartition(".")[0] or slot[0]


def _is_inside(inner: str, outer: str) -> bool:
    return inner != outer and (not outer or inner.startswith(f"{outer}."))


def _unique(name: str, seen: Counter[str]) -> str:
    seen[name] += 1
    return name if seen[name] == 1 else f"{name}:{seen[name]}"
