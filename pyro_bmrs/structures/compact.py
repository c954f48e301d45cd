"""From masks to a smaller plain nn.Module, exactly."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from pyro_bmrs.structures.any_guide import noise_posterior
from pyro_bmrs.structures.copying import copied, undisturbed
from pyro_bmrs.structures.discovery import find_structures
from pyro_bmrs.structures.inputs import Inputs
from pyro_bmrs.structures.masks import check_masks
from pyro_bmrs.structures.points import Attachment, noise_points, replace_everywhere
from pyro_bmrs.structures.record import Record
from pyro_bmrs.structures.removal import cut, fixed_copy, release_attention
from pyro_bmrs.structures.sampled_weights import fix_sampled_weights, sampled_sites
from pyro_bmrs.structures.structure_set import StructureSet, check_structures
from pyro_bmrs.structures.trial import Bench

if TYPE_CHECKING:
    from pyro_bmrs.model.network import NoisyNetwork

__all__ = ["compact", "plain_copy", "structures_of", "without_noise"]


def compact(
    model: "NoisyNetwork",
    guide: Any,
    masks: Mapping[str, Tensor] | None,
    example_input: Inputs,
    structures: StructureSet | None = None,
) -> nn.Module:
    r"""Return the network without the structures that the masks remove: a smaller, plain nn.Module.

    Its outputs are those of ``predict(model, guide, x, masks)``, with every :math:`\theta` at its posterior mean. Noise
    attached from outside is multiplied into the weights of the layers that read the structures, and a network of the
    user's own class comes back. Noise layers inside a network become ``nn.Identity``, their noise multiplied into
    weights on either side where what stands between allows it, or else a ``ChannelScale``; a ``ChannelGather`` or
    ``ChannelScatter`` stays where only one side of a noise layer can shrink. A site that keeps none leaves one
    structure, with zero noise: layers cannot be empty.

    Args:
        model: The model; neither it nor its network is changed.
        guide: Its guide, of any kind; one that is a program is run on ``example_input``, see ``noise_posterior``.
        masks: For each site a bool tensor of shape ``(size,)``, True = keep, in the numbering of the original network;
            None, and sites left out, keep what has not been removed so far.
        example_input: Inputs of any batch size: a tensor, a tuple or a mapping. Only their shapes and types matter.
        structures: What ``find_structures`` has said of the network, if it is known already.

    Returns:
        The network in eval mode, on the model's device.

    Raises:
        TypeError: If ``model``, ``guide`` or ``masks`` is something else.
        ValueError: If the guide is another model's, or a mask does not fit.
        NotImplementedError: If the network draws another latent site in its forward pass.
        RuntimeError: If the smaller network's outputs differ from the masked one's, in float64 on random inputs.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), bmrs.MultiplicativeNoise(8), nn.Linear(8, 3))
        >>> model = bmrs.NoisyNetwork(net)
        >>> guide = bmrs.TruncatedLogNormalGuide(model)
        >>> masks = {"2.theta": torch.arange(8) < 5}
        >>> x = torch.randn(5, 4)
        >>> small = bmrs.compact(model, guide, masks, x)
        >>> small[0].out_features
        5
        >>> torch.allclose(small(x), bmrs.predict(model, guide, x, masks), atol=1e-6)
        True
    """
    guide = noise_posterior(model, guide, example_input)
    if structures is not None:
        check_structures(model.net, structures)
    masks = check_masks(masks, model.noise, model.sizes)
    structures = structures_of(model.net, example_input) if structures is None else structures
    record = structures.record
    points = {site: point.detach() for site, point in guide.points().items()}
    values = {site: points.pop(site) * masks[site] for site in masks}
    net = plain_copy(model.net)
    _fix_latents(net, points)
    with undisturbed(net):
        smaller = cut(fixed_copy(net, record, values), record, masks, values)
        _check(net, record, masks, values, example_input)
        release_attention(smaller)
    return smaller


def structures_of(net: nn.Module, example_input: Inputs, trial: bool = True) -> StructureSet:
    """Return the structures of a network with noise: those it was attached to, or around its noise layers."""
    if not isinstance(net, Attachment):
        return find_structures(net, example_input, trial=trial)
    net.check_attached()
    return net.structures


def plain_copy(net: nn.Module) -> nn.Module:
    """Return a copy of a network, without noise that is attached from outside."""
    if not isinstance(net, Attachment):
        return copied(net)
    copy = copied(net)
    return copy.detach_hooks(copy.net)


def _fix_latents(net: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Make weights that have a prior parameters of these values, in place, and refuse any other latent site.

    Raises:
        NotImplementedError: If there is one.
    """
    for site in values:
        if site not in sampled_sites(net):
            raise NotImplementedError(
                f"site {site!r} is drawn in the network's forward pass, which would go on drawing it from its prior: "
                "make it an attribute of its PyroModule, PyroSample(prior), which can be fixed"
            )
    fix_sampled_weights(net, values)


def _check(
    net: nn.Module, record: Record, masks: Mapping[str, Tensor], values: Mapping[str, Tensor], example_input: Inputs
) -> None:
    """Raise unless removal leaves the outputs as they are, in float64, on random inputs like the example."""
    bench = Bench.of(net, example_input, record.low_precision, trials=2, randomise=False)
    fixed = fixed_copy(bench.net, record, values)
    expected = [bench.expected(fixed, trial) for trial in range(2)]
    smaller = cut(copied(fixed), record, masks, values)
    for trial in range(2):
        off = bench.error(bench.run(smaller, trial), expected[trial], fixed, trial)
        if off is not None:
            raise RuntimeError(
                f"the smaller network differs from the masked one by {off:.2g} of its outputs' spread: its structures "
                "were misread; please report the architecture"
            )


def without_noise(net: nn.Module) -> nn.Module:
    """Return a copy of a network that has no noise, neither inside nor attached."""
    without = plain_copy(net)
    for point in noise_points(without).values():
        without = replace_everywhere(without, point, nn.Identity())
    return without
