"""What the noise of a site inside a network can be multiplied into, so that nothing of it is left behind.

Noise is a positive factor for each channel. It passes through operations that are positively homogeneous, channel by
channel, down to the layers that read the products, or up to the one layer that makes what it multiplies.
"""

from collections import Counter, defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from pyro_bmrs.structures.tracer import Call

__all__ = ["FoldTracker", "Maker"]

_HOMOGENEOUS = {
    "relu", "relu_", "leaky_relu", "leaky_relu_", "max_pool1d", "max_pool2d", "max_pool3d", "avg_pool1d", "avg_pool2d",
    "avg_pool3d", "adaptive_avg_pool1d", "adaptive_avg_pool2d", "_adaptive_avg_pool2d", "adaptive_avg_pool3d",
    "adaptive_max_pool1d", "adaptive_max_pool2d", "max_pool2d_with_indices", "mean", "sum", "view", "_unsafe_view",
    "reshape", "flatten", "permute", "transpose", "squeeze", "unsqueeze", "clone", "alias", "contiguous", "dropout",
    "feature_dropout", "upsample_nearest2d", "upsample_bilinear2d", "detach", "unflatten", "movedim", "t",
}  # fmt: skip
_CONTRACTIONS = {"linear", "addmm", "conv1d", "conv2d", "conv3d", "convolution"}
_BATCH_NORMS = {"batch_norm", "instance_norm"}


@dataclass
class Maker:
    """The layer whose output a noise site multiplies: factors go into its weight and bias.

    Attributes:
        weight: Name of its weight, whose first dimension (the second of a Conv1D) the channels are.
        dim: That dimension.
        bias: Name of its bias, if it has one.
        chain: The tensors between it and the noise.
    """

    weight: str
    dim: int
    bias: str | None
    chain: tuple[int, ...]


class FoldTracker:
    """Follows what is scaled by noise, and what has been made by a layer that could take the noise.

    Attributes:
        parameters: Names of parameters and buffers by the tensors' ids.
        normed: For sites whose noise reaches a batch norm as a factor of a whole channel, the name of that module.
    """

    def __init__(self) -> None:
        self.normed: dict[str, str] = {}
        self.parameters: dict[int, str] = {}
        self._scaled: dict[int, str] = {}
        self._made: dict[int, Maker] = {}
        self._readers: dict[str, Counter[tuple[str, int]]] = defaultdict(Counter)
        self._lost: set[str] = set()
        self._makers: dict[str, Maker | None] = {}
        self._uses: Counter[str] = Counter()
        self._consumed: Counter[int] = Counter()

    def uses(self, name: str) -> int:
        """Return how many operations take a parameter."""
        return self._uses[name]

    def readers(self, site: str) -> list[tuple[str, int]]:
        """Return the parameters into which the site's noise can be multiplied, each with its dimension, or none."""
        found = self._readers[site]
        whole = site not in self._lost and all(self._uses[name] == count for (name, _), count in found.items())
        return list(found) if whole else []

    def maker(self, site: str) -> Maker | None:
        """Return the layer into which the site's noise can be multiplied instead."""
        maker = self._makers.get(site)
        if maker is None or any(self._consumed[each] != 1 for each in maker.chain):
            return None
        used_once = all(self._uses[name] == 1 for name in (maker.weight, maker.bias) if name is not None)
        return maker if used_once else None

    def boundary(self, site: str, x: Tensor, y: Tensor) -> None:
        """Note that a site multiplies ``x`` to ``y``."""
        self._consume([x])
        self._makers[site] = None if site in self._makers else self._made.get(id(x))
        self._scaled[id(y)] = site

    def leave(self, outputs: list[Tensor]) -> None:
        """Note what the network returns."""
        self._consume(outputs)

    def observe(self, call: "Call", here: str) -> None:
        """Follow one operation, which the module called ``here`` runs."""
        if call.name in _BATCH_NORMS and id(call.args[0]) in self._scaled:
            self.normed.setdefault(self._scaled[id(call.args[0])], here)
        for tensor in call.inputs:
            if id(tensor) in self.parameters:
                self._uses[self.parameters[id(tensor)]] += 1
        data = [each for each in call.inputs if id(each) not in self.parameters]
        if call.name in _HOMOGENEOUS and len(data) == 1 and len(call.inputs) == 1:
            self._pass_on(data[0], call.outputs[:1])
        elif (call.name in _CONTRACTIONS and not self._read(call)) or call.name not in _CONTRACTIONS:
            self._consume(data)
        self._make(call)

    def _pass_on(self, x: Tensor, outputs: list[Tensor]) -> None:
        for y in outputs:
            if id(x) in self._scaled:
                self._scaled[id(y)] = self._scaled[id(x)]
            if id(x) in self._made:
                self._consumed[id(x)] += id(y) != id(x)
                made = self._made[id(x)]
                self._made[id(y)] = Maker(made.weight, made.dim, made.bias, (*made.chain, id(y)))

    def _consume(self, tensors: list[Tensor]) -> None:
        for each in tensors:
            self._consumed[id(each)] += 1
            if id(each) in self._scaled:
                self._lost.add(self._scaled[id(each)])

    def _read(self, call: "Call") -> bool:
        """Note a parameter that reads scaled channels, and return whether that is all that reads them here."""
        x, weight, dim = _operands(call)
        others = [each for each in call.inputs if each is not x and id(each) not in self.parameters]
        if x is None or weight is None or others or id(weight) not in self.parameters:
            return False
        self._consumed[id(x)] += 1
        if id(x) in self._scaled:
            self._readers[self._scaled[id(x)]][self.parameters[id(weight)], dim] += 1
        return True

    def _make(self, call: "Call") -> None:
        if call.name in _BATCH_NORMS:
            weight, bias, dim = call.args[1], call.args[2], 0
        elif call.name in _CONTRACTIONS:
            _, weight, read = _operands(call)
            bias, dim = (call.args[0], 1) if call.name == "addmm" else (call.argument(2, "bias"), 1 - read)
        else:
            return
        names = self.parameters
        grouped = call.name.startswith("conv") and weight is not None and weight.dim() > 2 and _groups(call) != 1
        if id(weight) in names and not grouped and (bias is None or id(bias) in names) and not _transposed(call):
            made = call.outputs[0]
            self._made[id(made)] = Maker(names[id(weight)], dim, names.get(id(bias)), (id(made),))


def _operands(call: "Call") -> tuple[Tensor | None, Tensor | None, int]:
    """Return what a contraction reads, its weight and the weight's dimension that reads."""
    if call.name == "addmm":
        return call.args[1], call.args[2], 0
    grouped = call.name.startswith("conv") and _groups(call) != 1
    if grouped or _transposed(call):
        return None, None, 1
    return call.args[0], call.args[1], 1


def _groups(call: "Call") -> int:
    return int(call.argument(8 if call.name == "convolution" else 6, "groups", 1))


def _transposed(call: "Call") -> bool:
    return call.name == "convolution" and bool(call.args[6])
