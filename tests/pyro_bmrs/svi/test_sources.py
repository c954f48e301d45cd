import random
import warnings

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from nets import blobs
from processes import state
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, SubsetRandomSampler, TensorDataset

import pyro_bmrs as bmrs
from pyro_bmrs.svi.data.making import make_source

X, Y = blobs(60)
QUICK = {"epochs": 4, "fine_tune_epochs": 1, "lr": 1e-2, "posterior_lr": 0.1, "seed": 0, "progress": False}


class Rows(Dataset):
    """The same rows as mappings, as the datasets of others are."""

    def __len__(self):
        return len(X)

    def __getitem__(self, i):
        return {"x": X[i].numpy(), "labels": int(Y[i])}


class Named(nn.Module):
    """A network of named inputs that returns more than logits."""

    def __init__(self):
        super().__init__()
        self.first, self.noise, self.last = nn.Linear(6, 16), bmrs.MultiplicativeNoise(16), nn.Linear(16, 3)

    def forward(self, x, scale=None):
        h = self.first(x) if scale is None else self.first(x) * scale
        return {"logits": self.last(self.noise(h.relu())), "hidden": h}


class Augmented(Dataset):
    """Rows with noise from each of the three sources of random numbers."""

    def __len__(self):
        return len(X)

    def __getitem__(self, i):
        return X[i] + 0.1 * torch.randn(6) + random.gauss(0, 0.1) + np.random.normal(0, 0.1), Y[i]  # noqa: NPY002


class Stop(bmrs.Callback):
    def on_epoch_end(self, record):
        if record["epoch"] == 2:
            raise KeyboardInterrupt


def build(net=None):
    torch.manual_seed(0)
    layers = (nn.Linear(6, 16), nn.ReLU(), bmrs.MultiplicativeNoise(16), nn.Linear(16, 3))
    model = bmrs.NoisyNetwork(*((net(), _logits) if net else (nn.Sequential(*layers),)))
    return model, bmrs.TruncatedLogNormalGuide(model)


def _logits(output):
    return dist.Categorical(logits=output["logits"])


def fitted(train, validation=None, net=None, **settings):
    model, guide = build(net)
    result = bmrs.fit(model, guide, train, validation, **{**QUICK, **settings})
    return state(model, guide), result


def stateful(**arguments):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loader = pytest.importorskip("torchdata.stateful_dataloader").StatefulDataLoader
        return loader(Augmented(), batch_size=16, shuffle=True, **arguments)


@pytest.mark.slow
def test_a_dataset_trains_as_its_tensors_do():
    expected, _ = fitted((X, Y), batch_size=16)
    found, result = fitted(Rows(), Rows(), net=None, batch_size=16, unpack=lambda batch: (batch["x"], batch["labels"]))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert (
        result.history[-1]["accuracy_validation"]
        == fitted((X, Y), (X, Y), batch_size=16)[1].history[-1]["accuracy_validation"]
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "train",
    [
        {"x": X, "labels": Y},
        ({"x": X}, Y),
        ((X,), Y),
        ((X, torch.ones(60, 1)), Y),
        Rows(),
        DataLoader(Rows(), batch_size=16),
        [{"x": X[:30], "label": Y[:30]}, {"x": X[30:], "label": Y[30:]}],
        DataLoader(TensorDataset(X, torch.ones(60, 1), Y), batch_size=16),
    ],
    ids=["mapping", "named", "tuple", "two inputs", "dataset", "loader", "batches", "three"],
)
def test_inputs_of_any_form(train):
    settings = {}
    if isinstance(train, DataLoader) and isinstance(train.dataset, TensorDataset):
        settings["unpack"] = lambda batch: ((batch[0], batch[1]), batch[2])
    _, result = fitted(train, train, Named, **settings)
    assert result.history[-1]["loss"] < result.history[0]["loss"]
    assert 0 <= result.history[-1]["accuracy_validation"] <= 1


@pytest.mark.parametrize(
    ("data", "size", "steps"),
    [
        (DataLoader(Rows(), batch_size=16), 60, 4),
        (DataLoader(Rows(), batch_size=16, drop_last=True), 48, 3),
        (DataLoader(Rows(), batch_size=16, drop_last=True, shuffle=True), 60, 3),
        (DataLoader(Rows(), batch_size=16, sampler=SubsetRandomSampler(range(20))), 20, 2),
        ([(X[:10], Y[:10]), (X[10:17], Y[10:17])], 17, 2),
        (Rows(), 60, 4),
        ((X, Y), 60, 4),
    ],
)
def test_examples_are_counted(data, size, steps):
    source = make_source(data, "train", torch.float32)
    assert (source.size, source.steps) == (size, steps)
    assert len(list(source.ordered())) in (steps, 1)


@pytest.mark.slow
@pytest.mark.parametrize(
    "make",
    [
        Augmented,
        lambda: DataLoader(Augmented(), batch_size=16, shuffle=True),
        lambda: DataLoader(Augmented(), batch_size=16, shuffle=True, generator=torch.Generator().manual_seed(1)),
        stateful,
        lambda: stateful(generator=torch.Generator().manual_seed(1)),
    ],
    ids=["dataset", "loader", "generator", "stateful", "stateful generator"],
)
def test_a_resumed_fit_sees_the_same_data(make, tmp_path):
    torch.manual_seed(0)
    expected, _ = fitted(make(), folder=tmp_path / "whole")
    torch.manual_seed(0)
    data = make()
    with pytest.raises(KeyboardInterrupt):
        fitted(data, folder=tmp_path / "parts", callbacks=[Stop()])
    torch.manual_seed(7)  # what is random where a process begins anew
    random.seed(7)
    found, result = fitted(make(), folder=tmp_path / "parts", resume=True)
    assert len(result.history) == 5
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_what_cannot_be_resumed_is_said(tmp_path):
    class Batches:
        def __len__(self):
            return 2

        def __iter__(self):
            yield X[:30], Y[:30]
            yield X[30:], Y[30:]

    with pytest.warns(bmrs.FitWarning, match=r"the position of a Batches, which has no state_dict\(\)"):
        fitted(Batches(), folder=tmp_path)


def test_random_numbers_of_the_caller_are_left_alone():
    model, guide = build()
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()  # noqa: NPY002
    bmrs.fit(model, guide, DataLoader(Augmented(), batch_size=16, shuffle=True), Augmented(), **QUICK)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert (np.random.get_state()[1] == before[2]).all()  # noqa: NPY002


@pytest.mark.slow
def test_workers_load():
    _, result = fitted(DataLoader(Augmented(), batch_size=30, shuffle=True, num_workers=1), epochs=1)
    assert len(result.history) == 2


class Stream(IterableDataset):
    def __iter__(self):
        return iter([(X[0], Y[0])])


class Short:
    def __len__(self):
        return 3

    def __iter__(self):
        return iter([(X, Y)])


def broken(inputs=None, labels=None):
    x, y = X.clone(), Y.clone()
    x[-1, 2] = torch.nan if inputs is None else inputs
    y[-1] = Y[-1] if labels is None else labels
    return DataLoader(TensorDataset(x, y), batch_size=16)


@pytest.mark.parametrize(
    ("data", "settings", "error", "message"),
    [
        (iter([(X, Y)]), {}, TypeError, r"has no len\(\): define __len__"),
        (Stream(), {}, TypeError, "examples come one by one: put it into a DataLoader"),
        (DataLoader(Rows(), batch_size=16), {"batch_size": 8}, ValueError, "batch_size=8 has no meaning"),
        ({"x": X, "y": Y}, {}, TypeError, "mapping of 'x', 'y', without 'labels'"),
        (TensorDataset(X, X, Y), {}, TypeError, "must be a pair"),
        (Rows(), {"unpack": lambda batch: batch["x"]}, TypeError, "unpack must return a pair"),
        (Rows(), {"unpack": 3}, TypeError, "unpack must be"),
        (Rows(), {"unpack": lambda batch: batch["y"]}, ValueError, "unpack does not take a batch of train, a dict"),
        (Short(), {}, ValueError, "was to give 3 batches, but gave 1"),
        (broken(), {}, ValueError, "batch 3 of train has a NaN or infinite input in row 11"),
        (broken(0.0, 7), {}, ValueError, r"batch 3 of train has observation 7 in row 11, outside the 3 classes"),
        ([], {}, ValueError, "train is empty"),
        (list(zip(X, Y, strict=True)), {}, ValueError, "batch 0 of train .* stack single examples into one tensor"),
        ("data", {}, TypeError, "train must be a pair of tensors"),
        (((X, Y[:3]), Y), {}, ValueError, "one observation per input"),
        (({"x": X}, {"y": Y}), {}, TypeError, "must be a pair of tensors"),
    ],
)
def test_refusals(data, settings, error, message):
    with pytest.raises(error, match=message):
        fitted(data, **settings)


@pytest.mark.parametrize(
    "likelihood", [lambda out: out.nothing, lambda out: out[5, 5, 5], lambda out: out["logits"] @ X]
)
def test_a_likelihood_that_fails_is_named(likelihood):
    torch.manual_seed(0)
    model = bmrs.NoisyNetwork(Named(), likelihood)
    with pytest.raises(ValueError, match="the likelihood does not take what the network returns, a dict"):
        bmrs.fit(model, bmrs.TruncatedLogNormalGuide(model), ({"x": X}, Y), **QUICK)


def test_an_ensemble_takes_tensors_only():
    with pytest.raises(TypeError, match="train of an ensemble must be a pair of tensors"):
        bmrs.fit_ensemble(build, DataLoader(TensorDataset(X, Y)), seeds=(0, 1), epochs=1)
    with pytest.raises(ValueError, match="compile=True takes inputs of one tensor"):
        fitted(({"x": X}, Y), net=Named, compile=True)


def test_the_end_is_one_line(capsys):
    _, result = fitted((X, Y), (X, Y), progress=True)
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line == str(result)
    assert "% of the parameters removed" in line
    assert "validation accuracy" in line
    assert "lowest on class" in line
