"""Sums of products: matrices, convolutions, attention."""

from collections.abc import Sequence

import torch
from torch import Tensor

from pyro_bmrs.structures.labels import FIXED, support
from pyro_bmrs.structures.rules.registry import rule
from pyro_bmrs.structures.tracer import Call, Operand, Tracer, Work


@rule("linear")
def _linear(tracer: Tracer, call: Call) -> None:
    x, weight, bias = call.args[0], call.args[1], call.argument(2, "bias")
    _product(tracer, x, weight, bias, call.outputs[0], weight_is_transposed=True)


@rule("mm", "bmm", "matmul", "__matmul__", "mv", "dot")
def _matmul(tracer: Tracer, call: Call) -> None:
    _product(tracer, call.args[0], call.args[1], None, call.outputs[0])


@rule("addmm", "baddbmm")
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
    summed = {k, *({m} if a.dim() == 1 else ()), *({n} if b.dim() == 1 else ())}
    shape = [d for d in range(batch + 3) if d not in summed]
    found = [each.permute([*shape, *summed]).reshape([each.shape[d] for d in shape]) for each in results]
    if bias is not None:
        aligned = Operand(found, list(y.shape))
        found = tracer.combine([aligned, tracer.operand(bias, y.dim())], f"{tracer.place()} adds to it what is fixed")
        tracer.written.extend(found)
    tracer.set(y, found)


@rule("convolution", "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
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


@rule("scaled_dot_product_attention", "_scaled_dot_product_flash_attention_for_cpu",
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


@rule("einsum")
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
