"""One forward pass that moves labels as it moves numbers."""

import bisect
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from pyro_bmrs.structures.blocks import Block, Cuts
from pyro_bmrs.structures.folding import FoldTracker
from pyro_bmrs.structures.labels import FIXED, Labels, squeeze, support

__all__ = ["Call", "Operand", "Read", "Tracer", "Work"]

Slot = tuple[str, int]
"""A dimension of a parameter or buffer: its qualified name, and the dimension."""


@dataclass
class Call:
    """One operation of the forward pass."""

    name: str
    function: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outputs: list[Tensor]
    inputs: list[Tensor]

    def argument(self, position: int, name: str, default: Any = None) -> Any:
        """Return an argument given by position or by name."""
        return self.args[position] if len(self.args) > position else self.kwargs.get(name, default)


@dataclass
class Operand:
    """A tensor in the index space of an operation: its labels and shape, aligned to one number of dimensions.

    Attributes:
        labels: As in ``labels.py``.
        shape: Extents; 1 where the operand is broadcast.
        parameter: Whether it is a parameter or buffer, or one with its elements moved.
    """

    labels: list[Tensor]
    shape: Sequence[int]
    parameter: bool = False


@dataclass
class Read:
    """A module that reads channels: it contracts them with one of its parameters.

    Attributes:
        module: Its qualified name.
        slot: The dimension of the parameter.
        arguments: The module's arguments, by position or name, that hold just what is read, or all: labels, and which
            tensor they are.
    """

    module: str
    slot: Slot
    arguments: list[tuple[int | str, Tensor, int]]


@dataclass
class Work:
    """Floating-point operations in proportion to the extents of labelled axes: ``constant`` times all extents."""

    constant: float
    axes: list[Tensor] = field(default_factory=list)


class Tracer(TorchDispatchMode):
    """Gives the positions of a network's tensors labels, and follows them through a forward pass.

    Enter it inside ``torch.inference_mode()``, where operations such as ``linear`` arrive as a whole.

    Args:
        net: The network; hooks are put on its modules, so give it a copy.
        rules: From the name of an operation to what it does to labels.
        averaging: Names of layer norms and RMS norms that may lose channels one by one; None where that is not asked.

    Attributes:
        labels: All labels.
        slots: Labels of each dimension of each parameter and floating-point buffer.
        reads: Where parameters read channels.
        written: Labels of channels that are not zero even where the noise in front of them is.
        read: Labels of channels that something reads.
        norms: Labels that a normalisation passes on, with the module's name.
        heads: Labels of attention heads, with the module that computes the attention.
        checks: Operations that count positions.
        sums: Labels of channels that are sums of what several layers make.
        pairs: Labels of channels of which two must stay.
        averaged: Labels of the channels of a layer norm or RMS norm that may lose some, with the module's name.
        counted: Labels of the channels of a normalisation without tensors of its own, with the module's name.
        points: For each noise site the labels of what it multiplies, and of the products.
        point_dims: The dimension along which each site multiplies, counted from the end.
        work: The operations that torch's counter counts.
        shapes: Shapes of each module's arguments, by its name and their position or name.
        folds: What a site's noise can be multiplied into.
        watching: Whether this is the pass that counts.
        low_precision: Whether anything was computed in less than the network's own precision.
        used: Names of the parameters and buffers that something was computed with.
    """

    def __init__(
        self,
        net: nn.Module,
        rules: dict[str, Callable[["Tracer", Call], None]],
        averaging: Collection[str] | None = None,
    ) -> None:
        super().__init__()
        self.rules, self.averaging = rules, averaging
        self.labels = Labels()
        self.slots: dict[Slot, Tensor] = {}
        self.reads: list[Read] = []
        self.written: list[Tensor] = []
        self.read: list[Tensor] = []
        self.norms: list[tuple[Tensor, str]] = []
        self.heads: list[tuple[Tensor, str]] = []
        self.sums: list[Tensor] = []
        self.checks: list[Block | Cuts] = []
        self.pairs: list[Tensor] = []
        self.counted: list[tuple[Tensor, str]] = []
        self.averaged: list[tuple[Tensor, str]] = []
        self.points: dict[str, tuple[Tensor, Tensor]] = {}
        self.point_dims: dict[str, int] = {}
        self.work: list[Work] = []
        self.folds = FoldTracker()
        self.low_precision = False
        self.used: set[str] = set()
        self.watching = True
        self._of: dict[int, list[Tensor]] = {}
        self._kept_alive: list[Any] = []
        self._deferred: dict[int, list[tuple[Tensor, Collection[int], str]]] = defaultdict(list)
        self._parameters: set[int] = set()
        self._storages: dict[int, list[Tensor]] = defaultdict(list)
        self._modules: list[tuple[str, dict[int | str, Any]]] = [("", {})]
        self.shapes: dict[tuple[str, int | str], set[torch.Size]] = {}
        self.unknown: Counter[tuple[str, str]] = Counter()
        self._label_tensors(net)

    def _label_tensors(self, net: nn.Module) -> None:
        buffers = [(name, b) for name, b in net.named_buffers() if b.is_floating_point() and b.numel() > 1]
        self._starts: list[int] = []
        self._named: list[Slot] = []
        for name, tensor in buffers:
            self._label_tensor(name, tensor)
        self.soft_below = self.labels.count
        for name, tensor in net.named_parameters():  # tied ones appear once
            self._label_tensor(name, tensor)
            self.folds.parameters[id(tensor)] = name
        for name, tensor in buffers:
            self.folds.parameters[id(tensor)] = name
        dtypes = {tensor.dtype for tensor in net.parameters() if tensor.is_floating_point()}
        self._dtype = max(dtypes, key=lambda dtype: torch.finfo(dtype).bits, default=torch.float32)

    def _label_tensor(self, name: str, tensor: Tensor) -> None:
        spread = []
        for d, size in enumerate(tensor.shape):
            self._starts.append(self.labels.count)
            self._named.append((name, d))
            self.slots[name, d] = self.labels.new(size)
            spread.append(self.slots[name, d].view([-1 if i == d else 1 for i in range(tensor.dim())]))
        self.set(tensor, spread)
        self._parameters.add(id(tensor))

    def slot_of(self, labels: Tensor) -> Slot | None:
        """Return the slot that labels were made for."""
        first = int(labels.reshape(-1)[0])
        i = bisect.bisect_right(self._starts, first) - 1
        if first < 0 or i < 0 or first >= self._starts[i] + len(self.slots[self._named[i]]):
            return None
        return self._named[i]

    @property
    def here(self) -> str:
        """The name of the module that is running."""
        return self._modules[-1][0]

    def place(self) -> str:
        """Return the module that is running, in words."""
        return f"{self.here!r}" if self.here else "the network itself"

    def enter(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Note that a module starts to run."""
        arguments: dict[int | str, Any] = dict(enumerate(args))
        arguments.update(kwargs)
        for key, value in arguments.items():
            if isinstance(value, Tensor):
                self.shapes.setdefault((name, key), set()).add(value.shape)
        self._modules.append((name, arguments))

    def leave(self) -> None:
        """Note that it ends."""
        self._modules.pop()

    def of(self, tensor: Any) -> list[Tensor]:
        """Return a tensor's labels."""
        return self._of.get(id(tensor), [])

    def set(self, tensor: Tensor, labels: Sequence[Tensor | None]) -> None:
        """Give a tensor labels."""
        found = [squeeze(each) for each in labels if each is not None]
        self._of[id(tensor)] = [each for each in found if each.numel() > 1]
        self._kept_alive.append(tensor)  # or its id could be another tensor's
        if not tensor.is_sparse and tensor.layout == torch.strided:
            self._storages[tensor.untyped_storage()._cdata].append(tensor)

    def is_parameter(self, tensor: Any) -> bool:
        """Return whether a tensor is a parameter or buffer, or one with its elements moved."""
        return id(tensor) in self._parameters

    def moved(self, source: Tensor, outputs: Sequence[Tensor]) -> None:
        """Note that outputs hold nothing but elements of ``source``."""
        if self.is_parameter(source):
            self._parameters.update(map(id, outputs))

    def operand(self, tensor: Any, dim: int) -> Operand:
        """Return a tensor in an index space of ``dim`` dimensions, aligned at the last."""
        shape = [1] * (dim - tensor.dim()) + list(tensor.shape)
        labels = [each.reshape([1] * (dim - each.dim()) + list(each.shape)) for each in self.of(tensor)]
        return Operand(labels, shape, self.is_parameter(tensor))

    def combine(self, operands: Sequence[Operand], reason: str) -> list[Tensor]:
        """Return the labels of an elementwise combination: labels that meet in one element share their fate."""
        operands = [self._without_soft(each, operands) for each in operands]
        merged: list[Tensor] = []
        for operand in operands:
            for labels in operand.labels:
                new = labels
                for other in [each for each in merged if support(each) & support(new)]:
                    merged = [each for each in merged if each is not other]
                    self.labels.join(other, new, reason)
                    shared = support(other) & support(new)
                    keep = other if int(other.max()) >= self.soft_below else new
                    new = _narrow(keep, support(keep) - shared)
                merged.append(new)
        results = []
        for labels in merged:
            fixed = {
                d
                for d in support(labels)
                if any(o.shape[d] > 1 and not any(d in support(each) for each in o.labels) for o in operands)
            }
            results.append(self.labels.tie(labels, fixed, reason))
        return [each for each in results if each is not None]

    def _without_soft(self, operand: Operand, operands: Sequence[Operand]) -> Operand:
        """Drop labels of buffers that other operands' labels do not match one by one: such a buffer has fixed sizes."""
        hard = [each for o in operands for each in o.labels if int(each.max()) >= self.soft_below]
        kept = []
        for labels in operand.labels:
            met = [each for each in hard if support(each) & support(labels)]
            if int(labels.max()) >= self.soft_below or all(support(each) == support(labels) for each in met):
                kept.append(labels)
        return Operand(kept, operand.shape, operand.parameter)

    def contract(self, a: Operand, b: Operand, over: int, outputs: int) -> list[Tensor]:
        """Return the labels of a sum over one dimension of a product, and note which parameter reads what.

        Args:
            a: What is read, in the index space of all dimensions.
            b: What it is multiplied with.
            over: The dimension that is summed over.
            outputs: How often each multiplication is made, over all dimensions.
        """
        self._count(a, b, over, outputs)
        weight = next((o for o in (b, a) if o.parameter), None)
        alone = [each for o in (a, b) for each in o.labels if support(each) == {over}]
        reason = f"it is combined in {self.place()} with something that cannot shrink alike"
        results = []
        for labels in self.combine([a, b], reason):
            if support(labels) != {over}:
                results.append(self.labels.tie(labels, {over}, reason))
                continue
            slot = None
            if weight is not None:
                slot = next((self.slot_of(each) for each in weight.labels if support(each) == {over}), None)
            if slot is None:
                self.labels.freeze(labels, f"{self.place()} multiplies it with what it computes itself")
            else:
                data = [each for o in (a, b) if o is not weight for each in o.labels if over in support(each)]
                self.reads.append(Read(self.here, slot, self._arguments(data)))
            self.read.append(labels)
        self.read.extend(alone)
        return [each for each in results if each is not None]

    def _arguments(self, read: Sequence[Tensor]) -> list[tuple[int | str, Tensor, int]]:
        running = self._modules[-1][1].items()
        arguments = [(key, labels, id(value)) for key, value in running for labels in self.of(value)]
        flat = [each.reshape(-1) for each in read]
        same = [each for each in arguments if any(torch.equal(each[1].reshape(-1), f) for f in flat)]
        return same or arguments

    def _count(self, a: Operand, b: Operand, over: int, outputs: int) -> None:
        axes: list[Tensor] = []
        total = 2.0 * outputs
        for d in range(len(a.shape)):
            size = max(a.shape[d], b.shape[d])
            found = [each for o in (a, b) for each in o.labels if d in support(each)]
            if size > 1 and found:
                labels = min(found, key=lambda each: len(support(each)))
                axes.append(_narrow(labels, support(labels) - {d}).reshape(-1))
                total /= size
        self.work.append(Work(total, axes))

    def average(self, labels: Tensor, x: Tensor, weight: Tensor) -> None:
        """Note that the module that is running, a norm, reads channels of ``x`` and averages over them."""
        (slot,) = (self.slot_of(each) for each in self.of(weight))
        assert slot is not None
        self.averaged.append((labels, self.here))
        data = [each for each in self.of(x) if support(each) & {x.dim() - 1}]
        self.reads.append(Read(self.here, slot, self._arguments(data)))
        self.read.append(labels)

    def mix(self, labels: Tensor, dims: Collection[int], what: str) -> Tensor | None:
        """Return labels behind an operation that mixes positions along ``dims``, or counts them."""
        return self.labels.tie(labels, dims, f"{what} in {self.place()} runs over it")

    def mix_if_used(self, labels: Tensor, dims: Collection[int], what: str, outputs: Sequence[Tensor]) -> Tensor | None:
        """Do what ``mix`` does once something uses one of the outputs: averages over heads often go unused."""
        within = support(labels) & frozenset(dims)
        if not within:
            return labels
        for each in outputs:
            self._deferred[id(each)].append((labels, dims, f"{what} in {self.place()} runs over it"))
        return None if within == support(labels) else _narrow(labels, within)

    def use(self, tensors: Sequence[Tensor]) -> None:
        """Note that tensors are used, by an operation or as outputs."""
        for each in tensors:
            for labels, dims, reason in self._deferred.pop(id(each), []):
                self.labels.tie(labels, dims, reason)

    def refuse(self, call: Call, why: str) -> None:
        """Freeze whatever an operation touches."""
        for tensor in call.inputs:
            for labels in self.of(tensor):
                self.labels.freeze(labels, why)

    def boundary(self, site: str, x: Tensor, dim: int) -> Tensor:
        """Return ``x`` as the products of a noise site, with labels of their own along ``dim``."""
        with _disable_current_modes():
            y = x.clone()
        dim %= x.dim()
        self.point_dims[site] = dim - x.dim()
        across = [each for each in self.of(x) if dim in support(each)]
        if across:
            along = self.labels.tie(across[0], support(across[0]) - {dim}, "")
            assert along is not None  # dim is left
            before = along.reshape(-1)
        else:
            before = torch.full((x.shape[dim],), FIXED)
        fixed = before < 0
        if bool(fixed.any()):
            inputs = self.labels.new(int(fixed.sum()))
            self.labels.freeze(inputs, "it is an input of the network, or computed by layers that cannot shrink")
            self.written.append(inputs)
            before = before.clone()
            before[fixed] = inputs
        if site in self.points:
            earlier, after = self.points[site]
            self.labels.join(earlier, before, "")
        else:
            after = self.labels.new(x.shape[dim])
            self.points[site] = before, after
        if x.shape[dim] == 1:
            for each in (before, after):
                self.labels.freeze(each, "it is the only one of its layer")
        self.set(y, [*(each for each in self.of(x) if dim not in support(each)), _along(after, dim, x.dim())])
        self.folds.boundary(site, x, y)
        return y

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        inputs = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
        outputs = [each for each in tree_leaves(out) if isinstance(each, Tensor)]
        for each in outputs:
            if each.is_floating_point() and torch.finfo(each.dtype).bits < torch.finfo(self._dtype).bits:
                self.low_precision = True
        call = Call(func._overloadpacket.__name__, func, args, kwargs, outputs, inputs)
        with _disable_current_modes():
            self.folds.observe(call, self.here)
            self.used.update(self.folds.parameters[id(each)] for each in inputs if id(each) in self.folds.parameters)
            self.use(inputs)
            if any(self.of(each) for each in inputs):
                self._apply(call)
        return out

    def _apply(self, call: Call) -> None:
        in_place = call.function._schema.is_mutable
        rule = self.rules.get(call.name.rstrip("_") if not call.name.startswith("_") else call.name)
        try:
            if in_place and self._writes_into_part(call):
                self._freeze_storage(call.args[0], f"{self.place()} writes into a part of it")
            elif rule is None:
                self.unknown[call.name, self.here] += 1
                self.refuse(call, f"{self.place()} applies {call.name!r} to it, an operation that is not known")
            else:
                rule(self, call)
        except Exception as error:  # what a rule cannot digest is as good as unknown
            self.unknown[f"{call.name}: {type(error).__name__} {error}", self.here] += 1
            self.refuse(call, f"{self.place()} applies {call.name!r} to it in a way that is not known")

    def _writes_into_part(self, call: Call) -> bool:
        target = call.args[0] if call.args and isinstance(call.args[0], Tensor) else None
        if target is None:
            return False
        others = self._storages.get(target.untyped_storage()._cdata, [])
        return any(other.shape != target.shape or other.stride() != target.stride() for other in others) or (
            not others and target.untyped_storage().nbytes() > target.numel() * target.element_size()
        )

    def _freeze_storage(self, target: Tensor, reason: str) -> None:
        for tensor in (target, *self._storages.get(target.untyped_storage()._cdata, [])):
            for labels in self.of(tensor):
                self.labels.freeze(labels, reason)


def _narrow(labels: Tensor, dims: Collection[int]) -> Tensor:
    for d in dims:
        labels = labels.narrow(d, 0, 1)
    return labels


def _along(labels: Tensor, dim: int, dims: int) -> Tensor:
    return labels.view([-1 if d == dim else 1 for d in range(dims)])
