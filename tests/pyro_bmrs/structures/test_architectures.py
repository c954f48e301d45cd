"""Architectures as their authors would write them: what is found can be attached to, masked and removed exactly."""

import copy

import pytest
import torch
from architectures import ARCHITECTURES, make
from marks import thinned
from torch import nn

import pyro_bmrs as bmrs
from pyro_bmrs.structures.equality import difference
from pyro_bmrs.structures.inputs import call, random_like

# What has nothing to remove: every channel is averaged over, returned, rewritten, or read by a weight that is computed.
NOTHING = {
    "shufflenet_v1", "convnext_v2", "hf_convnext_v2", "spectral_norm", "tied_layers", "temporal",
    "gmlp",
}  # fmt: skip


# What takes longest, and is built of layers that smaller ones have too.
LARGE = {
    "hf_mobilenet_v2", "efficientnet", "mobilenet_v3", "resnext", "resnet_bottleneck", "inception", "hf_segformer",
    "shufflenet_v2", "unet_bilinear", "googlenet", "regnet", "non_local", "hf_swin", "resnet_option_a", "wide_resnet",
    "densenet", "hf_resnet_bottleneck", "preact_resnet", "unet", "two_heads", "feature_pyramid", "convnext",
    "atrous_pyramid", "block_attention", "vision_transformer", "weight_norm", "resnet_basic", "language_model_tied",
}  # fmt: skip


def guide_of(model, generator):
    guide = bmrs.TruncatedLogNormalGuide(model).double()
    with torch.no_grad():
        guide.loc.uniform_(-2, 0, generator=generator)
    return guide


def masks_of(model, generator, emptied=None):
    masks = {site: torch.rand(size, generator=generator) < 0.6 for site, size in model.sizes.items()}
    if emptied is not None:
        masks[list(masks)[emptied % len(masks)]][:] = False
    return masks


@pytest.mark.slow
@pytest.mark.parametrize("name", thinned(ARCHITECTURES, keep=[each for each in ARCHITECTURES if each not in LARGE]))
def test_what_is_found_can_be_removed_exactly(name):
    net, x = make(name, dtype=torch.float64)
    keys, outputs = list(net.state_dict()), call(net, x)
    before = copy.deepcopy(net.state_dict())
    structures = bmrs.find_structures(net, x)
    assert bool(structures) == (name not in NOTHING), structures.refused
    if not structures:
        return
    noisy = bmrs.attach_noise(net, structures)
    assert list(net.state_dict()) == keys
    model = bmrs.NoisyNetwork(noisy)
    generator = torch.Generator().manual_seed(1)
    guide = guide_of(model, generator)
    new = random_like(x, generator)
    for emptied in (None, 0):
        masks = masks_of(model, generator, emptied)
        small = bmrs.compact(model, guide, masks, x)
        with torch.no_grad():
            off = difference(call(small, new), bmrs.predict(model, guide, new, masks))
        assert off <= (1e-6 if structures.record.low_precision else 1e-9)
        assert bmrs.count_parameters(noisy, structures, masks) == bmrs.count_parameters(small)
        assert bmrs.count_flops(noisy, x, structures, masks) == bmrs.count_flops(small, x)
    assert noisy.detach() is net
    assert difference(call(net, x), outputs) == 0
    assert all(torch.equal(tensor, before[key]) for key, tensor in net.state_dict().items())


def layers_to_mark(net):
    """Return the batch norms of a network, or where it has none its linear layers and convolutions."""
    norms = [name for name, module in net.named_modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    layers = [name for name, module in net.named_modules() if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d)]
    return norms or layers


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    thinned(
        [name for name in list(ARCHITECTURES)[::4] if name != "unused"],
        keep=[name for name in list(ARCHITECTURES)[::4] if name not in (*LARGE, "unused", "hf_t5")],
    ),
)
def test_noise_on_outputs_can_be_removed_exactly(name):
    net, x = make(name, dtype=torch.float64)
    structures = bmrs.find_structures(net, x, outputs=layers_to_mark(net))
    if not any(each.kind == "output" for each in structures.values()):
        return
    structures = structures.select(kinds="output")
    model = bmrs.NoisyNetwork(bmrs.attach_noise(net, structures))
    generator = torch.Generator().manual_seed(1)
    guide, new = guide_of(model, generator), random_like(x, generator)
    masks = masks_of(model, generator, 0)
    small = bmrs.compact(model, guide, masks, x)
    with torch.no_grad():
        off = difference(call(small, new), bmrs.predict(model, guide, new, masks))
    assert off <= (1e-6 if structures.record.low_precision else 1e-9)
    assert bmrs.count_parameters(net, structures, masks) == bmrs.count_parameters(small)
    assert bmrs.count_parameters(small) < bmrs.count_parameters(net)


class Sum(nn.Module):
    """Two layers add to one stream, which a third one reads."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = nn.Linear(3, 4), nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.a(x) + self.b(x).relu())


def test_a_channel_of_a_sum_goes_entirely_where_all_its_summands_have_lost_it():
    net, x = Sum().double(), torch.randn(5, 3, dtype=torch.float64)
    structures = bmrs.find_structures(net, x, outputs=["a", "b"])
    model = bmrs.NoisyNetwork(bmrs.attach_noise(net, structures))
    guide = bmrs.TruncatedLogNormalGuide(model, init_loc=-0.5).double()
    masks = {
        "a.theta": torch.tensor([True, False, False, True]),
        "b.theta": torch.tensor([True, True, False, False]),
    }
    small = bmrs.compact(model, guide, masks, x)
    assert difference(small(x), bmrs.predict(model, guide, x, masks)) <= 1e-12
    assert (small.a[0].out_features, small.b[0].out_features, small.head.in_features) == (2, 2, 3)
