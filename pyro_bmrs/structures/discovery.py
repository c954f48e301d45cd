"""What can be removed from a network: read off the labels of one forward pass, and proved by trial."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from pyro_bmrs.checks import check_flag, check_list, check_module
from pyro_bmrs.structures.attention import HeadwiseAttention
from pyro_bmrs.structures.copying import copied, undisturbed
from pyro_bmrs.structures.inputs import Inputs, batch_size, call, call_example, output_tensors, to_network
from pyro_bmrs.structures.norms import averaging_norms, legible_norms
from pyro_bmrs.structures.points import Attachment, NoisePoint, noise_points, replace_everywhere
from pyro_bmrs.structures.reading import Reading
from pyro_bmrs.structures.removal import adopt_attention
from pyro_bmrs.structures.rules import RULES
from pyro_bmrs.structures.sampled_weights import fix_sampled_weights
from pyro_bmrs.structures.structure_set import StructureSet
from pyro_bmrs.structures.tracer import Tracer
from pyro_bmrs.structures.trial import Bench, proved

__all__ = ["find_structures", "propose"]

# Layers of torch.nn that can be made smaller; whatever else owns parameters there cannot.
_SHRINKABLE = {
    "Linear", "NonDynamicallyQuantizableLinear", "Conv1d", "Conv2d", "Conv3d", "ConvTranspose1d", "ConvTranspose2d",
    "ConvTranspose3d", "BatchNorm1d", "BatchNorm2d", "BatchNorm3d", "SyncBatchNorm", "LayerNorm", "RMSNorm",
    "GroupNorm", "InstanceNorm1d", "InstanceNorm2d", "InstanceNorm3d", "Embedding", "MultiheadAttention", "PReLU",
    "ParameterList", "ParameterDict",
}  # fmt: skip


def find_structures(
    net: nn.Module, example_inputs: Inputs, *, outputs: Sequence[str] = (), width: bool = False, trial: bool = True
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
        width: Whether to offer, of kind ``"width"``, channels that a layer norm or RMS norm averages over too, such as
            the embedding width of a transformer. Their noise stands in front of the norms as well. A layer norm that
            loses some becomes a ``CountedLayerNorm``, which goes on counting them; an RMS norm stays what it is, behind
            a ``ChannelScale``. While training they are masked, not cut. Norms inside ``nn.TransformerEncoderLayer``,
            which reads their weights itself, cannot lose any.
        trial: Whether to try removals. Without, what is offered has been read off a single forward pass.

    Returns:
        A mapping from the names of layers to ``Structure``. ``print`` it, and ``select`` from it.

    Raises:
        ValueError: If the network does not run on the example or has noise attached to it, ``outputs`` names no module,
            or a noise layer does not fit its input.

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
    structures = propose(net, example_inputs, outputs, width)
    if not trial:
        return structures
    return proved(structures, Bench.of(net, example_inputs, structures.record.low_precision))


def propose(net: nn.Module, example_inputs: Inputs, outputs: Sequence[str] = (), width: bool = False) -> StructureSet:
    """Return what could be removed as far as one forward pass shows, without proof.

    Args:
        net: Any module; it is copied, not changed. Its noise layers become the sites of the record.
        example_inputs: See ``find_structures``.
        outputs: See ``find_structures``.
        width: See ``find_structures``.
    """
    check_flag("width", width)
    _check_modules(net)
    if not all(isinstance(name, str) for name in check_list("outputs", outputs, "names of modules")):
        raise TypeError(f"outputs must be a sequence of names of modules, but got {outputs!r}")
    net = copied(net).eval()
    with undisturbed(net):
        fix_sampled_weights(net)
    example_inputs = to_network(example_inputs, net)
    adopt_attention(net)
    if width:
        net = legible_norms(net)
    points = noise_points(net)
    modules = {module: name for name, module in net.named_modules()}
    _check_names(outputs, modules.values())
    stand_ins = {site: _StandIn(site, point.dim) for site, point in points.items()}
    for site, point in points.items():
        net = replace_everywhere(net, point, stand_ins[site])
    tracer = Tracer(net, RULES, averaging_norms(net) if width else None)
    for each in stand_ins.values():
        each.tracer = tracer
    with undisturbed(net), torch.inference_mode():
        _hook(tracer, net, outputs)
        with tracer:
            result = call_example(net, example_inputs)
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
    return Reading(tracer, net, points, outputs, batches).structures()


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
    check_module("net", net)
    for name, module in net.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise ValueError(f"{name or 'the network'!r} is a ScriptModule; give the module that it was made from")
        if isinstance(module, Attachment):
            raise ValueError(
                "the network has noise attached already, whose structures it has as its attribute structures: detach() "
                "that before you look for others"
            )
    for name, parameter in net.named_parameters():
        if isinstance(parameter, nn.parameter.UninitializedParameter):
            raise ValueError(f"parameter {name!r} has no shape yet: run the network on an example once")
        if not (parameter.is_meta or parameter.itemsize == 1 or bool(torch.isfinite(parameter).all())):
            raise ValueError(f"parameter {name!r} is not finite everywhere: a removal could not be tried on it")


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
