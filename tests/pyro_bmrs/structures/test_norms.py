"""Channels that a norm averages over can go one by one, exactly, where that is asked for."""

import copy
import math

import pytest
import torch
from architectures import ARCHITECTURES, make
from torch import nn

import pyro_bmrs as bmrs
from pyro_bmrs.structures.equality import difference
from pyro_bmrs.structures.inputs import call, random_like
from pyro_bmrs.structures.layers import CountedLayerNorm

NAMES = ("convnext", "residual_mlp", "glu", "separate_attention", "hf_vit", "hf_swin", "hf_bert", "hf_gpt2", "hf_llama")


def masked(net, structures, x):
    """Return model, guide and masks that remove two fifths of everything."""
    model = bmrs.NoisyNetwork(bmrs.attach_noise(net, structures))
    generator = torch.Generator().manual_seed(1)
    guide = bmrs.TruncatedLogNormalGuide(model).double()
    with torch.no_grad():
        guide.loc.uniform_(-2, 0, generator=generator)
    masks = {site: torch.rand(size, generator=generator) < 0.6 for site, size in model.sizes.items()}
    return model, guide, masks, random_like(x, generator)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in NAMES if name in ARCHITECTURES])
def test_width_is_removed_exactly_and_loaded_onto_a_whole_network(name, tmp_path):
    net, x = make(name, dtype=torch.float64)
    assert not [each for each in bmrs.find_structures(net, x).values() if each.kind == "width" and each.norms]
    structures = bmrs.find_structures(net, x, width=True)
    widths = [each for each in structures.values() if each.kind == "width" and each.norms]
    assert widths
    model, guide, masks, new = masked(net, structures, x)
    small = bmrs.compact(model, guide, masks, x)
    tolerance = 1e-6 if structures.record.low_precision else 1e-12
    with torch.no_grad():
        assert difference(call(small, new), bmrs.predict(model, guide, new, masks)) < tolerance
    assert bmrs.count_parameters(small) == bmrs.count_parameters(net, structures, masks)
    bmrs.save(small, tmp_path / "small")
    again = bmrs.load(tmp_path / "small", make(name, dtype=torch.float64)[0])
    with torch.no_grad():
        assert difference(call(again, new), call(small, new)) < 1e-12


@pytest.mark.parametrize("bias", [True, False])
def test_a_counted_layer_norm_is_one_whose_other_channels_are_zero(bias):
    torch.manual_seed(0)
    norm = nn.LayerNorm(7, eps=1e-3, bias=bias).double()
    nn.init.normal_(norm.weight)
    kept = torch.tensor([0, 2, 3, 6])
    x, scale = torch.randn(5, 4, dtype=torch.float64), torch.rand(4, dtype=torch.float64)
    whole = torch.zeros(5, 7, dtype=torch.float64).index_copy(1, kept, x * scale)
    parts = (nn.Parameter(each[kept]) if each is not None else None for each in (norm.weight, norm.bias))
    counted = CountedLayerNorm(*parts, scale, 7, 1e-3)
    torch.testing.assert_close(counted(x), norm(whole)[:, kept], rtol=1e-12, atol=1e-12)


class Block(nn.Module):
    """An embedding that is widened, normalised and added to; ``norm`` is the class of the norms."""

    def __init__(self, norm, width=12):
        super().__init__()
        self.embed, self.norm = nn.Linear(5, width), norm(width)
        self.inner, self.outer = nn.Linear(width, 9), nn.Linear(9, width)
        self.last, self.head = norm(width), nn.Linear(width, 3)

    def forward(self, x):
        h = self.embed(x)
        return self.head(self.last(h + self.outer(self.inner(self.norm(h)).relu())))


class OwnRMSNorm(nn.Module):
    """Written by hand, its epsilon called otherwise; ``shift`` is added to its weight."""

    shift = 0.0

    def __init__(self, width):
        super().__init__()
        self.weight, self.variance_epsilon = nn.Parameter(torch.ones(width)), 1e-3

    def forward(self, x):
        return (self.shift + self.weight) * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)


class ShiftedRMSNorm(OwnRMSNorm):
    shift = 1.0


@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.RMSNorm, OwnRMSNorm])
def test_one_theta_stands_at_norms_and_at_readers(norm):
    """Whatever it is at a structure, zero there is the network without the structure."""
    torch.manual_seed(0)
    net, x = Block(norm).double(), torch.randn(6, 5, dtype=torch.float64)
    structures = bmrs.find_structures(net, x, width=True).select(names="embed")
    assert {each.module for each in structures["embed"].readers} == {"norm", "inner", "last", "head"}
    model, guide, masks, _ = masked(net, structures, x)
    small = bmrs.compact(model, guide, masks, x)
    left = int(masks["embed.theta"].sum())
    assert (small.embed.out_features, small.head.in_features) == (left, left)
    with torch.no_grad():
        before = bmrs.predict(model, guide, x, masks)
        assert difference(small(x), before) < 1e-12
        guide.loc[~masks["embed.theta"]] = -19.9  # as good as zero, instead of masked
        guide.log_scale[~masks["embed.theta"]] = -8.0
        assert difference(bmrs.predict(model, guide, x), before) < 1e-6


def test_a_norm_that_is_none_of_these_is_refused():
    net, x = Block(ShiftedRMSNorm), torch.randn(6, 5)
    structures = bmrs.find_structures(net, x, width=True)
    assert list(structures) == ["inner"]
    assert "a mean in 'norm' runs over it" in structures.refused["embed"]


@pytest.mark.slow
def test_width_is_masked_while_training_and_cut_in_the_end():
    torch.manual_seed(0)
    net = Block(nn.LayerNorm)
    x = torch.randn(300, 5)
    y = (x[:, 0] > 0).long()
    model = bmrs.NoisyNetwork(bmrs.attach_noise(net, bmrs.find_structures(net, x[:2], width=True)), kl_weight=4.0)
    guide = bmrs.TruncatedLogNormalGuide(model)
    few = {"epochs": 40, "batch_size": 50, "lr": 5e-3, "seed": 0, "progress": False}
    criterion = bmrs.BMRS_N(prior_log_odds=math.log(3))
    result = bmrs.fit(model, guide, (x, y), criterion=criterion, pruning=bmrs.Continuous(shrink=True), **few)
    assert model.net.net.embed.out_features == 12
    small = bmrs.compact(model, guide, None, x[:2])
    assert small.embed.out_features == int(result.masks["embed.theta"].sum()) < 12
    again = bmrs.find_structures(small, x[:2], width=True)  # and what is left can lose more
    assert "embed" in again
    assert difference(bmrs.predict(model, guide, x), small(x)) < 1e-5


def test_noise_in_front_of_a_batch_norm_is_refused():
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 3))
    x = torch.randn(4, 3, 6, 6)
    assert bmrs.find_structures(net, x, outputs=["1"])["1"].kind == "output"
    structures = bmrs.find_structures(net, x, outputs=["0"])
    assert [name for name, each in structures.items() if each.kind == "output"] == []
    assert structures.refused["0"] == "'1', a BatchNorm2d behind it, divides the noise out again in training"


def test_rows_are_counted_as_a_masked_network_is():
    """Only what makes a masked channel, a layer's row and its norm, where nothing is really removed."""
    net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
    x = torch.randn(5, 4)
    structures = bmrs.find_structures(net, x, outputs=["1"]).select(kinds="output")
    masks = {"1.theta": torch.arange(8) < 5}
    total = 5 * 8 + 2 * 8 + 9 * 3
    assert bmrs.count_parameters(net, structures, masks, rows_only=True) == total - 3 * (5 + 2)
    assert bmrs.count_parameters(net, structures, masks) == total - 3 * (5 + 2 + 3)
    assert bmrs.count_parameters(copy.deepcopy(net)) == total


class Shared(nn.Module):
    """Two norms of one weight, or one norm that is used twice."""

    def __init__(self, norm, tied):
        super().__init__()
        self.embed, self.first, self.second = nn.Linear(5, 12), norm(12), norm(12)
        self.inner, self.outer, self.head = nn.Linear(12, 9), nn.Linear(9, 12), nn.Linear(12, 3)
        if tied:
            self.second.weight = self.first.weight
        else:
            self.second = self.first

    def forward(self, x):
        h = self.embed(x)
        return self.head(self.second(h + self.outer(self.inner(self.first(h)).relu())))


@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.RMSNorm])
@pytest.mark.parametrize("tied", [False, True])
def test_norms_that_share_are_exact_or_refused(norm, tied):
    torch.manual_seed(0)
    net, x = Shared(norm, tied).double(), torch.randn(6, 5, dtype=torch.float64)
    structures = bmrs.find_structures(net, x, width=True)
    assert ("embed" in structures) == (not (tied and norm is nn.RMSNorm))  # whose weight would be scaled twice
    model, guide, masks, _ = masked(net, structures, x)
    with torch.no_grad():
        assert difference(bmrs.compact(model, guide, masks, x)(x), bmrs.predict(model, guide, x, masks)) < 1e-12


def test_width_is_not_recommended_where_it_was_asked_for():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    net = nn.Sequential(nn.Linear(4, 8), nn.TransformerEncoder(layer, 1, enable_nested_tensor=False), nn.Linear(8, 3))
    x = torch.randn(2, 5, 4)
    plain, wide = (bmrs.find_structures(net, x, width=width) for width in (False, True))
    reasons = [" ".join(each.refused.values()) for each in (plain, wide)]
    assert "see width=True" in reasons[0]
    assert "see width=True" not in reasons[1]
    assert "not inside nn.TransformerEncoderLayer" in reasons[1]
    with pytest.raises(ValueError, match=r"no kind '0', only channel, head, width, output; for names write names="):
        plain.select("0")
