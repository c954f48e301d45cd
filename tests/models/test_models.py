import pytest
import torch

import pyro_bmrs as bmrs
from models import lenet5, lenet5_caffe, mlp, resnet


@pytest.mark.parametrize("channels", [1, 3])
def test_lenet5_has_the_papers_widths(channels):
    net = lenet5(in_channels=channels)
    assert net(torch.zeros(2, channels, 32, 32)).shape == (2, 10)
    sizes = bmrs.NoisyNetwork(net).sizes
    assert list(sizes.values()) == [6 * channels, 16 * channels, 120 * channels, 84 * channels]


def test_lenet5_has_the_known_number_of_parameters():
    assert bmrs.count_parameters(lenet5()) == 61_706


def test_mlp_has_noise_after_each_activation():
    net = mlp(20, hidden=7, layers=3, classes=4)
    assert net(torch.zeros(2, 4, 5)).shape == (2, 4)
    assert bmrs.NoisyNetwork(net).sizes == {f"fc{i}_noise.theta": 7 for i in (1, 2, 3)}
    assert bmrs.count_parameters(net) == 20 * 7 + 7 + 2 * (7 * 7 + 7) + 7 * 4 + 4


def test_mlp_may_have_noise_on_its_inputs():
    net = mlp(20, hidden=7, layers=1, classes=4, input_noise=True)
    assert net(torch.zeros(2, 4, 5)).shape == (2, 4)
    assert bmrs.NoisyNetwork(net).sizes == {"input_noise.theta": 20, "fc1_noise.theta": 7}


def test_caffes_lenet5_can_lose_single_inputs_of_its_dense_layer():
    model = bmrs.NoisyNetwork(lenet5_caffe())
    assert bmrs.count_parameters(model.net) == 431_080
    assert list(model.sizes.values()) == [20, 50, 800, 500]
    generator = torch.Generator().manual_seed(0)
    masks = {site: torch.rand(size, generator=generator) < 0.3 for site, size in model.sizes.items()}
    small = bmrs.compact(model, bmrs.TruncatedLogNormalGuide(model), masks, torch.randn(2, 1, 28, 28))
    filters = masks["conv2_noise.theta"].repeat_interleave(16)
    assert small.fc1.in_features == int((filters & masks["flatten_noise.theta"]).sum())


def test_noise_is_the_identity_outside_a_model():
    net = lenet5().eval()
    x = torch.randn(2, 1, 32, 32)
    plain = torch.nn.Sequential(*(m for m in net if not isinstance(m, bmrs.MultiplicativeNoise)))
    assert torch.equal(net(x), plain(x))


@pytest.mark.parametrize("leading", [(), (5,)])
def test_lenet5_is_the_same_function_with_noise_on_either_side_of_the_pooling(leading):
    behind, before = lenet5(), lenet5(noise_before_pool=True)
    before.load_state_dict(behind.state_dict())
    models = [bmrs.NoisyNetwork(net) for net in (behind, before)]
    assert list(dict(before.named_children()))[:4] == ["conv1", "conv1_activation", "conv1_noise", "conv1_pool"]
    x = torch.randn(5, 1, 32, 32)
    noise = {site: torch.rand(*leading, size) for site, size in models[0].sizes.items()}
    found = [model.run(x, noise) for model in models]
    torch.testing.assert_close(*found)
    assert not torch.allclose(found[0], models[0].net(x))


def test_resnet_has_two_sites_in_each_of_25_blocks():
    sizes = bmrs.NoisyNetwork(resnet()).sizes
    assert list(sizes.values()) == 16 * [16] + 18 * [32] + 16 * [64]
    assert list(sizes)[:3] == ["stage1.0.noise1.theta", "stage1.0.noise2.theta", "stage1.1.noise1.theta"]


def test_resnet_takes_images_of_any_channels():
    assert resnet(depths=(1, 1, 1), width=4, in_channels=1, classes=7)(torch.zeros(2, 1, 28, 28)).shape == (2, 7)


def test_resnet_can_lose_all_that_noise_stands_on():
    """No site lies on the residual stream, so that what remains is the stem, the shortcuts and constants."""
    model = bmrs.NoisyNetwork(resnet(depths=(1, 1), width=4, classes=3))
    guide, x = bmrs.TruncatedLogNormalGuide(model), torch.randn(4, 3, 8, 8)
    for block in (model.net.stage1[0], model.net.stage2[0]):
        assert {block.noise1.size} == {block.conv1.out_channels, block.conv2.out_channels, block.conv3.in_channels}
    masks = {site: torch.arange(size) < 1 for site, size in model.sizes.items()}
    small = bmrs.compact(model, guide, masks, x)
    assert (small.stage1[0].conv2.weight.shape, small.stage2[0].conv2.weight.shape) == ((1, 1, 3, 3), (1, 1, 3, 3))
    assert (small.stage1[0].conv3.out_channels, small.stage2[0].conv3.out_channels) == (16, 32)


def test_resnet_fits():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, 3, 8, 8, generator=generator)
    y = (x.mean((1, 2, 3)) > 0).long()
    model = bmrs.NoisyNetwork(resnet(depths=(1, 1), width=4, classes=2))
    guide = bmrs.TruncatedLogNormalGuide(model)
    before = guide.loc.detach().clone()
    result = bmrs.fit(model, guide, (x, y), epochs=4, batch_size=20, seed=0, progress=False)
    assert result.history[-1]["loss"] < result.history[0]["loss"]
    assert not torch.equal(guide.loc, before)
