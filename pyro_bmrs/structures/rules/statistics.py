"""Sums, means and the like over positions, which then can only go together or not at all."""

from collections.abc import Sequence

from torch import Tensor

from pyro_bmrs.structures.labels import support
from pyro_bmrs.structures.rules.elementwise import elementwise
from pyro_bmrs.structures.rules.registry import rule
from pyro_bmrs.structures.tracer import Call, Operand, Tracer


@rule("batch_norm", "native_batch_norm", "_native_batch_norm_legit_no_training", "_batch_norm_impl_index",
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
    tracer.norms.extend((each, tracer.here) for each in out if 1 in support(each))
    if len(operands) == 1:
        tracer.counted.extend((each, tracer.here) for each in out if support(each) == {1})
    tracer.written.extend(out)
    tracer.set(y, out)


_NOT_AVERAGING = (
    " (width=True takes norms that have a weight for each channel and are not inside nn.TransformerEncoderLayer, which "
    "reads them itself)"
)


@rule("native_layer_norm", "layer_norm", "_fused_rms_norm", "rms_norm")
def _layer_norm(tracer: Tracer, call: Call) -> None:
    x, y, shape = call.args[0], call.outputs[0], call.args[1]
    over = set(range(x.dim() - len(shape), x.dim()))
    operands = [tracer.operand(each, x.dim()) for each in (x, *call.args[2:4]) if isinstance(each, Tensor)]
    out: list[Tensor | None] = []
    hint = " (but see width=True)" if tracer.averaging is None else _NOT_AVERAGING
    for labels in tracer.combine(operands, f"{tracer.place()} normalises it with something that cannot shrink alike"):
        if support(labels) <= over:
            tracer.norms.append((labels, tracer.here))
        if tracer.averaging is not None and tracer.here in tracer.averaging and support(labels) == over:
            tracer.average(labels, x, call.args[2])
            out.append(labels)
            continue
        reason = f"{tracer.place()} normalises over it, so that all others would change{hint}"
        out.append(tracer.labels.tie(labels, over, reason))
        if out[-1] is None:
            out[-1] = labels
    found = [each for each in out if each is not None]
    tracer.written.extend(found)
    tracer.set(y, found)


@rule("native_group_norm", "group_norm")
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
    tracer.norms.extend((each, tracer.here) for each in found if 1 in support(each))
    if len(operands) == 1:
        tracer.counted.extend((each, tracer.here) for each in found if support(each) == {1})
    tracer.written.extend(found)
    tracer.set(y, found)


@rule("max_pool1d", "max_pool2d", "max_pool3d", "max_pool2d_with_indices", "max_pool3d_with_indices", "avg_pool1d",
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


@rule("grid_sampler", "grid_sampler_2d", "grid_sampler_3d")
def _sample_grid(tracer: Tracer, call: Call) -> None:
    x, grid = call.args[:2]
    for labels in tracer.of(grid):
        tracer.labels.freeze(labels, f"{tracer.place()} samples positions by it")
    out = [tracer.mix(each, set(range(2, x.dim())), "sampling") for each in tracer.of(x)]
    tracer.set(call.outputs[0], out)


@rule("mean", "sum", "amax", "amin", "max", "min", "var", "var_mean", "std", "std_mean", "logsumexp", "argmax",
       "argmin", "any", "all", "prod", "linalg_vector_norm", "norm", "median", "nansum", "count_nonzero")  # fmt: skip
def _reduce(tracer: Tracer, call: Call) -> None:
    x = call.args[0]
    if call.name in ("max", "min") and len(call.args) > 1 and isinstance(call.args[1], Tensor):
        elementwise(tracer, call)
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


@rule("softmax", "log_softmax", "special_softmax", "_softmax", "_log_softmax", "_safe_softmax", "cumsum", "sort",
       "topk", "cumprod", "argsort")  # fmt: skip
def _along_one(tracer: Tracer, call: Call) -> None:
    x = call.args[0]
    dim = call.argument(2 if call.name == "topk" else 1, "dim", -1)
    dim = (dim if isinstance(dim, int) else -1) % x.dim()
    out = [tracer.mix(each, {dim}, f"a {call.name.strip('_')}") for each in tracer.of(x)]
    tracer.written.extend(each for each in out if each is not None)
    for y in call.outputs:
        tracer.set(y, [each for each in out if each is not None])


@rule("_weight_norm", "_weight_norm_interface")
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
