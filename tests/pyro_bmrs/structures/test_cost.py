import math

import pytest
import torch
from nets import NETWORKS, build, random_masks
from torch import nn

import pyro_bmrs as bmrs


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_masked_count_is_that_of_the_smaller_network(name):
    model, guide, x = build(name)
    masks = random_masks(model)
    masks[next(iter(masks))][:] = False
    small = bmrs.compact(model, guide, masks, x)
    structures = bmrs.find_structures(model.net, x)
    assert bmrs.count_parameters(model.net, structures, masks) == bmrs.count_parameters(small)


def test_parameters_of_a_known_network():
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), bmrs.MultiplicativeNoise(4), nn.Linear(4, 2))
    assert bmrs.count_parameters(net) == 3 * 4 + 4 + 4 * 2 + 2
    net[0].weight.requires_grad_(False)  # frozen ones are there too
    assert bmrs.count_parameters(net) == 3 * 4 + 4 + 4 * 2 + 2
    net.add_module("tied", nn.Linear(3, 4))
    net.tied.weight = net[0].weight
    assert bmrs.count_parameters(net) == 3 * 4 + 4 + 4 * 2 + 2 + 4


def test_flops_of_a_known_network():
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(2 * 4 * 4, 5))
    assert bmrs.count_flops(net, torch.zeros(1, 1, 6, 6)) == 2 * (2 * 9 * 16 + 32 * 5)


def test_latency_has_one_positive_time_a_network():
    nets = [nn.Linear(4, 4), nn.Linear(8, 8).requires_grad_(False)]
    seconds = bmrs.measure_latency(nets[:1], torch.zeros(2, 4), rounds=3)
    assert len(seconds) == 1
    assert seconds[0] > 0


@pytest.mark.parametrize("name", ["mlp", "lenet5", "batch_norm", "noise_on_inputs"])
def test_weights_of_the_kl_are_a_price_per_parameter(name):
    model, _, x = build(name)
    weights = bmrs.cost_kl_weights(model.net, x, mean=3.0)
    structures, total = bmrs.find_structures(model.net, x), bmrs.count_parameters(model.net)
    saved = {}  # by removing any single structure of a site
    for site in model.sizes:
        masks = {other: torch.ones(size, dtype=torch.bool) for other, size in model.sizes.items()}
        masks[site][-1] = False
        saved[site] = total - bmrs.count_parameters(model.net, structures, masks)
    prices = torch.tensor([weights[site] / saved[site] for site in model.sizes])
    torch.testing.assert_close(prices, prices[:1].expand_as(prices))
    mean = sum(weights[site] * size for site, size in model.sizes.items()) / sum(model.sizes.values())
    assert mean == pytest.approx(3.0)
    with pytest.raises(ValueError, match="'watts'"):
        bmrs.cost_kl_weights(model.net, x, 3.0, cost="watts")


@pytest.mark.parametrize("name", ["mlp", "lenet5", "batch_norm", "noise_on_inputs"])
def test_prices_are_those_of_the_network_that_masks_leave(name):
    model, _, x = build(name)
    masks = random_masks(model)
    structures = bmrs.find_structures(model.net, x)
    before = bmrs.count_parameters(model.net, structures, masks)
    saved = {}  # by removing one more, on average over those that are left
    for site, mask in masks.items():
        without = [{**masks, site: mask & (torch.arange(len(mask)) != i)} for i in mask.nonzero().flatten().tolist()]
        counts = [bmrs.count_parameters(model.net, structures, each) for each in without]
        saved[site] = before - sum(counts) / len(counts)
    weights = bmrs.cost_kl_weights(model.net, x, 3.0, masks=masks)
    prices = torch.tensor([weights[site] / saved[site] for site in masks])
    torch.testing.assert_close(prices, prices[:1].expand_as(prices))
    left = {site: int(mask.sum()) for site, mask in masks.items()}
    assert sum(weights[site] * count for site, count in left.items()) / sum(left.values()) == pytest.approx(3.0)


def test_masks_that_give_no_price_are_refused():
    model, _, x = build("mlp")
    masks = {site: torch.ones(size, dtype=torch.bool) for site, size in model.sizes.items()}
    site = next(iter(masks))
    everything = bmrs.cost_kl_weights(model.net, x, 3.0)
    assert bmrs.cost_kl_weights(model.net, x, 3.0, masks=masks) == pytest.approx(everything)
    with pytest.raises(ValueError, match=f"{site} keeps none"):
        bmrs.cost_kl_weights(model.net, x, 3.0, masks={**masks, site: torch.zeros_like(masks[site])})
    with pytest.raises(ValueError, match="one entry for each structure"):
        bmrs.cost_kl_weights(model.net, x, 3.0, masks={site: masks[site]})


@pytest.mark.parametrize("mean", [math.nan, math.inf, "parameters"])
def test_a_mean_that_is_no_number_is_refused(mean):
    model, _, x = build("mlp")
    with pytest.raises(ValueError, match="mean must be a finite number"):
        bmrs.cost_kl_weights(model.net, x, mean)
