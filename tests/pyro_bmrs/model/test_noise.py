import copy

import pyro.distributions as dist
import pytest
import torch
from torch import nn

import pyro_bmrs as bmrs
from pyro_bmrs.model.supply import supply_noise


def test_outside_a_model_it_only_masks():
    layer = bmrs.MultiplicativeNoise(3)
    x = torch.randn(2, 3, 4)
    assert torch.equal(layer(x), x)
    layer.remove(torch.tensor([False, True, False]))
    assert torch.equal(layer(x), x * torch.tensor([1.0, 0.0, 1.0]).view(1, 3, 1))


@pytest.mark.parametrize(
    ("shape", "dim", "leading"),
    [((4, 3), 1, ()), ((4, 3), 1, (4,)), ((4, 3, 5, 6), 1, (4,)), ((4, 5, 3), -1, (4,)), ((4, 3, 5, 6), 1, (4, 5, 6))],
)
def test_noise_lines_up_with_its_dimension(shape, dim, leading):
    net = nn.Sequential(bmrs.MultiplicativeNoise(3, dim=dim), nn.Identity())
    model = bmrs.NoisyNetwork(net, likelihood=lambda out: dist.Normal(out, 1).to_event(out.dim() - 1))
    x, theta = torch.randn(shape), torch.rand(*leading, 3)
    with supply_noise(model.noise, {"0.theta": theta}):
        found = model.net(x)
    moved = x.movedim(dim, -1)
    if leading == (4,):
        theta = theta.view(4, *(1,) * (moved.dim() - 2), 3)
    torch.testing.assert_close(found, (moved * theta).movedim(-1, dim))


def test_removal_adds_up_and_survives_the_state_dict():
    layer, other = bmrs.MultiplicativeNoise(3), bmrs.MultiplicativeNoise(3)
    layer.remove(torch.tensor([True, False, False]))
    layer.remove(torch.tensor([False, True, False]))
    other.load_state_dict(layer.state_dict())
    assert other.keep.tolist() == [False, False, True]


def test_selecting_takes_mask_prior_and_site_along():
    prior = bmrs.LogUniform(torch.tensor([-3.0, -4.0, -5.0]), torch.tensor(0.0).expand(3))
    model = bmrs.NoisyNetwork(nn.Sequential(bmrs.MultiplicativeNoise(3, prior=prior), nn.Linear(3, 2)))
    layer = model.net[0]
    layer.remove(torch.tensor([False, True, False]))
    model(torch.randn(4, 3))
    layer.select(torch.tensor([1, 2]))
    assert model.masks["0.theta"].tolist() == [False, True]
    assert layer.prior.log_low.tolist() == [-4.0, -5.0]
    declared = layer.site_distribution(layer.prior)
    assert (declared.event_shape, layer.sample("0.theta").shape) == ((2,), (2,))
    assert torch.equal(layer(torch.ones(4, 2)), torch.tensor([0.0, 1.0]).expand(4, 2))


def test_a_prior_of_its_own_travels_with_the_layer():
    prior = bmrs.LogUniform(torch.tensor([-3.0, -4.0]), torch.tensor(0.0).expand(2))
    layer = bmrs.MultiplicativeNoise(2, prior=prior).double()
    assert layer.prior.log_low.tolist() == [-3.0, -4.0]
    assert layer.prior.log_low.dtype == torch.float64


@pytest.mark.parametrize("size", [0, -1, 2.5])
def test_size_must_be_a_positive_integer(size):
    with pytest.raises(ValueError, match="size must be a positive integer"):
        bmrs.MultiplicativeNoise(size)


def test_prior_must_fit():
    with pytest.raises(ValueError, match=r"batch_shape \(\) or \(3,\)"):
        bmrs.MultiplicativeNoise(3, prior=bmrs.LogUniform(torch.zeros(2) - 5, torch.zeros(2)))


def test_input_must_have_as_many_structures():
    with pytest.raises(ValueError, match="3 structures along dimension 1"):
        bmrs.MultiplicativeNoise(3)(torch.randn(2, 4))


def test_activations_keep_their_dtype():
    model = bmrs.NoisyNetwork(nn.Sequential(bmrs.MultiplicativeNoise(3), nn.Linear(3, 2)))
    layer = model.net[0]
    for removed in (0, 1):
        layer.remove(torch.arange(3) < removed)
        with supply_noise(model.noise, {"0.theta": torch.full((3,), 0.5)}):
            assert layer(torch.ones(2, 3, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_masks_put_in_from_outside_are_seen():
    layer = bmrs.MultiplicativeNoise(3)
    x, keep = torch.ones(2, 3), torch.tensor([True, False, True])
    assert torch.equal(layer(x), x)
    assert torch.equal(torch.func.functional_call(layer, {"keep": keep}, (x,)), x * keep)
    assert torch.equal(layer(x), x)
    layer.keep.copy_(keep)
    assert torch.equal(layer(x), x * keep)


def test_a_copy_made_after_a_removal_masks_too():
    net = nn.Sequential(nn.Linear(3, 4), bmrs.MultiplicativeNoise(4))
    net(torch.ones(1, 3))
    net[1].remove(torch.tensor([True, False, True, False]))
    again = copy.deepcopy(net)
    assert torch.equal(again(torch.ones(1, 3)) == 0, torch.tensor([[True, False, True, False]]))


def test_a_removed_structure_is_off_whatever_its_noise():
    net = nn.Sequential(bmrs.MultiplicativeNoise(3), nn.Identity())
    model = bmrs.NoisyNetwork(net, likelihood=lambda out: dist.Normal(out, 1).to_event(1))
    x, theta = torch.ones(4, 3), torch.tensor([0.5, 2.0, 3.0])
    net[0].remove(torch.tensor([False, True, False]))
    off = torch.tensor([0.5, 0.0, 3.0]).expand(4, 3)
    assert torch.equal(model.run(x, {"0.theta": theta}), off)
    assert torch.equal(model.run(x, {"0.theta": theta.expand(4, 3)}), off)
    with supply_noise(model.noise, {"0.theta": theta}):
        assert torch.equal(net(x), off)
    assert torch.equal(model.run(x, {"0.theta": theta}, masked=False), theta.expand(4, 3))
