"""Operations that move elements: labels move alike."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from pyro_bmrs.structures.blocks import Block, Cuts
from pyro_bmrs.structures.labels import FIXED, squeeze, support
from pyro_bmrs.structures.rules.registry import rule
from pyro_bmrs.structures.tracer import Call, Operand, Tracer


@rule("clone", "alias", "detach", "lift_fresh", "contiguous", "to", "_to_copy", "type_as", "float", "double", "half",
       "zeros_like", "ones_like", "empty_like", "full_like", "rand_like", "randn_like", "type")  # fmt: skip
def _same(tracer: Tracer, call: Call) -> None:
    x = call.args[0]
    for y in call.outputs:
        tracer.set(y, tracer.of(x) if y.shape == x.shape else [])
    if call.name in ("ones_like", "full_like", "rand_like", "randn_like", "empty_like"):
        tracer.written.extend(tracer.of(x))
    if call.name not in ("zeros_like", "ones_like", "empty_like", "full_like", "rand_like", "randn_like"):
        tracer.moved(x, call.outputs)


@rule("view", "_unsafe_view", "reshape", "view_as", "reshape_as", "flatten", "unflatten", "ravel", "_reshape_alias",
       "squeeze", "unsqueeze")  # fmt: skip
def _reshape(tracer: Tracer, call: Call) -> None:
    x, y = call.args[0], call.outputs[0]
    if call.name == "squeeze" and len(call.args) == 1:  # which would take a last channel's dimension too
        tracer.pairs.extend(tracer.of(x))
    tracer.set(y, [each.expand(x.shape).reshape(y.shape) for each in tracer.of(x)])
    tracer.moved(x, [y])
    reason = f"{tracer.place()} reshapes it in a way that its removal would break"
    tracer.checks.extend(Block(each, reason) for each in tracer.of(y) if len(support(each)) > 1)


@rule("permute", "transpose", "t", "expand", "expand_as", "flip", "repeat", "repeat_interleave", "tile", "movedim",
       "moveaxis", "swapaxes", "swapdims", "adjoint", "mT", "numpy_T", "fliplr", "flipud", "broadcast_to",
       "pixel_unshuffle")  # fmt: skip
def _move(tracer: Tracer, call: Call) -> None:
    """Move labels as the operation moves elements."""
    x = call.args[0]
    for tensor in call.inputs[1:]:  # indices and the like must not depend on what could be removed
        for labels in tracer.of(tensor):
            tracer.labels.freeze(labels, f"{tracer.place()} selects positions by it")
    results: list[list[Tensor]] = [[] for _ in call.outputs]
    for labels in tracer.of(x):
        moved = _on_labels(call, labels.expand(x.shape))
        for result, each in zip(results, moved, strict=True):
            result.append(each)
            if not support(squeeze(each)):
                tracer.labels.freeze(each, f"{tracer.place()} picks a single one out")
    for y, result in zip(call.outputs, results, strict=True):
        tracer.set(y, result)
    tracer.moved(x, call.outputs)


@rule("slice", "select", "narrow", "split", "split_with_sizes", "chunk", "unbind", "unsafe_split", "unsafe_chunk",
       "tensor_split", "hsplit", "vsplit", "dsplit")  # fmt: skip
def _take_parts(tracer: Tracer, call: Call) -> None:
    """Move labels to the parts that are taken, and note where they were cut."""
    x = call.args[0]
    dim, starts, ends = _cuts(call, x)
    whole = call.name not in ("slice", "select", "narrow")
    reason = f"{tracer.place()} takes parts of it at fixed positions"
    for labels in tracer.of(x):
        if dim in support(labels) and call.name == "slice" and call.argument(4, "step", 1) != 1:
            tracer.labels.freeze(labels, reason)
        elif dim in support(labels):
            tracer.checks.append(Cuts(labels, dim, starts, ends, whole, reason))
    _move(tracer, call)


def _cuts(call: Call, x: Tensor) -> tuple[int, tuple[int, ...], tuple[int, ...]]:
    """Return the dimension, and the cuts counted from its start and from its end."""
    named = {"hsplit": 0 if x.dim() == 1 else 1, "vsplit": 0, "dsplit": 2}
    if call.name in ("slice", "select", "narrow", "unbind"):
        dim = call.argument(1, "dim", 0) % x.dim()
    else:
        dim = named[call.name] if call.name in named else call.argument(2, "dim", 0) % x.dim()
    size = x.shape[dim]
    if call.name == "slice":
        first, last = call.argument(2, "start") or 0, call.argument(3, "end")
        last = size if last is None else last
        cuts = [each for each in (first, last) if each != 0 and each < size]
    elif call.name == "select":
        index = call.argument(2, "index")
        cuts = [index, index + 1] if index >= 0 else [index, *([index + 1] if index < -1 else [])]
    elif call.name == "narrow":
        first, length = call.argument(2, "start"), call.argument(3, "length")
        cuts = [int(first), int(first) + length]
    else:
        sizes = [1 if call.name == "unbind" else each.shape[dim] for each in call.outputs]
        cuts = [sum(sizes[:i]) for i in range(1, len(sizes))]
    return dim, tuple(each for each in cuts if 0 < each < size), tuple(-each for each in cuts if each < 0)


@rule("index", "index_select", "gather", "take_along_dim", "roll", "unfold", "pixel_shuffle", "channel_shuffle",
       "native_channel_shuffle", "im2col", "diagonal", "rot90", "tril", "triu")  # fmt: skip
def _rearrange(tracer: Tracer, call: Call) -> None:
    """Move labels; what the operation moves from one place to another by numbers cannot be removed."""
    x = call.args[0]
    _move(tracer, call)
    before = [set(each.unique().tolist()) for each in tracer.of(x)]
    for y in call.outputs:
        for labels in tracer.of(y):
            varies = [each for each in tracer.of(x) if set(labels.unique().tolist()) & set(each.unique().tolist())]
            same = any(_same_order(labels, each) for each in varies)
            if call.name in ("pixel_shuffle", "channel_shuffle", "native_channel_shuffle"):
                blocks = _shuffled(call, varies)
                reason = f"{tracer.place()} shuffles it in a way that its removal would break"
                tracer.checks.extend(Block(each, reason) for each in blocks)
            elif not same:
                tracer.labels.freeze(labels, f"{tracer.place()} rearranges it by position")
    if before and not any(tracer.of(y) for y in call.outputs):
        for labels in tracer.of(x):
            tracer.labels.freeze(labels, f"{tracer.place()} picks a single one out")


def _same_order(after: Tensor, before: Tensor) -> bool:
    """Return whether labels still vary along one dimension alone, all of them in the same order."""
    return len(support(after)) == 1 == len(support(before)) and torch.equal(after.reshape(-1), before.reshape(-1))


def _shuffled(call: Call, labels: Sequence[Tensor]) -> list[Tensor]:
    """Return the blocks that a shuffle makes of channels."""
    flat = [each.reshape(-1) for each in labels if support(each) and len(support(each)) == 1]
    if call.name == "pixel_shuffle":
        return [each.view(-1, call.args[1] ** 2) for each in flat if len(each) % call.args[1] ** 2 == 0]
    return [each.view(call.args[1], -1) for each in flat if len(each) % call.args[1] == 0]


def _on_labels(call: Call, labels: Tensor) -> list[Tensor]:
    """Run an operation on labels; where it takes no integers, on float64, which holds them exactly."""
    try:
        out = call.function(labels, *call.args[1:], **call.kwargs)
    except (RuntimeError, NotImplementedError):
        out = call.function(labels.double(), *call.args[1:], **call.kwargs)
    return [each.long() for each in tree_leaves(out) if isinstance(each, Tensor)]


@rule("cat", "concat", "concatenate", "stack", "hstack", "vstack", "dstack")
def _concatenate(tracer: Tracer, call: Call) -> None:
    pieces: Sequence[Tensor] = call.args[0]
    y = call.outputs[0]
    dim = call.argument(1, "dim", 0) % y.dim() if call.name not in ("hstack", "vstack", "dstack") else None
    if dim is None:
        dim = _stacking_dim(call.name, y.dim())
    if call.name == "stack":
        operands = [_unsqueezed(tracer.operand(each, each.dim()), dim) for each in pieces]
    else:
        operands = [tracer.operand(each, y.dim()) for each in pieces if each.numel() > 0]
    if call.name != "stack":
        _tie_along(tracer, operands, dim)
    along = any(dim in support(each) for o in operands for each in o.labels)
    # Side by side in one block: along every other dimension they shrink alike.
    others = [
        Operand([each for each in o.labels if dim not in support(each)], _without(o.shape, dim)) for o in operands
    ]
    results = tracer.combine(others, f"{tracer.place()} puts it beside something that cannot shrink alike")
    if any(tracer.is_parameter(each) for each in pieces):  # parts that no noise makes zero
        tracer.written.extend(results)
    tracer.written.extend(labels for each in pieces if tracer.is_parameter(each) for labels in tracer.of(each))
    if along and call.name != "stack":
        results.append(_joined_along(tracer, operands, dim, y))
    tracer.set(y, results)


def _tie_along(tracer: Tracer, operands: Sequence[Operand], dim: int) -> None:
    """Where labels vary along the dimension of a concatenation and others, which other pieces have alone, tie them."""
    across = {d for o in operands for each in o.labels if dim not in support(each) for d in support(each)}
    for o in operands:
        tied = [
            tracer.labels.tie(each, {dim}, "") if dim in support(each) and support(each) & across else each
            for each in o.labels
        ]
        o.labels = [each for each in tied if each is not None]


def _stacking_dim(name: str, dims: int) -> int:
    return {"hstack": 0 if dims == 1 else 1, "vstack": 0, "dstack": 2}[name]


def _joined_along(tracer: Tracer, operands: Sequence[Operand], dim: int, y: Tensor) -> Tensor:
    """Return the labels along the dimension of a concatenation, piece by piece; fixed where a piece has none."""
    parts = []
    for o in operands:
        found = [each for each in o.labels if dim in support(each)]
        size = o.shape[dim]
        one = [1] * y.dim()
        one[dim] = size
        parts.append(found[0] if found else torch.full(one, FIXED))
    shape = [max(each.shape[d] for each in parts) for d in range(y.dim())]
    return torch.cat(
        [each.expand([each.shape[d] if d == dim else n for d, n in enumerate(shape)]) for each in parts], dim
    )


def _without(shape: Sequence[int], dim: int) -> list[int]:
    return [1 if d == dim else size for d, size in enumerate(shape)]


def _unsqueezed(operand: Operand, dim: int) -> Operand:
    shape = [*operand.shape[:dim], 1, *operand.shape[dim:]]
    return Operand([each.unsqueeze(dim) for each in operand.labels], shape)


@rule("constant_pad_nd", "pad", "reflection_pad1d", "reflection_pad2d", "replication_pad1d", "replication_pad2d",
       "reflection_pad3d", "replication_pad3d")  # fmt: skip
def _pad(tracer: Tracer, call: Call) -> None:
    x, y, padding = call.args[0], call.outputs[0], list(call.args[1])
    mode = call.argument(2, "mode", "constant") if call.name == "pad" else call.name
    value = call.argument(3, "value") if call.name == "pad" else call.argument(2, "value", 0)
    constant = mode in ("constant", "constant_pad_nd")
    padded = {x.dim() - 1 - i for i in range(len(padding) // 2) if any(padding[2 * i : 2 * i + 2])}
    results: list[Tensor | None] = []
    for labels in tracer.of(x):
        if constant and value:
            tracer.written.append(labels)
        if not support(labels) & padded:
            results.append(labels)
        elif constant:
            extents = [n if d in padded else labels.shape[d] for d, n in enumerate(x.shape)]
            results.append(torch.nn.functional.pad(labels.expand(extents), padding, value=FIXED))
        else:
            results.append(tracer.mix(labels, padded, "padding"))
    tracer.set(y, results)


@rule("embedding")
def _embedding(tracer: Tracer, call: Call) -> None:
    weight, y = call.args[0], call.outputs[0]
    out = []
    for labels in tracer.of(weight):
        if 0 in support(labels):
            tracer.labels.freeze(labels, f"{tracer.place()} looks rows up by it")
        else:
            out.append(labels.reshape([1] * (y.dim() - 1) + [-1]))
    tracer.written.extend(out)
    tracer.set(y, out)
