import subprocess
import sys

import pyro
import pytest
import torch
from nets import NETWORKS, build, random_masks
from torch import nn

import pyro_bmrs as bmrs


def with_site(model, masks, site, mask):
    return {**masks, site: mask(model.sizes[site])}


def none(size):
    return torch.zeros(size, dtype=torch.bool)


def only_the_third(size):
    return torch.arange(size) == 2


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("seed", [0, 1])
def test_logits_equal_the_masked_network(name, seed):
    model, guide, x = build(name, seed)
    masks = random_masks(model, seed)
    small = bmrs.compact(model, guide, masks, x[:3])
    torch.testing.assert_close(small(x), bmrs.predict(model, guide, x, masks), rtol=0, atol=1e-5)
    assert bmrs.count_parameters(small) < bmrs.count_parameters(model.net)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mlp", "lenet5", "noise_before_sigmoid", "noise_between_tanhs"])
@pytest.mark.parametrize("mask", [none, only_the_third])
def test_any_layer_may_keep_one_structure_or_none(name, mask):
    model, guide, x = build(name)
    for site in model.sizes:
        masks = with_site(model, random_masks(model), site, mask)
        small = bmrs.compact(model, guide, masks, x[:3])
        torch.testing.assert_close(small(x), bmrs.predict(model, guide, x, masks), rtol=0, atol=1e-5)


@pytest.mark.parametrize("mask", [none, only_the_third])
def test_all_layers_may_keep_one_structure_or_none(mask):
    model, guide, x = build("lenet5")
    masks = {site: mask(size) for site, size in model.sizes.items()}
    small = bmrs.compact(model, guide, masks, x[:3])
    torch.testing.assert_close(small(x), bmrs.predict(model, guide, x, masks), rtol=0, atol=1e-5)
    if mask is none:
        torch.testing.assert_close(small(x)[0], small(x)[1])  # a constant passes on


def test_result_is_a_plain_module_of_the_masks_sizes():
    model, guide, x = build("lenet5")
    masks = {site: torch.arange(size) < size // 2 for site, size in model.sizes.items()}
    small = bmrs.compact(model, guide, masks, x)
    assert (small.conv1.out_channels, small.conv2.in_channels, small.conv2.out_channels) == (3, 3, 8)
    assert small.fc1.weight.shape == (60, 8 * 25)
    assert small.output.weight.shape == (10, 42)
    kinds = {type(module) for module in small.modules()}
    assert all(kind.__module__.startswith("torch.nn") for kind in kinds)
    assert not any(isinstance(module, pyro.nn.PyroModule) for module in small.modules())


def test_the_model_is_left_alone():
    model, guide, x = build("lenet5")
    before = bmrs.predict(model, guide, x)
    bmrs.compact(model, guide, random_masks(model), x)
    assert torch.equal(bmrs.predict(model, guide, x), before)


def test_the_result_can_be_trained_further():
    model, guide, x = build("mlp")
    small = bmrs.compact(model, guide, random_masks(model), x).train()
    optimizer = torch.optim.SGD(small.parameters(), 0.1)
    y = torch.arange(len(x)) % 4
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(small(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_a_constant_that_no_bias_can_hold_stays_where_it_is():
    net = nn.Sequential(  # the padding's zeros are not the constant sigmoid(0)
        nn.Conv2d(1, 4, 3), bmrs.MultiplicativeNoise(4), nn.Sigmoid(), nn.Conv2d(4, 2, 3, padding=1),
        nn.Flatten(), nn.LazyLinear(3),
    )  # fmt: skip
    x = torch.randn(3, 1, 6, 6)
    net(x)
    model = bmrs.NoisyNetwork(net)
    guide = bmrs.TruncatedLogNormalGuide(model)
    masks = {"1.theta": torch.tensor([True, False, True, True])}
    small = bmrs.compact(model, guide, masks, x)
    torch.testing.assert_close(small(x), bmrs.predict(model, guide, x, masks), rtol=0, atol=1e-5)
    assert (small[0].out_channels, small[3].in_channels) == (3, 4)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mlp", "lenet5", "noise_between_tanhs"])
def test_a_fresh_process_reloads_it(name, tmp_path):
    model, guide, x = build(name)
    masks = random_masks(model)
    bmrs.save(bmrs.compact(model, guide, masks, x), tmp_path / "pruned")
    torch.save(x, tmp_path / "x.pt")
    program = (
        "import torch, pyro_bmrs as bmrs; net = bmrs.load('pruned'); "
        "torch.save(net(torch.load('x.pt', weights_only=True)).detach(), 'y.pt')"
    )
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, check=True)
    found = torch.load(tmp_path / "y.pt", weights_only=True)
    torch.testing.assert_close(found, bmrs.predict(model, guide, x, masks), rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_in_float64_the_two_networks_agree_to_rounding(name):
    model, guide, x = build(name, dtype=torch.float64)
    masks = random_masks(model)
    small = bmrs.compact(model, guide, masks, x[:3])
    torch.testing.assert_close(small(x), bmrs.predict(model, guide, x, masks), rtol=1e-12, atol=1e-12)


class TwoHeads(nn.Module):
    """One head sees the noise and the other does not."""

    def __init__(self):
        super().__init__()
        self.stem, self.noise = nn.Linear(3, 4), bmrs.MultiplicativeNoise(4)
        self.noisy, self.plain = nn.Linear(4, 2), nn.Linear(4, 2)

    def forward(self, x):
        h = self.stem(x)
        return self.noisy(self.noise(h)) + self.plain(h)


def test_noise_is_folded_into_those_that_see_it_and_shared_structures_stay():
    model = bmrs.NoisyNetwork(TwoHeads())
    guide = bmrs.TruncatedLogNormalGuide(model, init_loc=-1.0)
    x = torch.randn(5, 3)
    torch.testing.assert_close(bmrs.compact(model, guide, None, x)(x), bmrs.predict(model, guide, x))
    masks = {"noise.theta": torch.tensor([True, False, True, True])}
    small = bmrs.compact(model, guide, masks, x)
    torch.testing.assert_close(small(x), bmrs.predict(model, guide, x, masks))
    assert (small.stem.out_features, small.noisy.in_features, small.plain.in_features) == (4, 3, 4)
