"""Operations on one element at a time: labels that meet in one share their fate."""

from collections.abc import Callable

from torch import Tensor

from pyro_bmrs.structures.labels import support
from pyro_bmrs.structures.rules.registry import rule
from pyro_bmrs.structures.tracer import Call, Operand, Tracer

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


@rule(*_KEEP_ZERO, *_SOMETIMES_KEEP_ZERO, *_OTHERS)
def elementwise(tracer: Tracer, call: Call) -> None:
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


@rule("prelu", "_prelu_kernel")
def _prelu(tracer: Tracer, call: Call) -> None:
    x, weight, y = call.args[0], call.args[1], call.outputs[0]
    shape = [1, weight.numel(), *[1] * (x.dim() - 2)] if weight.dim() == 1 and x.dim() > 1 else list(weight.shape)
    own = Operand([each.reshape(shape) for each in tracer.of(weight)], shape, parameter=True)
    reason = f"{tracer.place()} combines it with something that cannot shrink alike"
    tracer.set(y, tracer.combine([tracer.operand(x, x.dim()), own], reason))


@rule("glu")
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
