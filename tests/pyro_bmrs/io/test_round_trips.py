"""What is saved is what is loaded, or it is refused before anything is written."""

import copy
import json
import multiprocessing
import os
import random
import stat

import pyro.distributions as dist
import pytest
import torch
from nets import blobs, build, random_masks, small_classifier
from torch import nn

import pyro_bmrs as bmrs


def tied():
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    net[2].weight = net[0].weight
    return net


def shared():
    activation, layer = nn.LeakyReLU(0.3), nn.Linear(4, 4)
    return nn.Sequential(layer, activation, layer, activation, nn.Linear(4, 2))


def frozen():
    net = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))
    net[0].requires_grad_(False)
    net[1].bias.requires_grad_(False)
    return net


def in_dtype(dtype):
    return lambda: nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)).to(dtype)


def channels_last():
    return nn.Sequential(nn.Conv2d(3, 4, 3)).to(memory_format=torch.channels_last)


def encoder(**more):
    layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True, **more)
    return nn.Sequential(nn.TransformerEncoder(layer, 2, norm=nn.LayerNorm(8), enable_nested_tensor=False))


def changed_later():
    net = nn.Sequential(nn.Dropout(0.1), nn.LeakyReLU(0.1), nn.BatchNorm1d(3))
    net[0].p, net[1].negative_slope, net[2].momentum = 0.4, 0.2, 0.7
    return net


NETWORKS = {
    "tied": tied, "shared": shared, "frozen": frozen, "changed_later": changed_later, "channels_last": channels_last,
    "float64": in_dtype(torch.float64), "bfloat16": in_dtype(torch.bfloat16), "float16": in_dtype(torch.float16),
    "complex": lambda: nn.Sequential(nn.Linear(3, 2, dtype=torch.complex64)),
    "lstm": lambda: nn.ModuleList([nn.LSTM(3, 5, 2, batch_first=True, dropout=0.1, bidirectional=True, proj_size=2)]),
    "gru": lambda: nn.ModuleList([nn.GRU(3, 5, bias=False)]),
    "rnn": lambda: nn.ModuleList([nn.RNN(3, 5, nonlinearity="relu"), nn.LSTMCell(3, 4), nn.RNNCell(3, 4, bias=False)]),
    "attention": lambda: nn.ModuleList([nn.MultiheadAttention(8, 2, dropout=0.1, bias=False, add_bias_kv=True)]),
    "attention of other widths": lambda: nn.ModuleList([nn.MultiheadAttention(8, 2, kdim=5, vdim=6, batch_first=True)]),
    "encoder": encoder,
    "encoder with gelu": lambda: encoder(activation="gelu", norm_first=True, dropout=0.0, layer_norm_eps=1e-4),
    "encoder with a module": lambda: encoder(activation=nn.SiLU(), bias=False),
    "decoder": lambda: nn.Sequential(nn.TransformerDecoder(nn.TransformerDecoderLayer(8, 2, 12), 1)),
    "bare layer": lambda: nn.Linear(3, 2),
    "no tensors": lambda: nn.Sequential(nn.ReLU(), nn.Upsample(scale_factor=2.0), nn.PixelShuffle(2)),
    "empty": nn.Sequential,
    "embedding": lambda: nn.Sequential(nn.Embedding(5, 3, padding_idx=1, max_norm=2.0), nn.EmbeddingBag(4, 2)),
    "convolutions": lambda: nn.ModuleList(
        [nn.ConvTranspose2d(2, 3, 3, 2, output_padding=1), nn.Conv1d(2, 4, 3, padding=2, padding_mode="circular")]
    ),
    "norms": lambda: nn.ModuleList(
        [nn.InstanceNorm2d(3, affine=True), nn.RMSNorm(4), nn.BatchNorm2d(3, track_running_stats=False), nn.PReLU(3)]
    ),
    "dictionary": lambda: nn.ModuleDict({"a.b".replace(".", "_"): nn.Bilinear(2, 3, 4), "c": nn.Identity()}),
}  # fmt: skip


def same(loaded, net):
    assert str(loaded) == str(net)
    tensors = [dict((*each.named_parameters(remove_duplicate=False), *each.named_buffers())) for each in (loaded, net)]
    assert tensors[0].keys() == tensors[1].keys()
    for name, tensor in tensors[1].items():
        assert tensor.dtype == tensors[0][name].dtype
        assert tensor.requires_grad == tensors[0][name].requires_grad
        torch.testing.assert_close(tensors[0][name].detach(), tensor.detach(), rtol=0, atol=0)


@pytest.mark.parametrize("make", NETWORKS.values(), ids=NETWORKS)
def test_layers_of_torch_need_no_instance(make, tmp_path):
    net = make().eval()
    bmrs.save(net, tmp_path / "net")
    loaded = bmrs.load(tmp_path / "net")
    same(loaded, net)
    bmrs.save(loaded, tmp_path / "again")
    assert (tmp_path / "net.json").read_bytes() == (tmp_path / "again.json").read_bytes()


def test_what_is_tied_or_shared_is_one_again(tmp_path):
    bmrs.save(tied(), tmp_path / "tied")
    net = bmrs.load(tmp_path / "tied")
    assert net[2].weight is net[0].weight
    bmrs.save(shared(), tmp_path / "shared")
    net = bmrs.load(tmp_path / "shared")
    assert net[0] is net[2]
    assert net[1] is net[3]
    assert len(net) == 5


def test_recurrent_and_attention_layers_compute_the_same(tmp_path):
    for name, x in (("encoder", torch.randn(2, 4, 8)), ("gru", torch.randn(4, 2, 3))):
        net = NETWORKS[name]().eval()
        bmrs.save(net, tmp_path / name)
        one, other = (each[0](x) for each in (net, bmrs.load(tmp_path / name)))
        torch.testing.assert_close(one, other, rtol=0, atol=0)


class Own(nn.Module):
    """A class of a user's own, with a part that is None, a buffer that is not saved, and tied weights."""

    def __init__(self, width=6, tie=True):
        super().__init__()
        self.downsample = None
        self.register_module("nothing", None)
        self.first, self.second = nn.Linear(4, width), nn.Linear(width, 4, bias=False)
        self.act = nn.Sequential(nn.ReLU(), bmrs.MultiplicativeNoise(width))
        self.register_buffer("table", torch.arange(4.0), persistent=False)
        self.back = nn.Linear(4, width)
        if tie:
            self.back.weight = self.first.weight

    def forward(self, x):
        return self.second(self.act(self.first(x)) + self.back(x)) + self.table


@pytest.mark.parametrize("tie", [True, False])
def test_an_instance_takes_what_was_saved(tie, tmp_path):
    net = Own(tie=tie)
    net.table.mul_(2)
    bmrs.save(net, tmp_path / "net")
    loaded = bmrs.load(tmp_path / "net", Own())  # whose weights are tied
    same(loaded, net.eval())
    assert (loaded.back.weight is loaded.first.weight) == tie
    x = torch.randn(3, 4)
    assert torch.equal(loaded(x), net(x))
    assert torch.equal(loaded.table, net.table)


def test_an_instance_of_another_dtype_takes_that_of_the_file(tmp_path):
    net = Own().double()
    bmrs.save(net, tmp_path / "net")
    same(bmrs.load(tmp_path / "net", Own()), net.eval())


def test_a_load_that_is_refused_changes_nothing(tmp_path):
    bmrs.save(Own(), tmp_path / "net")

    class Other(Own):
        def __init__(self):
            super().__init__()
            self.more = nn.Linear(2, 2)

    other = Other().train()
    before = copy.deepcopy(other)
    with pytest.raises(ValueError, match=r"do not fit .*'more.weight' is missing"):
        bmrs.load(tmp_path / "net", other)
    same(other, before)
    assert other.training
    with pytest.raises(TypeError, match="module must be an instance of the class"):
        bmrs.load(tmp_path / "net", Other)


class Wave(nn.Module):
    def forward(self, x):
        return x.sin()


def with_hook():
    net = nn.Sequential(nn.Linear(2, 2))
    net[0].register_forward_hook(lambda module, args, output: 2 * output)
    return net


def test_layers_with_hooks_or_computed_weights_need_an_instance(tmp_path):
    for make in (with_hook, lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(2, 2))), Wave):
        net = make()
        bmrs.save(net, tmp_path / "net")
        with pytest.raises(ValueError, match=r"load\(path, module\)"):
            bmrs.load(tmp_path / "net")
        loaded, x = bmrs.load(tmp_path / "net", make()), torch.randn(3, 2)
        assert torch.equal(loaded(x), net(x))


class Extra(nn.Linear):
    def get_extra_state(self):
        return {"anything": object()}

    def set_extra_state(self, state):
        pass


REFUSED = {
    "lazy": (lambda: nn.Sequential(nn.LazyLinear(3)), "has no shape yet: run the network once"),
    "compiled": (lambda: torch.compile(nn.Linear(2, 2)), "a wrapper: save what it wraps, ._orig_mod"),
    "parallel": (lambda: nn.DataParallel(nn.Linear(2, 2)), "a wrapper: save what it wraps, .module"),
    "extra state": (lambda: Extra(2, 2), "an extra state, which may be anything"),
    "meta": (lambda: nn.Linear(2, 2, device="meta"), "without plain values"),
}


@pytest.mark.slow
@pytest.mark.parametrize(("make", "message"), REFUSED.values(), ids=REFUSED)
@pytest.mark.filterwarnings("ignore:.*Lazy modules are a new feature", "ignore:.*torch.jit.script_method.*deprecated")
def test_what_could_not_be_loaded_is_not_saved(make, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        bmrs.save(make(), tmp_path / "net")
    assert not list(tmp_path.iterdir())
    with pytest.raises(TypeError, match=r"net must be an nn\.Module, but got a dict"):
        bmrs.save({}, tmp_path / "net")


def shrunk(make):
    """Return model and guide from which every third structure has been cut out."""
    model, guide, x = make()
    for layer in model.noise.values():
        layer.remove(torch.arange(layer.size) % 3 == 1)
    bmrs.shrink(model, guide, torch.optim.Adam([*model.parameters(), *guide.parameters()]), x[:2])
    return model, guide, x


def attached():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 7), nn.Tanh(), nn.Linear(7, 3))
    x = torch.randn(5, 6)
    model = bmrs.NoisyNetwork(bmrs.attach_noise(net, bmrs.find_structures(net, x)))
    return model, bmrs.TruncatedLogNormalGuide(model, init_loc=-0.5), x


PAIRS = {
    "inside": lambda: build("mlp"), "convolutions": lambda: build("lenet5"), "batch norm": lambda: build("batch_norm"),
    "attached": attached,
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("make", PAIRS.values(), ids=PAIRS)
def test_shrunk_models_and_guides_are_put_back(make, tmp_path):
    model, guide, x = shrunk(make)
    with torch.no_grad():
        guide.loc.normal_()
    bmrs.save(model, tmp_path / "model")
    bmrs.save(guide, tmp_path / "guide")
    again, posterior, _ = make()
    with pytest.raises(ValueError, match="load the model first"):
        bmrs.load(tmp_path / "guide", posterior)
    bmrs.load(tmp_path / "model", again)
    bmrs.load(tmp_path / "guide", posterior)
    assert again.sizes == model.sizes == posterior.sizes
    assert torch.equal(bmrs.predict(again, posterior, x), bmrs.predict(model, guide, x))
    found, expected = (bmrs.evidence_changes(each) for each in (posterior, guide))
    torch.testing.assert_close(found, expected, equal_nan=True, rtol=0, atol=0)
    masks = {site: layer.original_keep for site, layer in again.noise.items()}
    small = bmrs.compact(again, posterior, masks, x)
    torch.testing.assert_close(small(x), bmrs.predict(model, guide, x), rtol=1e-4, atol=1e-5)
    losses = []
    for pair in ((model, guide), (again, posterior)):  # noise is there, at hooks too
        torch.manual_seed(0)
        losses.append(bmrs.MeanFieldELBO().loss(pair[0].eval(), pair[1], x, torch.zeros(len(x))))
    assert losses[0] == losses[1]


def test_a_loaded_model_can_be_fitted_and_shrunk_further(tmp_path):
    model, guide, x = shrunk(attached)
    bmrs.save(model, tmp_path / "model")
    bmrs.save(guide, tmp_path / "guide")
    again, posterior, _ = attached()
    bmrs.load(tmp_path / "model", again)
    bmrs.load(tmp_path / "guide", posterior)
    data = blobs(60)
    result = bmrs.fit(again, posterior, data, epochs=2, fine_tune_epochs=1, seed=0, progress=False)
    assert {site: len(mask) for site, mask in result.masks.items()} == {"0.theta": 9, "2.theta": 7}
    small = bmrs.compact(again, posterior, result.masks, data[0][:2])
    torch.testing.assert_close(small(x), bmrs.predict(again, posterior, x), rtol=1e-4, atol=1e-5)


def test_beta_guides_are_put_back(tmp_path):
    def make():
        noise = bmrs.MultiplicativeNoise(8, prior=dist.Beta(1.0, 1.0))
        model = bmrs.NoisyNetwork(nn.Sequential(nn.Linear(4, 8), nn.Tanh(), noise, nn.Linear(8, 3)))
        return model, bmrs.BetaGuide(model), torch.randn(3, 4)

    model, guide, x = shrunk(make)
    bmrs.save(model, tmp_path / "model")
    bmrs.save(guide, tmp_path / "guide")
    again, posterior, _ = make()
    bmrs.load(tmp_path / "guide", bmrs.load(tmp_path / "model", again) and posterior)
    assert torch.equal(bmrs.predict(again, posterior, x), bmrs.predict(model, guide, x))


@pytest.fixture
def pair(tmp_path):
    torch.manual_seed(0)
    bmrs.save(nn.Sequential(nn.Linear(2, 3), nn.LeakyReLU(0.1)), tmp_path / "net")
    return tmp_path / "net"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["net.json", "net.safetensors"])
def test_every_flipped_bit_is_found(pair, name):
    file, chance = pair.with_name(name), random.Random(0)
    whole = file.read_bytes()
    for position in range(len(whole)):
        broken = bytearray(whole)
        broken[position] ^= 1 << chance.randrange(8)
        file.write_bytes(broken)
        with pytest.raises(ValueError, match=r"net\.|described|layer|module|tensors|network"):
            bmrs.load(pair)


def test_files_of_two_networks_do_not_go_together(pair, tmp_path):
    bmrs.save(nn.Sequential(nn.Linear(2, 3), nn.LeakyReLU(0.1)), tmp_path / "other")
    (tmp_path / "other.json").replace(tmp_path / "net.json")
    with pytest.raises(ValueError, match="do not belong together"):
        bmrs.load(pair)


LARGE = {
    "layer": {"type": "Linear", "arguments": {"in_features": 10**6, "out_features": 10**6}, "children": {}},
    "stack": {"type": "LSTM", "arguments": {"input_size": 2, "hidden_size": 2, "num_layers": 10**8}, "children": {}},
    "no number": {"type": "Linear", "arguments": {"in_features": "2", "out_features": None}, "children": {}},
    "negative": {"type": "Linear", "arguments": {"in_features": -2, "out_features": 3}, "children": {}},
    "object": {"type": "Linear", "arguments": {"in_features": {"a": 1}, "out_features": 3}, "children": {}},
    "unknown argument": {"type": "ReLU", "arguments": {"hook": "os.system"}, "children": {}},
    "list": ["Linear", 2, 3],
    "children": {"type": "Sequential", "children": [1, 2]},
    "same": {"same": ["0"]},
    "itself": {"same": ""},
    "attribute": {"type": "ReLU", "arguments": {}, "attributes": {"inplace": {"a": 1}}, "children": {}},
}


@pytest.mark.parametrize("description", LARGE.values(), ids=LARGE)
def test_descriptions_are_not_trusted(pair, description):
    content = json.loads(pair.with_name("net.json").read_text())
    content["network"]["module"]["children"]["0"] = description
    pair.with_name("net.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"fit the network|num_layers|layer '0'|module '0'|to be ''"):
        bmrs.load(pair)


def test_deep_nesting_is_refused(pair):
    text = '{"format": "pyro-bmrs/2", "network": {"module": ' + '{"children": {"0": ' * 50_000
    pair.with_name("net.json").write_text(text)
    with pytest.raises(ValueError, match="truncated or no description"):
        bmrs.load(pair)


def test_files_get_the_mode_of_the_umask_and_links_are_not_followed(tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("precious")
    for name in ("net.json", "net.safetensors", ".net.json.partial", ".net.safetensors.partial"):
        (tmp_path / name).symlink_to(victim)
    before = os.umask(0o027)
    try:
        bmrs.save(nn.Sequential(nn.ReLU()), tmp_path / "net")
    finally:
        os.umask(before)
    assert victim.read_text() == "precious"
    for name in ("net.json", "net.safetensors"):
        assert not (tmp_path / name).is_symlink()
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o640


def save_often(path, seed):
    torch.manual_seed(seed)
    for _ in range(40):
        bmrs.save(nn.Sequential(nn.Linear(2, 3), nn.LeakyReLU(float(torch.rand(())))), path)


def test_two_writers_never_leave_a_mixture(tmp_path):
    bmrs.save(nn.Sequential(nn.Linear(2, 3), nn.LeakyReLU(0.1)), tmp_path / "net")
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=save_often, args=(tmp_path / "net", seed)) for seed in range(2)]
    for each in writers:
        each.start()
    while any(each.is_alive() for each in writers):
        bmrs.load(tmp_path / "net")
    for each in writers:
        each.join()
        assert each.exitcode == 0
    bmrs.load(tmp_path / "net")
    assert len(list(tmp_path.iterdir())) == 2


def test_a_compacted_network_with_fewer_heads_is_loaded(tmp_path):
    torch.manual_seed(0)
    net, x = nn.TransformerEncoderLayer(8, 4, 12, dropout=0.0, batch_first=True).eval(), torch.randn(2, 5, 8)
    model = bmrs.NoisyNetwork(bmrs.attach_noise(net, bmrs.find_structures(net, x)))
    guide = bmrs.TruncatedLogNormalGuide(model, init_loc=-0.3)
    small = bmrs.compact(model, guide, random_masks(model), x)
    bmrs.save(small, tmp_path / "small")
    again = bmrs.load(tmp_path / "small", nn.TransformerEncoderLayer(8, 4, 12, dropout=0.0, batch_first=True))
    torch.testing.assert_close(again(x), small(x), rtol=0, atol=0)


def test_a_fitted_model_is_the_same_after_loading(tmp_path):
    x, y = blobs()
    model, guide = small_classifier()
    bmrs.fit(model, guide, (x, y), epochs=2, fine_tune_epochs=1, seed=0, progress=False)
    bmrs.save(model, tmp_path / "model")
    bmrs.save(guide, tmp_path / "guide")
    again, posterior = small_classifier(seed=1)
    bmrs.load(tmp_path / "model", again)
    bmrs.load(tmp_path / "guide", posterior)
    assert torch.equal(bmrs.predict(again, posterior, x), bmrs.predict(model, guide, x))
