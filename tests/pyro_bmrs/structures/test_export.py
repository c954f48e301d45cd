"""A pruned network is a plain one: torch.export and ONNX take it, at any batch size. All of them: tests/exports.py."""

import pytest
import torch
from architectures import ARCHITECTURES
from exports import exported, in_onnxruntime, small_network
from torch import nn

import pyro_bmrs as bmrs
from pyro_bmrs.structures.equality import difference
from pyro_bmrs.structures.inputs import call

NAMES = ("vgg_bn", "unet", "encoder_layer", "hf_resnet_bottleneck", "hf_vit", "hf_llama")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the exporters
@pytest.mark.parametrize("name", [name for name in NAMES if name in ARCHITECTURES])
def test_a_pruned_network_is_exported_with_any_batch_size(name):
    small, few, more = small_network(name, width=name.startswith("hf"))
    program = exported(small, few)
    with torch.no_grad():
        assert difference(call(program.module(), more), call(small, more)) < 1e-6


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [name for name in ("unet", "hf_vit") if name in ARCHITECTURES])
def test_it_runs_in_onnxruntime(name, tmp_path):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    small, few, more = small_network(name, width=True)
    assert in_onnxruntime(small, few, more, tmp_path / "small.onnx") < 1e-5


class Small(nn.Module):
    """A user's own class for what is left of a network: sizes come from outside."""

    def __init__(self, hidden, last):
        super().__init__()
        self.first, self.second, self.head = nn.Linear(6, hidden), nn.Linear(hidden, last), nn.Linear(last, 2)

    def forward(self, x):
        return self.head(self.second(self.first(x).relu()).relu())


def test_a_state_dict_goes_into_a_smaller_class_of_the_users_own():
    torch.manual_seed(0)
    net, x = Small(16, 12), torch.randn(5, 6)
    model = bmrs.NoisyNetwork(bmrs.attach_noise(net, bmrs.find_structures(net, x)))
    masks = {"first.theta": torch.arange(16) < 7, "second.theta": torch.arange(12) % 3 == 0}
    small = bmrs.compact(model, bmrs.TruncatedLogNormalGuide(model), masks, x)
    again = Small(7, 4)
    again.load_state_dict(small.state_dict())
    assert torch.equal(again(x), small(x))
