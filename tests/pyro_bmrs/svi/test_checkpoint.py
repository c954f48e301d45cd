import multiprocessing
import os
import random
import signal
import stat
import time
import warnings

import pytest
import torch
from nets import blobs, small_classifier
from processes import EveryThird, Stop, fit_in_turns, state
from safetensors.torch import load_file, save_file

import pyro_bmrs as bmrs
from pyro_bmrs.svi.checkpoint import State, join, part, read_checkpoint, write_checkpoint

QUICK = {"epochs": 6, "fine_tune_epochs": 3, "batch_size": 50, "lr": 1e-2, "seed": 0, "progress": False}
FILE = "checkpoint/fit.safetensors"


@pytest.fixture(scope="module")
def forks():
    """Return a way to start processes that have everything imported already."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["processes"])
    return context


def run_until(forks, folder, seconds):
    process = forks.Process(target=fit_in_turns, args=(str(folder),))
    process.start()
    process.join(seconds)
    if process.exitcode is None:
        os.kill(process.pid, signal.SIGKILL)
        process.join()
    return process.exitcode


@pytest.mark.exhaustive
def test_a_run_killed_at_20_random_moments_ends_bit_identical(forks, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    whole.mkdir(), killed.mkdir()
    started = time.perf_counter()
    assert run_until(forks, whole, 120) == 0
    lasted = time.perf_counter() - started
    chance = random.Random(0)
    kills = 0
    while kills < 20:
        code = run_until(forks, killed, chance.uniform(0.02, 0.3) * lasted)
        if code == 0:  # it came through: once more from the start
            for file in (killed / FILE, killed / "end.safetensors"):
                file.unlink()
        else:
            assert code == -signal.SIGKILL
            kills += 1
    assert run_until(forks, killed, 120) == 0
    expected, found = (load_file(folder / "end.safetensors") for folder in (whole, killed))
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert not list(killed.rglob("*.partial"))
    assert len((killed / "metrics.jsonl").read_text().splitlines()) == 30


PRUNINGS = {
    "continuous": bmrs.Continuous(start=2),
    "shrinking": bmrs.Continuous(start=2, shrink=True),
    "post-training": bmrs.PostTraining(levels=(0.1, 0.2, 0.5), epochs_per_level=2),
}


@pytest.mark.slow
@pytest.mark.parametrize("pruning", PRUNINGS.values(), ids=PRUNINGS)
@pytest.mark.parametrize("epoch", [3, 4, 6, 9])
def test_an_interrupted_fit_resumes_to_the_same_end(pruning, epoch, tmp_path):
    x, y = blobs()
    ends = []
    for interrupted in (False, True):
        folder = tmp_path / str(interrupted)
        settings = {**QUICK, "criterion": EveryThird(), "pruning": pruning, "folder": folder, "checkpoint_every": 2}
        model, guide = small_classifier()
        if interrupted:
            with pytest.raises(KeyboardInterrupt):
                bmrs.fit(model, guide, (x, y), (x, y), callbacks=[Stop(epoch)], **settings)
            model, guide = small_classifier(seed=1)
        result = bmrs.fit(model, guide, (x, y), (x, y), resume=interrupted, **settings)
        history = [{name: value for name, value in entry.items() if name != "seconds"} for entry in result.history]
        ends.append((state(model, guide), result.masks, result.scores, history))
    torch.testing.assert_close(*(end[:3] for end in ends), rtol=0, atol=0)
    assert ends[0][3] == ends[1][3]


def test_resuming_a_finished_fit_does_nothing(tmp_path):
    x, y = blobs()
    model, guide = small_classifier()
    first = bmrs.fit(model, guide, (x, y), folder=tmp_path, **QUICK)
    written = (tmp_path / FILE).stat().st_mtime_ns
    again, posterior = small_classifier(seed=1)
    second = bmrs.fit(again, posterior, (x, y), folder=tmp_path, resume=True, callbacks=[Stop(1)], **QUICK)
    assert first.history == second.history
    torch.testing.assert_close(state(model, guide), state(again, posterior), rtol=0, atol=0)
    assert (tmp_path / FILE).stat().st_mtime_ns == written


def test_resuming_needs_a_folder():
    with pytest.raises(ValueError, match="needs the folder whose checkpoint"):
        bmrs.fit(*small_classifier(), blobs(), resume=True, **QUICK)


def test_a_checkpoint_is_never_overwritten_by_another_fit(tmp_path):
    x, y = blobs()
    bmrs.fit(*small_classifier(), (x, y), folder=tmp_path, **QUICK)
    with pytest.raises(FileExistsError, match="go on from it with resume=True, or choose another folder"):
        bmrs.fit(*small_classifier(), (x, y), folder=tmp_path, **QUICK)
    with pytest.raises(ValueError, match="of a fit with other settings: batch_size was 50, is 40"):
        bmrs.fit(*small_classifier(), (x, y), folder=tmp_path, resume=True, **{**QUICK, "batch_size": 40})


class FullDisk(bmrs.Callback):
    """Has no room left on the disk after some epoch."""

    def __init__(self, epoch, monkeypatch):
        self.epoch, self.monkeypatch = epoch, monkeypatch

    def on_epoch_end(self, record):
        if record["epoch"] == self.epoch:

            def save_file(tensors, path, metadata):
                path.write_bytes(b"half a file")
                raise OSError(28, "No space left on device")

            self.monkeypatch.setattr("pyro_bmrs.svi.checkpoint.save_file", save_file)


def test_a_full_disk_costs_checkpoints_and_not_the_run(tmp_path, monkeypatch):
    x, y = blobs()
    with pytest.warns(RuntimeWarning, match=r"No space left.*the last good one, .*, is left; the fit goes on"):
        result = bmrs.fit(*small_classifier(), (x, y), folder=tmp_path, callbacks=[FullDisk(4, monkeypatch)], **QUICK)
    assert len(result.history) == 9
    assert len(part(read_checkpoint(tmp_path / FILE), "history").info["entries"]) == 3
    assert not list(tmp_path.rglob("*.partial"))


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is unwritable for root")
def test_an_unwritable_folder_is_refused_before_training(tmp_path):
    tmp_path.chmod(stat.S_IRUSR | stat.S_IXUSR)
    with pytest.raises(OSError, match="Permission denied"):
        bmrs.fit(*small_classifier(), blobs(), folder=tmp_path, **QUICK)


def test_a_folder_that_is_a_file_is_refused_before_training(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        bmrs.fit(*small_classifier(), blobs(), folder=tmp_path / "file", callbacks=[Stop(1)], **QUICK)


def test_states_are_joined_and_parted(tmp_path):
    states = {"a": State({"x": torch.arange(3)}, {"n": 1}), "ab": State({"x": torch.rand(2, 2)}, {"text": "é"})}
    write_checkpoint(tmp_path / "state", join(states))
    read = read_checkpoint(tmp_path / "state")
    for name, expected in states.items():
        torch.testing.assert_close(part(read, name).tensors, expected.tensors)
        assert part(read, name).info == expected.info


def test_files_that_are_no_checkpoints_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no checkpoint"):
        read_checkpoint(tmp_path / "none")
    (tmp_path / "text").write_text("hello")
    with pytest.raises(ValueError, match="is no checkpoint"):
        read_checkpoint(tmp_path / "text")
    save_file({"x": torch.zeros(1)}, tmp_path / "other")
    with pytest.raises(ValueError, match="no checkpoint of this version"):
        read_checkpoint(tmp_path / "other")


def test_a_run_that_fails_names_the_last_good_checkpoint(tmp_path):
    x, y = blobs()
    model, guide = small_classifier()

    class Break(bmrs.Callback):
        def on_epoch_end(self, record):
            if record["epoch"] == 3:
                model.net[0].weight.data[0, 0] = float("nan")

    with (
        pytest.raises(FloatingPointError, match=r"fit.safetensors, is of the end of epoch 2"),
        warnings.catch_warnings(),
    ):
        bmrs.fit(model, guide, (x, y), folder=tmp_path, checkpoint_every=2, callbacks=[Break()], **QUICK)
