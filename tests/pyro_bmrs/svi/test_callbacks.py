import io
import json
import sys

import pytest
import torch
from lightning_fabric import Fabric
from lightning_fabric.loggers import CSVLogger, TensorBoardLogger
from nets import blobs, small_classifier
from processes import EveryThird

import pyro_bmrs as bmrs
from pyro_bmrs.svi.callbacks import JSONLines

QUICK = {"epochs": 4, "fine_tune_epochs": 2, "batch_size": 50, "lr": 1e-2, "seed": 0, "progress": False}


class Diary(bmrs.Callback):
    def __init__(self):
        self.heard = []

    def on_start(self, epochs, history):
        self.heard.append(("start", epochs, len(history)))

    def on_pruning(self, epoch, removed):
        self.heard.append(("pruning", epoch, removed))

    def on_epoch_end(self, record):
        self.heard.append(("epoch", record["epoch"]))
        record["noted"] = True

    def on_end(self, result):
        self.heard.append(("end", result))

    def close(self):
        self.heard.append("close")


def test_callbacks_hear_of_everything_in_order():
    diary = Diary()
    model, guide = small_classifier()
    pruning = bmrs.Continuous(start=2, every=2)
    result = bmrs.fit(model, guide, blobs(), criterion=EveryThird(), pruning=pruning, callbacks=[diary], **QUICK)
    epochs = [("epoch", i) for i in range(1, 7)]
    prunings = [("pruning", 2, {"2.theta": 6}), ("pruning", 4, {"2.theta": 0})]
    expected = [
        ("start", 6, 0),
        epochs[0],
        prunings[0],
        *epochs[1:3],
        prunings[1],
        *epochs[3:],
        ("end", result),
        "close",
    ]
    assert diary.heard == expected
    assert all(entry["noted"] for entry in result.history)


def test_post_training_pruning_is_heard_of():
    diary = Diary()
    model, guide = small_classifier()
    pruning = bmrs.PostTraining(levels=(0.25, 0.5))
    bmrs.fit(model, guide, blobs(), criterion=EveryThird(), pruning=pruning, callbacks=[diary], **QUICK)
    assert [heard for heard in diary.heard if heard[0] == "pruning"] == [
        ("pruning", 4, {"2.theta": 4}),
        ("pruning", 5, {"2.theta": 2}),
    ]


def test_callbacks_are_closed_where_a_fit_fails():
    diary = Diary()
    with pytest.raises(FloatingPointError):
        bmrs.fit(*small_classifier(), blobs(), callbacks=[diary], **{**QUICK, "lr": 1e30})
    assert diary.heard[-1] == "close"
    assert not any(heard[0] == "end" for heard in diary.heard)


def test_json_lines(tmp_path):
    result = bmrs.fit(*small_classifier(), blobs(), folder=tmp_path, **QUICK)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == result.history


def test_json_lines_survive_a_full_disk(tmp_path):
    lines = JSONLines(tmp_path / "metrics.jsonl")
    lines.on_start(2, [])
    (tmp_path / "metrics.jsonl").unlink()
    (tmp_path / "metrics.jsonl").mkdir()  # as good as full
    with pytest.warns(RuntimeWarning, match=r"metrics.jsonl cannot be written .*; the fit goes on"):
        lines.on_epoch_end({"epoch": 1})


def test_fabrics_loggers_get_the_numbers(tmp_path):
    pytest.importorskip("tensorboard")
    loggers = [TensorBoardLogger(tmp_path / "tensorboard"), CSVLogger(tmp_path / "csv", flush_logs_every_n_steps=1)]
    fabric = Fabric(accelerator="cpu", devices=1, loggers=loggers)
    result = bmrs.fit(*small_classifier(), blobs(), fabric=fabric, **QUICK)
    header, *rows = (tmp_path / "csv" / "lightning_logs" / "version_0" / "metrics.csv").read_text().splitlines()
    assert len(rows) == 6
    last = dict(zip(header.split(","), rows[-1].split(","), strict=True))
    assert float(last["loss"]) == pytest.approx(result.history[-1]["loss"])
    assert list((tmp_path / "tensorboard").rglob("events.out.tfevents.*"))


@pytest.mark.parametrize("terminal", [True, False])
def test_the_bar_shows_epochs_in_terminals_and_elsewhere(terminal, monkeypatch):
    stream = io.StringIO()
    stream.isatty = lambda: terminal
    monkeypatch.setattr(sys, "stderr", stream)
    x, y = blobs()
    bmrs.fit(*small_classifier(), (x, y), (x, y), **{**QUICK, "progress": True})
    shown = stream.getvalue()
    assert "6/6" in shown
    assert "removed=" in shown
    assert "accuracy=" in shown


@pytest.mark.slow
def test_energy_and_co2_are_estimated():
    torch.manual_seed(0)
    result = bmrs.fit(*small_classifier(), blobs(), callbacks=[bmrs.EnergyTracker("DEU")], **QUICK)
    energies = [entry["energy_kwh"] for entry in result.history]
    assert energies == sorted(energies)
    assert 0 < energies[-1] < 1
    assert result.history[-1]["co2_kg"] > 0


def test_the_energy_tracker_says_what_it_needs(monkeypatch):
    monkeypatch.setattr("pyro_bmrs.svi.callbacks.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install 'pyro-bmrs\[energy\]'"):
        bmrs.EnergyTracker()
