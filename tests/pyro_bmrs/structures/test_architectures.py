"""Architectures as their authors would write them: what is found can be attached to, masked and removed exactly."""

import copy

import pytest
import torch
from architectures import ARCHITECTURES, make

import pyro_bmrs as bmrs
from pyro_bmrs.structures.equality import difference
from pyro_bmrs.structures.inputs import call, random_like

# What has nothing to remove: every channel is averaged over, returned, rewritten, or read by a weight that is computed.
NOTHING = {
    "shufflenet_v1", "convnext_v2", "hf_convnext_v2", "spectral_norm", "tied_layers", "temporal", "gated_recurrence",
    "gmlp",
}  # fmt: skip


def masks_of(model, generator, emptied=None):
    masks = {site: torch.rand(size, generator=generator) < 0.6 for site, size in model.sizes.items()}
    if emptied is not None:
        masks[list(masks)[emptied % len(masks)]][:] = False
    return masks


@pytest.mark.parametrize("name", ARCHITECTURES)
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
    guide = bmrs.TruncatedLogNormalGuide(model).double()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        guide.loc.uniform_(-2, 0, generator=generator)
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
