"""What can be removed from a network: read off the labels of one forward pass, and proved by trial."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from pyro_bmrs.structures.attention import HeadwiseAttention
from pyro_bmrs.structures.copying import copied, undisturbed
from pyro_bmrs.structures.inputs import Inputs, batch_size, call, output_tensors, to_network
from pyro_bmrs.structures.labels import Classes, squeeze, support
from pyro_bmrs.structures.points import NoisePoint, noise_points, replace_everywhere
from pyro_bmrs.structures.record import Argument, Kind, Product, Reader, Record, Site, Slot, Structure, StructureSet
from pyro_bmrs.structures.rules import RULES
from pyro_bmrs.structures.tracer import Read, Tracer
from pyro_bmrs.structures.trial import Bench, proved

__all__ = ["find_structures", "propose"]

# Layers of torch.nn that can be made smaller; whatever else owns parameters there cannot.
_SHRINKABLE = {
    "Linear", "NonDynamicallyQuantizableLinear", "Conv1d", "Conv2d", "Conv3d", "ConvTranspose1d", "ConvTranspose2d",
    "ConvTranspose3d", "BatchNorm1d", "BatchNorm2d", "BatchNorm3d", "SyncBatchNorm", "LayerNorm", "RMSNorm",
    "GroupNorm", "InstanceNorm1d", "InstanceNorm2d", "InstanceNorm3d", "Embedding", "MultiheadAttention", "PReLU",
    "ParameterList", "ParameterDict",
}  # fmt: skip
_READERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def find_structures(
    net: nn.Module, example_inputs: Inputs, *, outputs: Sequence[str] = (), trial: bool = True
) -> StructureSet:
    """Return what can be removed from a network: channels, neurons, heads, each group by name, and proved.

    One forward pass in eval mode shows which positions of which tensors hang together. Then the removal of all that is
    offered is tried on a copy in float64, on random inputs of the example's shape, with parameters and buffers that are
    constant randomised; what changes the outputs is refused by name. The network is left as it was.

    Args:
        net: Any feed-forward module, trained or not, on any device. Where it has noise layers of its own, what they
            multiply is not offered a second time.
        example_inputs: What the network takes: a tensor, a tuple of positional inputs or a mapping of named ones.
            A few examples do.
        outputs: Names of modules whose outputs are to have noise themselves, as in the paper, where noise stands behind
            every batch norm. A channel of a sum then goes entirely where all its summands have lost it.
        trial: Whether to try removals. Without, what is offered has been read off a single forward pass.

    Returns:
        A mapping from the names of layers to ``Structure``. ``print`` it, and ``select`` from it.

    Raises:
        ValueError: If the network does not run on the example, ``outputs`` names no module, or a noise layer does not
            fit its input.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))
        >>> structures = bmrs.find_structures(net, torch.randn(2, 4))
        >>> {name: each.size for name, each in structures.items()}
        {'0': 8, '2': 8}
        >>> structures["0"].readers[0].module
        '2'
        >>> structures.refused
        {'4': 'the network returns it'}
    """
    structures = propose(net, example_inputs, outputs)
    if not trial:
        return structures
    return proved(structures, Bench.of(net, example_inputs, structures.record.low_precision))


def propose(net: nn.Module, example_inputs: Inputs, outputs: Sequence[str] = ()) -> StructureSet:
    """Return what could be removed as far as one forward pass shows, without proof.

    Args:
        net: Any module; it is copied, not changed. Its noise layers become the sites of the record.
        example_inputs: See ``find_structures``.
        outputs: See ``find_structures``.
    """
    _check_modules(net)
    net = copied(net).eval()
    example_inputs = to_network(example_inputs, net)
    for module in [module for module in net.modules() if type(module) is nn.MultiheadAttention]:
        HeadwiseAttention.adopt(module)
    points = noise_points(net)
    modules = {module: name for name, module in net.named_modules()}
    _check_names(outputs, modules.values())
    stand_ins = {site: _StandIn(site, point.dim) for site, point in points.items()}
    for site, point in points.items():
        net = replace_everywhere(net, point, stand_ins[site])
    tracer = Tracer(net, RULES)
    for each in stand_ins.values():
        each.tracer = tracer
    with undisturbed(net), torch.inference_mode():
        _hook(tracer, net, outputs)
        with tracer:
            result = _run(net, example_inputs)
        batches = _batch_dims(tracer, net, example_inputs)
    returned = output_tensors(result)
    if not returned:
        raise ValueError(
            f"the network returns a {type(result).__name__} without tensors in it, so that nothing can be compared; "
            "have it return tensors, in tuples, dictionaries or dataclasses"
        )
    tracer.use(returned)
    for tensor in returned:
        for labels in tracer.of(tensor):
            tracer.labels.freeze(labels, "the network returns it")
            tracer.read.append(labels)
    tracer.folds.leave(returned)
    _freeze_what_cannot_shrink(tracer, net)
    _check_points(tracer, points, outputs)
    return _Reading(tracer, net, points, outputs, batches).structures()


def _run(net: nn.Module, inputs: Inputs) -> Any:
    try:
        return call(net, inputs)
    except Exception as error:  # whatever a network raises
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(
            f"the network does not run on the example inputs ({reason}); give inputs that it takes"
        ) from error


def _batch_dims(tracer: Tracer, net: nn.Module, inputs: Inputs) -> dict[tuple[str, int | str], int]:
    """Return the dimension along which examples lie in each module's arguments: the one that grows with the batch."""
    before, tracer.shapes = tracer.shapes, {}
    size = batch_size(inputs)
    tracer.watching = False
    try:
        call(net, tree_map(lambda each: torch.cat([each, each]) if _is_batched(each, size) else each, inputs))
    except Exception:  # a network of one batch size; where examples lie is then guessed
        return {}
    found = {}
    for key, shapes in before.items():
        after = tracer.shapes.get(key, set())
        if len(shapes) == len(after) == 1 and len(next(iter(shapes))) == len(next(iter(after))):
            grown = [d for d, (a, b) in enumerate(zip(*shapes, *after, strict=True)) if b == 2 * a]
            if len(grown) == 1:
                found[key] = grown[0]
    return found


def _is_batched(value: Any, size: int) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0 and len(value) == size


class _StandIn(nn.Module):
    """Stands where a noise layer stood, and tells the tracer what passes."""

    def __init__(self, site: str, dim: int) -> None:
        super().__init__()
        self.site, self.dim = site, dim
        self.tracer: Tracer | None = None

    def forward(self, x: Tensor) -> Tensor:
        assert self.tracer is not None
        return self.tracer.boundary(self.site, x, self.dim) if self.tracer.watching else x


def _check_modules(net: nn.Module) -> None:
    for name, module in net.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise ValueError(f"{name or 'the network'!r} is a ScriptModule; give the module that it was made from")
    for name, parameter in net.named_parameters():
        if isinstance(parameter, nn.parameter.UninitializedParameter):
            raise ValueError(f"parameter {name!r} has no shape yet: run the network on an example once")


def _check_names(outputs: Sequence[str], names: Iterable[str]) -> None:
    names = list(names)
    for name in outputs:
        if name not in names:
            raise ValueError(f"outputs names {name!r}, but the network has no such module; it has {names}")


def _check_points(tracer: Tracer, points: dict[str, NoisePoint], outputs: Sequence[str]) -> None:
    for name in outputs:
        if f"{name}.theta" not in tracer.points:
            raise ValueError(f"outputs names {name!r}, which does not run in a forward pass on the example")
    for site, point in points.items():
        if site not in tracer.points:
            raise ValueError(
                f"the noise layer of {site!r} does not run in a forward pass on the example, so it cannot be fitted; "
                "remove it, or use it"
            )
        found = len(tracer.points[site][0])
        if found != point.size:
            raise ValueError(
                f"{site} is for {point.size} structures along dimension {point.dim}, but its input has {found} there"
            )


def _hook(tracer: Tracer, net: nn.Module, outputs: Sequence[str]) -> None:
    for name, module in net.named_modules():

        def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], name: str = name) -> None:
            tracer.enter(name, args, kwargs)

        def after(module: nn.Module, args: Any, kwargs: Any, output: Any, name: str = name) -> Any:
            tracer.leave()
            if name not in outputs or not tracer.watching:
                return None
            first = output[0] if isinstance(output, tuple | list) else output
            if not isinstance(first, Tensor):
                raise ValueError(f"outputs names {name!r}, whose output is a {type(output).__name__}, not a tensor")
            spatial = isinstance(module, nn.modules.conv._ConvNd | nn.modules.batchnorm._BatchNorm) and first.dim() > 2
            marked = tracer.boundary(f"{name}.theta", first, 1 if spatial else -1)
            return (marked, *output[1:]) if isinstance(output, tuple | list) else marked

        module.register_forward_pre_hook(before, with_kwargs=True)
        module.register_forward_hook(after, with_kwargs=True)


def _freeze_what_cannot_shrink(tracer: Tracer, net: nn.Module) -> None:
    for (name, _), labels in tracer.slots.items():
        owner = name.rpartition(".")[0]
        module = net.get_submodule(owner)
        kind = type(module)
        known = kind.__name__ in _SHRINKABLE or isinstance(module, HeadwiseAttention)
        if isinstance(module, nn.RNNBase | nn.RNNCellBase) or (
            kind.__module__.startswith("torch.nn.modules") and not known
        ):
            tracer.labels.freeze(labels, f"{owner!r} is a {kind.__name__}, which cannot be made smaller")


class _Reading:
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
        nothing = record.nothing()
        costs = record.savings("parameters", nothing), record.savings("flops", nothing)
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
            norm = self.tracer.folds.normed[name]
            kind = type(self.net.get_submodule(norm)).__name__
            return f"{norm!r}, a {kind} behind it, divides the noise out again in training"
        mask = torch.zeros(site.size, dtype=torch.bool)
        all_gone = {each: torch.zeros(other.size, dtype=torch.bool) for each, other in record.sites.items()}
        own = torch.cat([site.before, *([] if site.after is None else [site.after])])
        if bool(record.dead({name: mask}).any()) or bool(record.dead(all_gone)[own].any()):
            return None
        assert site.after is not None
        before = self._first_reason(site.before, "other layers read the same channels without it")
        after = self._first_reason(site.after, "other layers add to the same channels")
        return f"nothing can shrink in front of the noise ({before}) nor behind it ({after})"

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
            reason = self._reason(classes, slots, record) or (len(classes) == 1 and "there is only one of them")
            if reason:
                refused[name] = str(reason)
                continue
            groups.append((name, self._kind(classes, slots), classes, self._readers(slots)))
        groups.extend(
            (name, "output", record.sites[f"{name}.theta"].before, ()) for name in dict.fromkeys(self.outputs)
        )
        return groups, refused

    def _kind(self, classes: Tensor, slots: list[Slot]) -> Kind:
        if any(each in self.heads for each in classes.tolist()):
            return "head"
        summed = bool(self.summed[classes].any()) and self._makers(slots) > 1
        return "width" if summed else "channel"

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
                    f"{read.module or 'the network'!r}, a {kind}, reads it from something that it computes itself, so "
                    "that no noise can stand in front"
                )
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
