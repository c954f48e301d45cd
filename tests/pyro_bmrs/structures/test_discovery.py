"""What is found in a network, by whose name, and what is refused."""

import torch
from nets import build

import pyro_bmrs as bmrs


def test_a_network_with_noise_inside_has_a_site_for_each_layer():
    model, _, x = build("lenet5")
    record = bmrs.find_structures(model.net, x).record
    site = record.sites["conv2_noise.theta"]
    assert torch.equal(record.slots["conv2.weight", 0], site.before)
    assert torch.equal(record.slots["fc1.weight", 1], site.after.repeat_interleave(25))


def test_noise_folds_where_scaling_passes_through():
    folds, makers = {}, {}
    for name in ("mlp", "noise_before_tanh", "noise_between_tanhs", "batch_norm"):
        model, _, x = build(name)
        site = next(iter(bmrs.find_structures(model.net, x).record.sites.values()))
        folds[name], makers[name] = site.folds, site.maker and site.maker.weight
    assert folds["mlp"] == (("fc2.weight", 1),)
    assert (folds["noise_before_tanh"], makers["noise_before_tanh"]) == ((), "0.weight")
    assert (folds["noise_between_tanhs"], makers["noise_between_tanhs"]) == ((), None)
    assert folds["batch_norm"] == (("5.weight", 1),)


def test_the_network_is_left_alone():
    model, _, x = build("batch_norm")
    before = {name: tensor.clone() for name, tensor in model.net.state_dict().items()}
    modes = [module.training for module in model.net.modules()]
    random_state = torch.get_rng_state()
    bmrs.find_structures(model.net, x)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.net.state_dict().items())
    assert modes == [module.training for module in model.net.modules()]
    assert torch.equal(random_state, torch.get_rng_state())
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in model.net.modules())
    assert model.net[2].site == "2.theta"
