import json
import pickle

import pytest
import torch
from nets import build, random_masks
from torch import nn

import pyro_bmrs as bmrs
from pyro_bmrs.io.files import prepare_run_folder
from pyro_bmrs.structures.attention import HeadwiseAttention
from pyro_bmrs.structures.layers import ChannelGather, ChannelScale


@pytest.fixture
def saved(tmp_path):
    model, guide, x = build("lenet5")
    small = bmrs.compact(model, guide, random_masks(model), x)
    bmrs.save(small, tmp_path / "pruned")
    return small, tmp_path / "pruned", x


def test_round_trip(saved):
    small, path, x = saved
    loaded = bmrs.load(path)
    assert torch.equal(loaded(x), small(x))
    assert str(loaded) == str(small)


@pytest.mark.parametrize(
    "layer",
    [
        nn.Linear(3, 2, bias=False),
        nn.Conv2d(4, 6, (3, 1), stride=2, padding=(1, 0), dilation=1, groups=2, padding_mode="reflect"),
        nn.Conv1d(2, 3, 3, padding="same"),
        nn.BatchNorm2d(4, eps=1e-3, momentum=0.2),
        nn.BatchNorm1d(4, affine=False),
        nn.LayerNorm((3, 4)),
        nn.GroupNorm(2, 4),
        nn.LeakyReLU(0.2),
        nn.GELU(approximate="tanh"),
        nn.Dropout(0.3),
        nn.MaxPool2d(2, stride=1, padding=1),
        nn.AvgPool2d(3),
        nn.AdaptiveAvgPool2d((1, 1)),
        nn.Flatten(2),
        nn.Unflatten(1, (2, 2)),
        nn.Embedding(5, 3),
        nn.ModuleDict({"a": nn.Linear(1, 2)}),
        nn.ModuleList([nn.Linear(1, 2), nn.Sequential()]),
        ChannelScale(torch.rand(4), dim=-1),
        ChannelGather(torch.tensor([2, 0]), dim=-1),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_layers_are_rebuilt_with_their_arguments(layer, tmp_path):
    bmrs.save(nn.Sequential(layer), tmp_path / "net")
    loaded = bmrs.load(tmp_path / "net")[0]
    assert type(loaded) is type(layer)
    assert str(loaded) == str(layer)
    torch.testing.assert_close(dict(loaded.state_dict()), dict(layer.state_dict()))


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.noise, self.b = nn.Linear(4, 6), bmrs.MultiplicativeNoise(6), nn.Linear(6, 4)

    def forward(self, x):
        return x + self.b(self.noise(torch.relu(self.a(x))))


def test_classes_of_the_users_need_an_instance(tmp_path):
    model = bmrs.NoisyNetwork(Residual())
    guide = bmrs.TruncatedLogNormalGuide(model)
    x = torch.randn(3, 4)
    small = bmrs.compact(model, guide, {"noise.theta": torch.arange(6) < 2}, x)
    bmrs.save(small, tmp_path / "net")
    with pytest.raises(ValueError, match=r"root is a .*Residual, which is not a torch.nn layer.*load\(path, module\)"):
        bmrs.load(tmp_path / "net")
    torch.testing.assert_close(bmrs.load(tmp_path / "net", Residual())(x), small(x))
    with pytest.raises(ValueError, match="has no part 'a'"):
        bmrs.load(tmp_path / "net", nn.Module())


def test_models_and_guides_are_put_back(tmp_path):
    model, guide, x = build("mlp", seed=1)
    model.noise["fc1_noise.theta"].remove(torch.arange(12) < 4)
    bmrs.save(model, tmp_path / "model")
    bmrs.save(guide, tmp_path / "guide")
    other_model, other_guide, _ = build("mlp", seed=2)
    bmrs.load(tmp_path / "model", other_model)
    bmrs.load(tmp_path / "guide", other_guide)
    assert torch.equal(bmrs.predict(other_model, other_guide, x), bmrs.predict(model, guide, x))


@pytest.mark.slow
@pytest.mark.parametrize("keep", [0, 7, 100, 0.5, 0.999])
def test_truncated_tensors_are_refused(saved, keep):
    _, path, _ = saved
    file = path.with_name("pruned.safetensors")
    content = file.read_bytes()
    file.write_bytes(content[: int(keep * len(content)) if isinstance(keep, float) else keep])
    with pytest.raises(ValueError, match="truncated or no safetensors file"):
        bmrs.load(path)


@pytest.mark.slow
@pytest.mark.parametrize("content", ["", '{"format": "pyro-b', "[]", '{"format": "other/1", "network": {}}', "\xff"])
def test_truncated_or_foreign_descriptions_are_refused(saved, content):
    _, path, _ = saved
    path.with_name("pruned.json").write_text(content, encoding="latin-1")
    with pytest.raises(ValueError, match=r"truncated or no description|no network saved by pyro-bmrs"):
        bmrs.load(path)


def test_a_pickle_is_refused_and_not_run(saved, tmp_path):
    _, path, _ = saved

    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "owned"), "w"))

    path.with_name("pruned.safetensors").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(ValueError, match="no safetensors file"):
        bmrs.load(path)
    assert not (tmp_path / "owned").exists()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["os.system", "Module.forward", "functional", "parallel", "", None, 3])
def test_a_layer_that_is_none_of_torchs_is_refused(saved, kind):
    _, path, _ = saved
    description = json.loads(path.with_name("pruned.json").read_text())
    description["network"]["module"]["children"]["conv1"]["type"] = kind
    path.with_name("pruned.json").write_text(json.dumps(description))
    with pytest.raises(ValueError, match="'conv1' is described as"):
        bmrs.load(path)


def test_tensors_that_do_not_fit_the_description_are_refused(saved):
    _, path, _ = saved
    description = json.loads(path.with_name("pruned.json").read_text())
    description["network"]["module"]["children"]["output"]["arguments"]["in_features"] += 1
    path.with_name("pruned.json").write_text(json.dumps(description))
    with pytest.raises(ValueError, match="do not fit the network described"):
        bmrs.load(path)


def test_a_missing_file_is_named(saved):
    _, path, _ = saved
    path.with_name("pruned.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"pruned\.safetensors is missing"):
        bmrs.load(path)
    with pytest.raises(FileNotFoundError, match=r"nothing\.json"):
        bmrs.load(path.with_name("nothing"))


def test_a_failed_write_leaves_the_old_file(saved, monkeypatch):
    small, path, x = saved

    def full_disk(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        bmrs.save(nn.Sequential(nn.Linear(1, 1)), path)
    assert torch.equal(bmrs.load(path)(x), small(x))
    assert len(list(path.parent.iterdir())) == 2


def test_results_of_a_run_are_kept_unless_told_otherwise(tmp_path):
    folder = prepare_run_folder(tmp_path / "a" / "run")
    assert (folder / "figures").is_dir()
    (folder / "results.json").write_text("{}")
    with pytest.raises(FileExistsError, match=r"already holds what an earlier run has left; it is kept.*overwrite"):
        prepare_run_folder(folder)
    assert prepare_run_folder(folder, overwrite=True) == folder
    assert not (folder / "results.json").exists()


def test_a_folder_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="cannot write to the run folder"):
        prepare_run_folder(tmp_path / "file" / "run")


class Scaled(nn.Module):
    """A class of a user's own, with a parameter and a number of heads on itself."""

    def __init__(self):
        super().__init__()
        self.n_head, self.scale = 4, nn.Parameter(torch.rand(8))
        self.embed, self.qkv, self.proj = nn.Linear(5, 8), nn.Linear(8, 24), nn.Linear(8, 8)
        self.layer = nn.TransformerEncoderLayer(8, 4, 12, dropout=0.0, batch_first=True)
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 3)

    def forward(self, x):
        h = self.embed(x)
        q, k, v = self.qkv(h).view(*h.shape[:2], 3, self.n_head, 2).permute(2, 0, 3, 1, 4)
        attended = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.head(self.layer(self.norm(h + self.proj(attended) * self.scale)).mean(1))


def test_a_network_of_a_users_own_class_is_loaded_onto_an_instance(tmp_path):
    torch.manual_seed(0)
    net, x = Scaled().eval(), torch.randn(2, 4, 5)
    structures = bmrs.find_structures(net, x)
    model = bmrs.NoisyNetwork(bmrs.attach_noise(net, structures))
    guide = bmrs.TruncatedLogNormalGuide(model, init_loc=-0.3)
    small = bmrs.compact(model, guide, random_masks(model), x)
    assert small.n_head < 4
    assert isinstance(small.layer.self_attn, HeadwiseAttention)
    bmrs.save(small, tmp_path / "small")
    again = bmrs.load(tmp_path / "small", Scaled())
    torch.testing.assert_close(again(x), small(x))
    assert again.n_head == small.n_head
