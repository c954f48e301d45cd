"""What each operation does to labels. An operation without a rule freezes whatever it touches."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from pyro_bmrs.structures.blocks import Block, Cuts
from pyro_bmrs.structures.labels import FIXED, squeeze, support
from pyro_bmrs.structures.tracer import Call, Operand, Tracer, Work

__all__ = ["RULES"]

Rule = Callable[[Tracer, Call], None]

RULES: dict[str, Rule] = {}


def _rule(*names: str) -> Callable[[Rule], Rule]:
    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, function))
        return function

    return register


# --- Operations that move elements ------------------------------------------------------------------------------------


@_rule("clone", "alias", "detach", "lift_fresh", "contiguous", "to", "_to_copy", "type_as", "float", "double", "half",
       "zeros_like", "ones_like", "empty_like", "full_like", "rand_like", "randn_like", "type")  # fmt: skip
def _same(tracer: Tracer, call: Call) -> None:
    x = call.args[0]
    for y in call.outputs:
        tracer.set(y, tracer.of(x) if y.shape == x.shape else [])
    if call.name in ("ones_like", "full_like", "rand_like", "randn_like", "empty_like"):
        tracer.written.extend(tracer.of(x))
    if call.name not in ("zeros_like", "ones_like", "empty_like", "full_like", "rand_like", "randn_like"):
        tracer.moved(x, call.outputs)


@_rule("view", "_unsafe_view", "reshape", "view_as", "reshape_as", "flatten", "unflatten", "ravel", "_reshape_alias",
       "squeeze", "unsqueeze")  # fmt: skip
def _reshape(tracer: Tracer, call: Call) -> None:
    x, y = call.args[0], call.outputs[0]
    tracer.set(y, [each.expand(x.shape).reshape(y.shape) for each in tracer.of(x)])
    tracer.moved(x, [y])
    reason = f"{tracer.place()} reshapes it in a way that its removal would break"
    tracer.checks.extend(Block(each, reason) for each in tracer.of(y) if len(support(each)) > 1)


@_rule("permute", "transpose", "t", "expand", "expand_as", "flip", "repeat", "repeat_interleave", "tile", "movedim",
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


@_rule("slice", "select", "narrow", "split", "split_with_sizes", "chunk", "unbind", "unsafe_split", "unsafe_chunk",
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


@_rule("index", "index_select", "gather", "take_along_dim", "roll", "unfold", "pixel_shuffle", "channel_shuffle",
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


@_rule("cat", "concat", "concatenate", "stack", "hstack", "vstack", "dstack")
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


@_rule("constant_pad_nd", "pad", "reflection_pad1d", "reflection_pad2d", "replication_pad1d", "replication_pad2d",
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


# --- Elementwise operations -------------------------------------------------------------------------------------------

_KEEP_ZERO = {
    "relu", "relu6", "gelu", "silu", "tanh", "hardswish", "leaky_relu", "elu", "selu", "celu", "mish", "neg", "abs",
    "sin", "sqrt", "square", "erf", "expm1", "log1p", "dropout", "native_dropout", "feature_dropout", "mul", "multiply",
    "softsign", "sign", "rrelu", "sinh", "asinh", "atan", "nan_to_num",
}  # fmt: skip
_SOMETIMES_KEEP_ZERO = (
    "hardtanh", "clamp", "div", "divide", "true_divide", "pow", "add", "sub", "subtract", "maximum", "minimum", "where",
    "threshold",
)  # fmt: skip
_OTHERS = {
    "sigmoid", "hardsigmoid", "softplus", "exp", "log", "rsqrt", "cos", "rsub", "masked_fill", "alpha_dropout",
    "special_erf", "log_sigmoid", "log_sigmoid_forward", "reciprocal", "logical_not", "eq", "ne", "gt", "lt", "ge",
    "le", "isnan", "isfinite", "bitwise_and", "bitwise_not", "logical_and", "logical_or", "addcmul", "addcdiv", "lerp",
    "clamp_min", "clamp_max", "copy", "bernoulli", "round", "floor", "ceil", "remainder", "fmod", "cosh", "tan",
    "log2", "log10", "exp2", "atan2", "logit", "softshrink", "hardshrink", "isinf", "bitwise_or", "bitwise_xor",
    "floor_divide", "acos", "asin", "trunc", "frac", "sigmoid_focal", "xlogy", "heaviside", "logaddexp",
}  # fmt: skip


@_rule(*_KEEP_ZERO, *_SOMETIMES_KEEP_ZERO, *_OTHERS)
def _elementwise(tracer: Tracer, call: Call) -> None:
    y = call.outputs[0]
    operands = [tracer.operand(each, y.dim()) for each in call.inputs if each.dim() <= y.dim()]
    results = tracer.combine(operands, f"{tracer.place()} combines it with something that cannot shrink alike")
    if not _keeps_zero(tracer, call, y.dim()):
        tracer.written.extend(results)
    if (
        call.name.rstrip("_") == "add"
        and sum(bool(tracer.of(t)) and not tracer.is_parameter(t) for t in call.inputs) > 1
    ):
        tracer.sums.extend(results)
    for each in call.outputs:
        if each.shape == y.shape:
            tracer.set(each, results)


def _keeps_zero(tracer: Tracer, call: Call, dims: int) -> bool:
    """Return whether channels that are zero in every operand that has them are zero in the result."""
    name = call.name.rstrip("_") if not call.name.startswith("_") else call.name
    if name in _MAY_KEEP_ZERO:
        return _MAY_KEEP_ZERO[name](tracer, call, dims)
    return name in _KEEP_ZERO


def _zero_within_bounds(tracer: Tracer, call: Call, dims: int) -> bool:
    low, high = call.argument(1, "min_val", -1), call.argument(2, "max_val", 1)
    return not isinstance(low, Tensor) and not isinstance(high, Tensor) and (low or 0) <= 0 <= (high or 0)


def _divided_by_fixed(tracer: Tracer, call: Call, dims: int) -> bool:
    other = call.args[1]
    return not isinstance(other, Tensor) or (not tracer.of(other) and not tracer.is_parameter(other))


def _zero_in_all_terms(tracer: Tracer, call: Call, dims: int) -> bool:
    """Return whether all terms have the same channels: what one of them lacks, it adds as a constant."""
    terms = call.args[1:] if call.name == "where" else call.args[:2]
    if len(terms) < 2 or not all(isinstance(each, Tensor) and not tracer.is_parameter(each) for each in terms):
        return False
    supports = [{support(each) for each in tracer.operand(term, dims).labels} for term in terms]
    return supports[0] == supports[1]


def _positive_power(tracer: Tracer, call: Call, dims: int) -> bool:
    return isinstance(call.args[1], int | float) and call.args[1] > 0


def _keeps_below_threshold(tracer: Tracer, call: Call, dims: int) -> bool:
    return bool(call.args[1] >= 0 and call.args[2] == 0)


_MAY_KEEP_ZERO: dict[str, Callable[[Tracer, Call, int], bool]] = {
    **dict.fromkeys(("hardtanh", "clamp"), _zero_within_bounds),
    **dict.fromkeys(("div", "divide", "true_divide"), _divided_by_fixed),
    **dict.fromkeys(("add", "sub", "subtract", "maximum", "minimum", "where"), _zero_in_all_terms),
    "pow": _positive_power,
    "threshold": _keeps_below_threshold,
}


@_rule("prelu", "_prelu_kernel")
def _prelu(tracer: Tracer, call: Call) -> None:
    x, weight, y = call.args[0], call.args[1], call.outputs[0]
    shape = [1, weight.numel(), *[1] * (x.dim() - 2)] if weight.dim() == 1 and x.dim() > 1 else list(weight.shape)
    own = Operand([each.reshape(shape) for each in tracer.of(weight)], shape, parameter=True)
    reason = f"{tracer.place()} combines it with something that cannot shrink alike"
    tracer.set(y, tracer.combine([tracer.operand(x, x.dim()), own], reason))


# --- Sums of products -------------------------------------------------------------------------------------------------


@_rule("linear")
def _linear(tracer: Tracer, call: Call) -> None:
    x, weight, bias = call.args[0], call.args[1], call.argument(2, "bias")
    _product(tracer, x, weight, bias, call.outputs[0], weight_is_transposed=True)


@_rule("mm", "bmm", "matmul", "__matmul__", "mv", "dot")
def _matmul(tracer: Tracer, call: Call) -> None:
    _product(tracer, call.args[0], call.args[1], None, call.outputs[0])


@_rule("addmm", "baddbmm")
def _add_product(tracer: Tracer, call: Call) -> None:
    _product(tracer, call.args[1], call.args[2], call.args[0], call.outputs[0])


def _product(
    tracer: Tracer, a: Tensor, b: Tensor, bias: Tensor | None, y: Tensor, weight_is_transposed: bool = False
) -> None:
    """Label ``y = a @ b + bias`` in the index space (batch..., m, k, n)."""
    batch = max(a.dim(), b.dim(), 2) - 2
    m, k, n = batch, batch + 1, batch + 2

    def place(tensor: Tensor, own: Sequence[int]) -> Operand:
        """Spread a tensor's dimensions to ``own``."""
        labels = []
        for each in tracer.of(tensor):
            shape = [1] * (batch + 3)
            for d, position in enumerate(own):
                shape[position] = each.shape[d]
            order = sorted(range(len(own)), key=lambda i: own[i])
            labels.append(each.permute(order).reshape(shape))
        shape = [1] * (batch + 3)
        for d, position in enumerate(own):
            shape[position] = tensor.shape[d]
        return Operand(labels, shape, tracer.is_parameter(tensor))

    def lead(tensor: Tensor) -> list[int]:
        return list(range(batch - (tensor.dim() - 2), batch))

    left = place(a, [*lead(a), m, k] if a.dim() > 1 else [k])
    last = [k] if b.dim() == 1 else [n, k] if weight_is_transposed else [k, n]
    right = place(b, [*lead(b), *last] if b.dim() > 1 else last)
    results = tracer.contract(left, right, k, y.numel() * a.shape[-1])
    if right.parameter or left.parameter:
        tracer.written.extend(each for each in results if n in support(each) or left.parameter)
    else:
        tracer.heads.extend((each, tracer.here) for each in results if support(each) & set(range(batch)))
    gone = {k, *({m} if a.dim() == 1 else ()), *({n} if b.dim() == 1 else ())}
    shape = [d for d in range(batch + 3) if d not in gone]
    found = [each.permute([*shape, *gone]).reshape([each.shape[d] for d in shape]) for each in results]
    if bias is not None:
        aligned = Operand(found, list(y.shape))
        found = tracer.combine([aligned, tracer.operand(bias, y.dim())], f"{tracer.place()} adds to it what is fixed")
        tracer.written.extend(found)
    tracer.set(y, found)


@_rule("convolution", "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
def _convolution(tracer: Tracer, call: Call) -> None:
    x, weight, bias, y = call.args[0], call.args[1], call.argument(2, "bias"), call.outputs[0]
    transposed = call.args[6] if call.name == "convolution" else "transpose" in call.name
    groups = call.argument(8 if call.name == "convolution" else 6, "groups", 1)
    kernel = set(range(2, weight.dim()))
    channel = x.dim() - weight.dim() + 1  # 1, or 0 where there is no batch
    spatial = set(range(channel + 1, x.dim()))
    inputs = [tracer.mix(each, spatial, "a convolution") for each in tracer.of(x)]
    weights = [tracer.mix(each, kernel, "a convolution's kernel") for each in tracer.of(weight)]
    made, read = _by_dim(weights, 1 if transposed else 0), _by_dim(weights, 0 if transposed else 1)
    outputs = (x if transposed else y).numel() * weight[0].numel()
    if groups > 1:
        out = _grouped(
            tracer, inputs, made, read, (channel, x.shape[channel], y.shape[channel], groups, outputs, transposed)
        )
    else:
        # The index space (..., in, out): what the input varies along besides channels stays.
        left = Operand(
            [each.unsqueeze(channel + 1) for each in inputs if each is not None], _with(x.shape, channel + 1)
        )
        right = Operand(
            [_placed(each, d, x.dim() + 1) for each, d in ((read, channel), (made, channel + 1)) if each is not None],
            [weight.shape[0 if transposed else 1] if d == channel else weight.shape[1 if transposed else 0]
             if d == channel + 1 else 1 for d in range(x.dim() + 1)],
            tracer.is_parameter(weight),
        )  # fmt: skip
        out = [each.select(channel, 0) for each in tracer.contract(left, right, channel, outputs)]
    tracer.written.extend(out)
    if bias is not None:
        aligned = [_placed(each, channel, y.dim()) for each in tracer.of(bias)]
        shape = [n if d == channel else 1 for d, n in enumerate(y.shape)]
        out = tracer.combine(
            [Operand(out, list(y.shape)), Operand(aligned, shape)], f"{tracer.place()} adds a fixed bias"
        )
        tracer.written.extend(out)
    tracer.set(y, out)


def _by_dim(labels: Sequence[Tensor | None], dim: int) -> Tensor | None:
    return next((each.reshape(-1) for each in labels if each is not None and support(each) == {dim}), None)


def _placed(labels: Tensor, dim: int, dims: int) -> Tensor:
    return labels.view([-1 if d == dim else 1 for d in range(dims)])


def _with(shape: Sequence[int], dim: int) -> list[int]:
    return [*shape[:dim], 1, *shape[dim:]]


def _grouped(
    tracer: Tracer,
    inputs: Sequence[Tensor | None],
    made: Tensor | None,
    read: Tensor | None,
    sizes: tuple[int, int, int, int, int, bool],
) -> list[Tensor]:
    """Label a grouped convolution: a group's inputs and outputs go together."""
    channel, in_channels, out_channels, groups, outputs, transposed = sizes
    reason = f"{tracer.place()} is a grouped convolution of it with something that cannot shrink alike"
    within = read if not transposed else made  # the weight's second dimension counts the channels within a group
    if within is not None:
        tracer.labels.freeze(within, f"{tracer.place()} is a grouped convolution, which can lose whole groups only")
    along = made if not transposed else read
    if along is None:
        along = torch.full((out_channels if not transposed else in_channels,), FIXED)
    blocks = along.view(groups, -1)
    entering = [each for each in inputs if each is not None and channel in support(each)]
    if not entering and in_channels > 1:
        tracer.labels.freeze(blocks, reason)
    tracer.labels.join(blocks[:, :1], blocks, reason)
    for each in entering:
        tracer.labels.join(blocks[:, :1], each.movedim(channel, 0).reshape(groups, -1), reason)
    tracer.work.append(Work(outputs / groups * 2, [blocks[:, 0]]))
    group = blocks[:, :1].expand(groups, out_channels // groups).reshape(-1)
    others = [each for each in inputs if each is not None and channel not in support(each)]
    return [_placed(group, channel, next(iter(entering)).dim() if entering else channel + 3), *others]


@_rule("scaled_dot_product_attention", "_scaled_dot_product_flash_attention_for_cpu",
       "_scaled_dot_product_flash_attention", "_scaled_dot_product_efficient_attention",
       "_scaled_dot_product_attention_math", "_scaled_dot_product_cudnn_attention")  # fmt: skip
def _attention(tracer: Tracer, call: Call) -> None:
    q, k, v = call.args[:3]
    mask, y = call.argument(3, "attn_mask"), call.outputs[0]
    batch = q.dim() - 2
    rows, columns, width = batch, batch + 1, batch + 2
    repeats = q.shape[-3] // k.shape[-3] if q.dim() > 2 else 1

    def place(tensor: Tensor, at: int) -> Operand:
        shape = list(tensor.shape)
        labels = tracer.of(tensor)
        if repeats > 1 and tensor is not q:  # grouped queries
            labels = [each.repeat_interleave(repeats, -3) if each.shape[-3] > 1 else each for each in labels]
            shape[-3] *= repeats
        full = [*shape[:-2], 1, 1, 1]
        full[at], full[width] = shape[-2], shape[-1]
        return Operand([_spread(each, at, width) for each in labels], full)

    size = q.numel() * k.shape[-2]
    weights = tracer.contract(place(q, rows), place(k, columns), width, size)
    softmax = [tracer.mix(each, {columns}, "attention") for each in weights]
    scores = Operand([each for each in softmax if each is not None], [*q.shape[:-1], k.shape[-2], 1])
    if isinstance(mask, Tensor) and tracer.of(mask):
        added = [
            each.reshape([1] * (q.dim() - each.dim()) + list(each.shape)).unsqueeze(-1) for each in tracer.of(mask)
        ]
        shape = [1] * (q.dim() - mask.dim()) + list(mask.shape) + [1]
        scores.labels = tracer.combine([scores, Operand(added, shape)], f"{tracer.place()} adds to it what is fixed")
    results = tracer.contract(scores, place(v, columns), columns, q.shape[:-1].numel() * v.shape[-2] * v.shape[-1])
    found = [each.select(columns, 0) for each in results]
    tracer.written.extend(found)
    tracer.heads.extend((each, tracer.here) for each in found if batch and batch - 1 in support(each))
    tracer.set(y, found)


def _spread(labels: Tensor, at: int, width: int) -> Tensor:
    """Move the last two dimensions to ``at`` and ``width``, with extent 1 in between."""
    shape = [*labels.shape[:-2], 1, 1, 1]
    shape[at], shape[width] = labels.shape[-2], labels.shape[-1]
    return labels.reshape(shape)


@_rule("einsum")
def _einsum(tracer: Tracer, call: Call) -> None:
    equation, tensors = call.args[0].replace(" ", ""), call.args[1]
    if "..." in equation or len(tensors) != 2 or "->" not in equation:
        tracer.refuse(call, f"{tracer.place()} applies einsum({equation!r}) to it")
        return
    terms, result = equation.split("->")
    names = terms.split(",")
    letters = sorted(set(names[0] + names[1]))
    summed = [each for each in letters if each not in result]
    if len(summed) != 1 or any(len(set(each)) != len(each) for each in (*names, result)):
        tracer.refuse(call, f"{tracer.place()} applies einsum({equation!r}) to it")
        return

    def place(tensor: Tensor, own: str) -> Operand:
        order = sorted(range(len(own)), key=lambda i: own[i])
        shapes = [dict(zip(own, each.shape, strict=True)) for each in (tensor, *tracer.of(tensor))]
        full = [[shape.get(letter, 1) for letter in letters] for shape in shapes]
        labels = [each.permute(order).reshape(s) for each, s in zip(tracer.of(tensor), full[1:], strict=True)]
        return Operand(labels, full[0], tracer.is_parameter(tensor))

    y, over = call.outputs[0], letters.index(summed[0])
    sizes = dict(zip(names[0], tensors[0].shape, strict=True))
    a, b = place(tensors[0], names[0]), place(tensors[1], names[1])
    size = sizes.get(summed[0]) or tensors[1].shape[names[1].index(summed[0])]
    results = tracer.contract(a, b, over, y.numel() * size)
    if a.parameter or b.parameter:
        tracer.written.extend(results)
    else:
        tracer.heads.extend((each, tracer.here) for each in results if len(support(each)) == 1)
    order = [letters.index(each) for each in result]
    tracer.set(y, [each.permute([*order, over]).squeeze(-1) for each in results])


@_rule("_weight_norm", "_weight_norm_interface")
def _weight_norm(tracer: Tracer, call: Call) -> None:
    """Label a weight that is made of directions and lengths: whole directions can go."""
    v, g, y = call.args[0], call.args[1], call.outputs[0]
    dim = call.argument(2, "dim", 0) % v.dim()
    others = set(range(v.dim())) - {dim}
    kept = [
        each for each in (tracer.mix(each, others, "weight normalisation") for each in tracer.of(v)) if each is not None
    ]
    operands = [Operand(kept, _only(v.shape, dim)), Operand(tracer.of(g), list(g.shape))]
    tracer.set(y, tracer.combine(operands, f"{tracer.place()} normalises its weight"))


def _only(shape: Sequence[int], dim: int) -> list[int]:
    return [size if d == dim else 1 for d, size in enumerate(shape)]


@_rule("glu")
def _glu(tracer: Tracer, call: Call) -> None:
    x, y = call.args[0], call.outputs[0]
    dim = call.argument(1, "dim", -1) % x.dim()
    halves: list[list[Tensor]] = [[], []]
    for labels in tracer.of(x):
        parts = labels.chunk(2, dim) if dim in support(labels) else (labels, labels)
        for half, part in zip(halves, parts, strict=True):
            half.append(part)
    operands = [Operand(half, list(y.shape)) for half in halves]
    tracer.set(y, tracer.combine(operands, f"{tracer.place()} gates it with something that cannot shrink alike"))


@_rule("embedding")
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


# --- Statistics -------------------------------------------------------------------------------------------------------


@_rule("batch_norm", "native_batch_norm", "_native_batch_norm_legit_no_training", "_batch_norm_impl_index",
       "cudnn_batch_norm", "instance_norm")  # fmt: skip
def _channelwise_norm(tracer: Tracer, call: Call) -> None:
    x, y = call.args[0], call.outputs[0]
    operands = [tracer.operand(x, x.dim())]
    if call.name == "instance_norm":
        spatial = set(range(2, x.dim()))
        operands[0].labels = [
            each
            for labels in operands[0].labels
            if (each := tracer.mix(labels, spatial, "a normalisation")) is not None
        ]
    for tensor in call.args[1:5]:
        if isinstance(tensor, Tensor):
            shape = [1, -1, *[1] * (x.dim() - 2)]
            labels = [each.view(shape) for each in tracer.of(tensor)]
            operands.append(Operand(labels, [1, tensor.numel(), *[1] * (x.dim() - 2)]))
    out = tracer.combine(operands, f"{tracer.place()} normalises it with something that cannot shrink alike")
    if len(operands) == 1:
        tracer.counted.extend((each, tracer.here) for each in out if support(each) == {1})
    tracer.written.extend(out)
    tracer.set(y, out)


@_rule("native_layer_norm", "layer_norm", "_fused_rms_norm", "rms_norm")
def _layer_norm(tracer: Tracer, call: Call) -> None:
    x, y, shape = call.args[0], call.outputs[0], call.args[1]
    over = set(range(x.dim() - len(shape), x.dim()))
    operands = [tracer.operand(each, x.dim()) for each in (x, *call.args[2:4]) if isinstance(each, Tensor)]
    out = []
    for labels in tracer.combine(operands, f"{tracer.place()} normalises it with something that cannot shrink alike"):
        if support(labels) <= over:
            tracer.norms.append((labels, tracer.here))
        out.append(tracer.mix(labels, over, "a mean"))
        if out[-1] is None:
            out[-1] = labels
    found = [each for each in out if each is not None]
    tracer.written.extend(found)
    tracer.set(y, found)


@_rule("native_group_norm", "group_norm")
def _group_norm(tracer: Tracer, call: Call) -> None:
    x, y = call.args[0], call.outputs[0]
    groups = call.args[6] if call.name == "native_group_norm" else call.args[1]
    affine = call.args[1:3] if call.name == "native_group_norm" else call.args[2:4]
    spatial = set(range(2, x.dim()))
    mixed = (tracer.mix(labels, spatial, "a normalisation") for labels in tracer.of(x))
    labels = [each for each in mixed if each is not None]
    operands = [Operand(labels, list(x.shape))]
    for tensor in affine:
        if isinstance(tensor, Tensor):
            own = [each.view(1, -1, *[1] * (x.dim() - 2)) for each in tracer.of(tensor)]
            operands.append(Operand(own, [1, tensor.numel(), *[1] * (x.dim() - 2)]))
    out: list[Tensor | None] = []
    for each in tracer.combine(operands, f"{tracer.place()} normalises it with something that cannot shrink alike"):
        if 1 not in support(each):
            out.append(each)
            continue
        blocks = each.movedim(1, 0).reshape(groups, -1)
        if groups == 1:
            out.append(tracer.mix(each, {1}, "a mean"))
            continue
        tracer.labels.join(blocks[:, :1], blocks, "")
        group = blocks[:, :1].expand(groups, x.shape[1] // groups).reshape(-1)
        out.append(group.view(1, -1, *[1] * (x.dim() - 2)))
    found = [each for each in out if each is not None]
    if len(operands) == 1:
        tracer.counted.extend((each, tracer.here) for each in found if support(each) == {1})
    tracer.written.extend(found)
    tracer.set(y, found)


@_rule("max_pool1d", "max_pool2d", "max_pool3d", "max_pool2d_with_indices", "max_pool3d_with_indices", "avg_pool1d",
       "avg_pool2d", "avg_pool3d", "adaptive_avg_pool1d", "adaptive_avg_pool2d", "_adaptive_avg_pool2d",
       "adaptive_avg_pool3d", "adaptive_max_pool1d", "adaptive_max_pool2d", "adaptive_max_pool3d",
       "max_pool1d_with_indices", "upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d", "upsample_linear1d",
       "upsample_bilinear2d", "upsample_bicubic2d", "upsample_trilinear3d", "_upsample_bilinear2d_aa",
       "_upsample_bicubic2d_aa", "_upsample_nearest_exact1d", "_upsample_nearest_exact2d", "lp_pool2d")  # fmt: skip
def _pool(tracer: Tracer, call: Call) -> None:
    x = call.args[0]
    count = next(n for n in (1, 2, 3) if f"{n}d" in call.name)
    spatial = set(range(x.dim() - count, x.dim()))
    out = [tracer.mix(each, spatial, "pooling") for each in tracer.of(x)]
    for y in call.outputs:
        tracer.set(y, out)


@_rule("mean", "sum", "amax", "amin", "max", "min", "var", "var_mean", "std", "std_mean", "logsumexp", "argmax",
       "argmin", "any", "all", "prod", "linalg_vector_norm", "norm", "median", "nansum", "count_nonzero")  # fmt: skip
def _reduce(tracer: Tracer, call: Call) -> None:
    x = call.args[0]
    if call.name in ("max", "min") and len(call.args) > 1 and isinstance(call.args[1], Tensor):
        _elementwise(tracer, call)
        return
    position = 2 if call.name in ("linalg_vector_norm", "norm") else 1
    dims = call.argument(position, "dim")
    over = (
        {d % x.dim() for d in ([dims] if isinstance(dims, int) else dims)}
        if dims not in (None, [])
        else set(range(x.dim()))
    )
    if call.name not in ("mean", "sum", "amax", "max"):
        tracer.written.extend(tracer.of(x))
    keep = call.outputs[0].dim() == x.dim()
    results = []
    for labels in tracer.of(x):
        found = tracer.mix_if_used(labels, over, f"a {call.name}", call.outputs)
        if found is not None:
            rest = [n for d, n in enumerate(found.shape) if keep or d not in over]
            results.append(found.reshape(rest))
    for y in call.outputs:
        tracer.set(y, results)


@_rule("softmax", "log_softmax", "special_softmax", "_softmax", "_log_softmax", "_safe_softmax", "cumsum", "sort",
       "topk", "cumprod", "argsort")  # fmt: skip
def _along_one(tracer: Tracer, call: Call) -> None:
    x = call.args[0]
    dim = call.argument(2 if call.name == "topk" else 1, "dim", -1)
    dim = (dim if isinstance(dim, int) else -1) % x.dim()
    out = [tracer.mix(each, {dim}, f"a {call.name.strip('_')}") for each in tracer.of(x)]
    tracer.written.extend(each for each in out if each is not None)
    for y in call.outputs:
        tracer.set(y, [each for each in out if each is not None])


@_rule("sym_size", "size", "numel", "is_same_size", "_local_scalar_dense_unused")
def _nothing(tracer: Tracer, call: Call) -> None:
    """Leave labels alone: the operation looks at nothing but shapes."""
