"""A checkpoint is resumed only by the fit that it is of, and refused before anything is changed."""

import copy
import functools
import json
import random
from pathlib import Path

import pyro.distributions as dist
import pytest
import torch
from filelock import FileLock
from nets import blobs, small_classifier
from processes import Stop
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

import pyro_bmrs as bmrs
from pyro_bmrs.svi.checkpoint import State, read_checkpoint, write_checkpoint
from pyro_bmrs.svi.fingerprint import fingerprint

QUICK = {"epochs": 4, "fine_tune_epochs": 2, "batch_size": 50, "lr": 1e-2, "seed": 0, "progress": False}
FILE = "checkpoint/fit.safetensors"


class Net(nn.Module):
    """A network whose activation its ``repr`` does not tell."""

    def __init__(self, activation=torch.relu):
        super().__init__()
        self.a, self.n, self.b = nn.Linear(6, 16), bmrs.MultiplicativeNoise(16), nn.Linear(16, 3)
        self.activation = activation

    def forward(self, x):
        return self.b(self.n(self.activation(self.a(x))))


class Quietly(bmrs.Criterion):
    """A criterion whose ``repr`` does not tell its threshold."""

    def __init__(self, threshold=1.0):
        self.threshold = threshold

    def __repr__(self):
        return "Quietly()"

    def scores(self, context):
        return {site: posterior.mean - self.threshold for site, posterior in context.guide.posterior().items()}


def odds(value):
    tensor = torch.zeros(2000)
    tensor[1000] = value
    return tensor


def fit(folder, net=None, data=None, validation=None, likelihood=None, stop=None, resume=True, guide=None, **changes):
    torch.manual_seed(1)
    model = bmrs.NoisyNetwork(net or Net(), likelihood=likelihood)
    posterior = (guide or bmrs.TruncatedLogNormalGuide)(model)
    callbacks = [] if stop is None else [Stop(stop)]
    settings = {**QUICK, "criterion": Quietly(), "folder": folder, "resume": resume, "callbacks": callbacks, **changes}
    before = copy.deepcopy((model.state_dict(), posterior.state_dict()))
    try:
        return bmrs.fit(model, posterior, data or blobs(), validation or blobs(50, seed=1), **settings)
    except ValueError:
        torch.testing.assert_close((model.state_dict(), posterior.state_dict()), before, rtol=0, atol=0)
        assert not model.fitted
        raise


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("interrupted")
    with pytest.raises(KeyboardInterrupt):
        fit(folder, stop=3)
    return folder


def scaled(out, scale):
    return dist.Categorical(logits=scale * out)


def with_prior():
    net = Net()
    net.n = bmrs.MultiplicativeNoise(16, bmrs.LogUniform(-9.0, 0.0))
    return net


def frozen():
    net = Net()
    net.a.requires_grad_(False)
    return net


X, Y = blobs()
OTHERS = {
    "inputs": ({"data": (X + 1e-6, Y)}, "train is another"),
    "labels": ({"data": (X, Y.flip(0))}, "train is another"),
    "validation": ({"validation": blobs(50, seed=2)}, "validation is another"),
    "activation": ({"net": Net(torch.tanh)}, "the network computes something else"),
    "layer": ({"net": small_classifier()[0].net}, "network"),
    "prior": ({"net": with_prior()}, "priors"),
    "frozen": ({"net": frozen()}, "the network's module 'a' is another"),
    "likelihood": ({"likelihood": functools.partial(scaled, scale=2.0)}, "likelihood is another"),
    "criterion": ({"criterion": Quietly(0.9)}, "criterion is another"),
    "criterion's class": ({"criterion": bmrs.BMRS_N()}, "criterion is another"),
    "guide": ({"guide": type("Other", (bmrs.TruncatedLogNormalGuide,), {})}, "guide was"),
    "seed": ({"seed": 1}, "seed was 0, is 1"),
    "epochs": ({"epochs": 5}, "rates was"),
    "batch": ({"batch_size": 40}, "batch_size was 50, is 40"),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("change", "message"), OTHERS.values(), ids=OTHERS)
def test_a_checkpoint_of_another_problem_is_refused(interrupted, change, message):
    written = (interrupted / FILE).read_bytes()
    with pytest.raises(ValueError, match=message):
        fit(interrupted, **change)
    assert (interrupted / FILE).read_bytes() == written


def test_a_likelihood_that_only_its_values_tell_is_refused(tmp_path):
    scale = [1.0]

    class Hidden:
        def __call__(self, out):
            return dist.Categorical(logits=scale[0] * out)

        def __reduce__(self):
            return Hidden, ()

    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path, likelihood=Hidden(), stop=2)
    scale[0] = 3.0
    with pytest.raises(ValueError, match="likelihood is another"):
        fit(tmp_path, likelihood=Hidden())


def test_fingerprints_tell_values_and_not_representations():
    assert fingerprint(bmrs.BMRS_N(prior_log_odds={"a": odds(1.0)})) == fingerprint(
        bmrs.BMRS_N(prior_log_odds={"a": odds(1.0)})
    )
    different = [
        bmrs.BMRS_N(prior_log_odds={"a": odds(1.0)}), bmrs.BMRS_N(prior_log_odds={"a": odds(2.0)}), Quietly(1.0),
        Quietly(2.0), lambda x: 2 * x, lambda x: 3 * x, functools.partial(scaled, scale=1.0), odds(1.0),
        odds(1.0).double(), odds(1.0)[:10], torch.zeros(0), None, 0, False, "0", b"0", 0.0, [0], (0,), {0: 0}, {0},
        torch.float32, nn.ReLU(), nn.LeakyReLU(0.1), nn.LeakyReLU(0.2), Quietly, bmrs.BMRS_N,
    ]  # fmt: skip
    assert len({fingerprint(each) for each in different}) == len(different)


def rewritten(path, tensors=lambda t: t, info=lambda i: i):
    """Write a checkpoint again, changed and with a checksum that fits."""
    state = read_checkpoint(path)
    write_checkpoint(path, State(tensors(dict(state.tensors)), info(state.info)))


def without(name):
    return lambda mapping: {key: value for key, value in mapping.items() if key != name}


def renamed(name, new):
    return lambda mapping: {new if key == name else key: value for key, value in mapping.items()}


def with_value(name, value):
    return lambda mapping: {**mapping, name: value}


def in_info(part, **values):
    return lambda info: {**info, part: {**info[part], **values}}


DAMAGES = {
    "lost weight": {"tensors": without("model/net.a.weight")},
    "renamed weight": {"tensors": renamed("model/net.a.weight", "model/net.c.weight")},
    "other shape": {"tensors": with_value("model/net.a.weight", torch.zeros(2, 2))},
    "other dtype": {"tensors": with_value("model/net.a.weight", torch.zeros(16, 6, dtype=torch.float64))},
    "lost posterior": {"tensors": without("guide/loc")},
    "positions": {"tensors": with_value("fit/n.theta", torch.tensor([3, 2, 99]))},
    "no positions": {"tensors": without("fit/n.theta")},
    "moments": {"tensors": with_value("trainer/optimizer.0.exp_avg", torch.zeros(3))},
    "random state": {"tensors": without("trainer/random")},
    "order": {"tensors": with_value("trainer/order", torch.zeros(3, dtype=torch.uint8))},
    "step": {"info": in_info("trainer", step=10**6)},
    "position": {"info": in_info("fit", position=-1)},
    "no number": {"info": in_info("fit", position="3")},
    "lost trainer": {"info": without("trainer")},
    "lost settings": {"info": in_info("fit", settings={})},
    "history": {"info": in_info("history", entries=[{"epoch": i} for i in range(50)])},
    "seconds": {"info": in_info("fit", seconds=float("nan"))},
}


@pytest.mark.slow
@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_checkpoint_that_does_not_fit_is_refused_whole(interrupted, damage, tmp_path):
    (tmp_path / FILE).parent.mkdir()
    (tmp_path / FILE).write_bytes((interrupted / FILE).read_bytes())
    rewritten(tmp_path / FILE, **damage)
    with pytest.raises(ValueError, match=r"fit\.safetensors cannot be resumed from: "):
        fit(tmp_path)


def test_a_changed_checkpoint_is_found_by_its_checksum(interrupted, tmp_path):
    (tmp_path / FILE).parent.mkdir()
    with safe_open(interrupted / FILE, framework="pt") as file:
        tensors, header = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
    tensors["model/net.a.weight"][0, 0] += 1e-6
    save_file(tensors, tmp_path / FILE, header)
    with pytest.raises(ValueError, match="is damaged: its contents do not match its checksum"):
        fit(tmp_path)


@pytest.mark.slow
def test_flipped_bits_of_a_checkpoint_are_found(interrupted, tmp_path):
    whole, chance = (interrupted / FILE).read_bytes(), random.Random(0)
    for _ in range(300):
        broken = bytearray(whole)
        broken[chance.randrange(len(whole))] ^= 1 << chance.randrange(8)
        (tmp_path / "fit").write_bytes(broken)
        with pytest.raises(ValueError, match=r"is no checkpoint|is damaged"):
            read_checkpoint(tmp_path / "fit")


@pytest.mark.slow
def test_the_same_problem_is_gone_on_from(interrupted, tmp_path):
    (tmp_path / FILE).parent.mkdir()
    (tmp_path / FILE).write_bytes((interrupted / FILE).read_bytes())
    whole = fit(tmp_path / "whole", resume=False)
    resumed = fit(tmp_path)
    assert [each["loss"] for each in resumed.history] == [each["loss"] for each in whole.history]
    assert all(torch.equal(resumed.scores[site], whole.scores[site]) for site in whole.scores)


@pytest.mark.slow
def test_two_fits_in_one_folder_are_refused(tmp_path):
    fit(tmp_path, stop=None, resume=False)
    with FileLock(tmp_path / "checkpoint" / "fit.lock"), pytest.raises(RuntimeError, match="another fit is running in"):
        fit(tmp_path)
    fit(tmp_path)


class FitThere(bmrs.Callback):
    def __init__(self, folder):
        self.folder = folder

    def on_epoch_end(self, record):
        fit(self.folder, resume=True)


def test_a_fit_within_a_fit_in_its_folder_is_refused(tmp_path):
    model, guide = small_classifier()
    with pytest.raises(RuntimeError, match="another fit is running in"):
        bmrs.fit(model, guide, blobs(), folder=tmp_path, callbacks=[FitThere(tmp_path)], **QUICK)


@pytest.mark.slow
@pytest.mark.parametrize("finished", [True, False])
def test_a_broken_last_line_of_the_metrics_is_mended(finished, tmp_path):
    if finished:
        fit(tmp_path, resume=False)
    else:
        with pytest.raises(KeyboardInterrupt):
            fit(tmp_path, resume=False, stop=4)
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text(metrics.read_text()[:-20])
    fit(tmp_path)
    records = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert [record["epoch"] for record in records] == [1, 2, 3, 4, 5, 6]


class FullDisk(bmrs.Callback):
    """Lets no more be appended for an epoch."""

    def __init__(self, monkeypatch, epoch):
        self.monkeypatch, self.epoch = monkeypatch, epoch

    def on_epoch_end(self, record):
        if record["epoch"] != self.epoch:
            self.monkeypatch.undo()
            return

        whole = Path.open

        def full(path, *args, **kwargs):
            file = whole(path, *args, **kwargs)
            if path.name == "metrics.jsonl":
                write = file.write

                def half(line):
                    write(line[:10])
                    raise OSError(28, "No space left on device")

                file.write = half
            return file

        self.monkeypatch.setattr(Path, "open", full)


def test_a_full_disk_breaks_no_line_of_the_metrics(tmp_path, monkeypatch):
    model, guide = small_classifier()
    with pytest.warns(RuntimeWarning, match="No space left on device.*the fit goes on"):
        bmrs.fit(model, guide, blobs(), folder=tmp_path, callbacks=[FullDisk(monkeypatch, 3)], **QUICK)
    assert len([json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]) == 6
