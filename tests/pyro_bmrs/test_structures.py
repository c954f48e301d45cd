import pytest
import torch
from nets import build
from torch import nn

import pyro_bmrs as bmrs


def axes(parts):
    return {(axis.module, axis.side) for axis in parts.axes}


def test_lenet():
    model, _, x = build("lenet5")
    found = bmrs.find_structures(model.net, x)
    assert axes(found["conv1_noise.theta"]) == {("conv1", "out"), ("conv2", "in")}
    assert axes(found["conv2_noise.theta"]) == {("conv2", "out"), ("fc1", "in")}
    assert found["conv2_noise.theta"].producer == "conv2"
    index = next(found["conv2_noise.theta"].side("in")).index
    assert torch.equal(index, torch.arange(16).repeat_interleave(25))  # flattening keeps a filter's positions together


def test_noise_folds_where_scaling_passes_through():
    found = {}
    for name in ("mlp", "noise_before_tanh", "noise_between_tanhs", "batch_norm"):
        model, _, x = build(name)
        found[name] = list(bmrs.find_structures(model.net, x).values())
    assert (found["mlp"][0].producer, found["mlp"][0].consumers) == (None, ("fc2",))
    assert (found["noise_before_tanh"][0].producer, found["noise_before_tanh"][0].consumers) == ("0", None)
    assert (found["noise_between_tanhs"][0].producer, found["noise_between_tanhs"][0].consumers) == (None, None)
    assert found["batch_norm"][0].producer == "1"


def test_a_layer_that_feeds_two_others_cannot_take_the_noise_of_one():
    class TwoHeads(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.noise = nn.Linear(3, 4), bmrs.MultiplicativeNoise(4)
            self.a, self.b = nn.Linear(4, 2), nn.Linear(4, 2)

        def forward(self, x):
            h = self.stem(x)
            return self.a(self.noise(h)) + self.b(h)

    found = bmrs.find_structures(TwoHeads(), torch.randn(2, 3))["noise.theta"]
    assert found.producer is None
    assert found.consumers == ("a",)


def test_noise_on_the_output_is_refused():
    net = nn.Sequential(nn.Linear(3, 4), bmrs.MultiplicativeNoise(4))
    with pytest.raises(ValueError, match=r"nothing consumes the structures of '1.theta'"):
        bmrs.find_structures(net, torch.randn(2, 3))


def test_the_network_is_left_alone():
    model, _, x = build("batch_norm")
    before = {name: tensor.clone() for name, tensor in model.net.state_dict().items()}
    bmrs.find_structures(model.net, x)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.net.state_dict().items())
    assert model.net[2].site == "2.theta"
