"""What is found in a network, by whose name, and what is refused."""

import pytest
import torch
from architectures import ARCHITECTURES, make
from nets import build
from torch import nn

import pyro_bmrs as bmrs
from pyro_bmrs.structures import discovery


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


class Mixed(nn.Module):
    """Residual blocks, attention, and a part that nothing can be removed from."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(7, 8)
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.averaged, self.head = nn.Linear(8, 6), nn.Linear(1, 3)

    def forward(self, tokens, scale):
        h = self.embed(tokens) * scale
        h = h + self.down(self.up(h).relu())
        h = h + self.attention(h, h, h)[0]
        return {"logits": self.head(self.averaged(h).tanh().mean((1, 2), keepdim=True).flatten(1))}


def mixed():
    torch.manual_seed(0)
    return Mixed(), {"tokens": torch.randint(7, (3, 4)), "scale": torch.rand(3, 1, 1)}


def test_groups_have_kinds_readers_and_costs():
    net, x = mixed()
    structures = bmrs.find_structures(net, x)
    assert {name: (each.kind, each.size) for name, each in structures.items()} == {
        "down": ("width", 8),
        "up": ("channel", 12),
        "attention": ("head", 2),
    }
    assert [reader.module for reader in structures["up"].readers] == ["down"]
    assert {reader.module for reader in structures["down"].readers} == {"up", "attention", "averaged"}
    assert structures["up"].parameters.tolist() == [8 + 1 + 8] * 12
    assert structures["up"].flops.tolist() == [2 * 3 * 4 * 16] * 12
    member = structures["attention"].members["attention.in_proj_weight", 0]
    assert member.tolist() == [0, 0, 0, 0, 1, 1, 1, 1] * 3


def test_norms_on_the_way_are_named():
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.GroupNorm(2, 4), nn.Conv2d(4, 2, 3))
    structures = bmrs.find_structures(net, torch.randn(2, 1, 8, 8))
    assert (structures["0"].size, structures["0"].norms) == (2, ("1", "3"))


def test_one_bad_site_refuses_itself():
    net, x = mixed()
    structures = bmrs.find_structures(net, x)
    assert "a mean in the network itself runs over it" in structures.refused["averaged"]
    assert structures.refused["head"] == "the network returns it"
    with pytest.raises(KeyError, match=r"no structures called 'averaged' to remove: a mean"):
        structures["averaged"]


def test_the_table_says_what_was_found_and_what_was_not():
    net, x = mixed()
    lines = str(bmrs.find_structures(net, x)).splitlines()
    assert lines[0].split() == ["structures", "kind", "size", "parameters", "each", "MFLOPs", "each", "read", "by"]
    assert any(line.split()[:4] == ["up", "channel", "12", "17"] for line in lines)
    assert "refused:" in lines


def test_groups_are_selected_by_kind_and_name():
    net, x = mixed()
    structures = bmrs.find_structures(net, x)
    assert set(structures.select(kinds=("head", "channel"))) == {"up", "attention"}
    assert list(structures.select(names="att*")) == ["attention"]
    with pytest.raises(ValueError, match="no structures of kinds None match 'nothing'"):
        structures.select(names="nothing")


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_parameters_that_hide_a_branch_do_not_hide_it_from_the_trial(value):
    class Gated(nn.Module):
        """Divides by a mean over channels where its gain is not zero, as ConvNeXt V2 does; and adds a hidden branch."""

        def __init__(self):
            super().__init__()
            self.a, self.b, self.gain = nn.Linear(3, 6), nn.Linear(6, 2), nn.Parameter(torch.full((6,), value))

        def forward(self, x):
            h = self.a(x).relu()
            norm = h.norm(dim=0, keepdim=True)
            return self.b(h + h * self.gain * (norm / norm.mean(-1, keepdim=True)))

    assert not bmrs.find_structures(Gated(), torch.randn(4, 3))


def test_an_unknown_operation_is_named():
    class Fourier(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(3, 6), nn.Linear(6, 2)

        def forward(self, x):
            return self.b(torch.fft.fft(self.a(x)).real)

    structures = bmrs.find_structures(Fourier(), torch.randn(4, 3))
    assert "'fft_fft' to it, an operation that is not known" in structures.refused["a"]


def test_recurrent_layers_are_refused_by_name():
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.lstm = nn.Linear(3, 6), nn.LSTM(6, 5, batch_first=True)
            self.hidden, self.head = nn.Linear(5, 4), nn.Linear(4, 2)

        def forward(self, x):
            return self.head(self.hidden(self.lstm(self.embed(x))[0][:, -1]).relu())

    structures = bmrs.find_structures(Recurrent(), torch.randn(2, 4, 3))
    assert list(structures) == ["hidden"]
    assert "'lstm'" in structures.refused["embed"]


def test_what_does_not_run_is_said_to():
    with pytest.raises(
        ValueError, match=r"the network does not run on the example inputs, a Tensor of .* \(RuntimeError: "
    ):
        bmrs.find_structures(nn.Linear(3, 2), torch.randn(2, 4))
    with pytest.raises(ValueError, match=r"outputs names 'nothing', but the network has no such module"):
        bmrs.find_structures(nn.Sequential(nn.Linear(3, 2)), torch.randn(2, 3), outputs=["nothing"])


@pytest.mark.slow
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_operation_has_a_rule_that_takes_it_or_is_named(name, monkeypatch):
    seen = []

    class Watched(discovery.Tracer):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            seen.append(self)

    monkeypatch.setattr(discovery, "Tracer", Watched)
    net, x = make(name)
    bmrs.find_structures(net, x, trial=False)
    assert not [what for what, _ in seen[0].unknown if ": " in what]  # an error inside a rule


def test_outputs_that_are_no_numbers_are_compared_too():
    class Classes(nn.Module):
        def __init__(self, wrap):
            super().__init__()
            self.layers, self.wrap = nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 4)), wrap

        def forward(self, x):
            return self.wrap(self.layers(x).argmax(-1))

    assert list(bmrs.find_structures(Classes(lambda each: each), torch.randn(4, 3))) == ["layers.0"]
    with pytest.raises(ValueError, match="returns a str without tensors in it"):
        bmrs.find_structures(Classes(str), torch.randn(4, 3))
    with pytest.raises(ValueError, match="parameter 'weight' has no shape yet"):
        bmrs.find_structures(nn.LazyLinear(3), torch.randn(4, 3))


class Squeezed(nn.Module):
    """Takes away dimensions of extent 1, whichever they are."""

    def __init__(self):
        super().__init__()
        self.conv, self.pool, self.head = nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Linear(8, 2)

    def forward(self, x):
        return self.head(self.pool(self.conv(x)).squeeze())


class Listed(nn.Module):
    """Keeps a layer where nobody converts its dtype."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.hidden = nn.Linear(3, 8), nn.Linear(8, 2), [nn.Linear(3, 2)]

    def forward(self, x):
        return self.b(self.a(x).relu()) + self.hidden[0](x)


class Logarithm(nn.Module):
    """Is not finite where inputs are negative."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(3, 8), nn.Linear(8, 2)

    def forward(self, x):
        return self.b(self.a(x.log()).relu())


@pytest.mark.parametrize("make", [Squeezed, Listed, Logarithm])
def test_networks_with_quirks(make):
    torch.manual_seed(0)
    net = make()
    x = torch.rand(4, 3, 6, 6) if make is Squeezed else torch.rand(4, 3)
    structures = bmrs.find_structures(net, x)
    assert [each.size for each in structures.values()] == [8]
    model = bmrs.NoisyNetwork(bmrs.attach_noise(net, structures))
    guide = bmrs.TruncatedLogNormalGuide(model, init_loc=-0.3)
    for keep in (torch.arange(8) < 3, torch.zeros(8, dtype=torch.bool)):
        masks = dict.fromkeys(model.sizes, keep)
        small = bmrs.compact(model, guide, masks, x)
        torch.testing.assert_close(small(x), bmrs.predict(model, guide, x, masks))
        assert bmrs.count_parameters(net, structures, masks) == bmrs.count_parameters(small)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_script_modules_are_refused():
    with pytest.raises(ValueError, match="is a ScriptModule; give the module that it was made from"):
        bmrs.find_structures(torch.jit.trace(nn.Linear(3, 2), torch.randn(2, 3)), torch.randn(2, 3))


def test_examples_that_show_nothing_are_refused_in_a_line():
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(4 * 36, 3))
    with pytest.raises(ValueError, match="the example inputs are of no example"):
        bmrs.find_structures(net, torch.randn(0, 1, 8, 8))
    with pytest.raises(ValueError, match=r"an? ndarray of shape \(2, 1, 8, 8\) and dtype float32") as error:
        bmrs.find_structures(net, torch.randn(2, 1, 8, 8).numpy())
    assert "\n" not in str(error.value)


def test_networks_that_draw_are_refused_for_that():
    class Drawing(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 3)

        def forward(self, x):
            return self.b(nn.functional.dropout(self.a(x), 0.5, training=True))

    refused = bmrs.find_structures(Drawing(), torch.randn(3, 4)).refused
    assert "draws random numbers in eval mode" in refused["a"]


def test_weights_that_are_not_finite_are_named():
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    with torch.no_grad():
        net[2].bias[1] = float("nan")
    with pytest.raises(ValueError, match=r"parameter '2\.bias' is not finite everywhere"):
        bmrs.find_structures(net, torch.randn(2, 4))
