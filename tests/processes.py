"""Programs that the tests run in processes of their own: python processes.py NAME FOLDER."""

import os
import signal
import sys
import time
from pathlib import Path

import torch
from lightning_fabric import Fabric
from nets import blobs
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import pyro_bmrs as bmrs

SETTINGS = {"epochs": 6, "fine_tune_epochs": 3, "batch_size": 51, "lr": 1e-2, "seed": 3, "progress": False}
LOADER_SETTINGS = {name: value for name, value in SETTINGS.items() if name != "batch_size"}


class EveryThird(bmrs.Criterion):
    """Removes every third structure of a site."""

    def scores(self, context):
        return {site: 0.5 - torch.arange(size) % 3 for site, size in context.model.sizes.items()}


class MedianGuide(bmrs.TruncatedLogNormalGuide):
    """Draws the median every time, so that fits can be compared."""

    def draw(self, sample_shape=()):
        median = self.family().icdf(torch.tensor(0.5))
        return self.split(median.expand(*sample_shape, -1))


class Slow(bmrs.Callback):
    """Makes epochs last long enough to be interrupted at any moment of theirs."""

    def on_epoch_end(self, record):
        time.sleep(0.02)


class Stop(bmrs.Callback):
    """Interrupts a fit at the end of an epoch."""

    def __init__(self, epoch):
        self.epoch = epoch

    def on_epoch_end(self, record):
        if record["epoch"] == self.epoch:
            raise KeyboardInterrupt


def build(guide=bmrs.TruncatedLogNormalGuide, dtype=torch.float64):
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(6, 16),
        nn.ReLU(),
        bmrs.MultiplicativeNoise(16),
        nn.Linear(16, 12),
        nn.Tanh(),
        bmrs.MultiplicativeNoise(12),
        nn.Linear(12, 3),
    )
    model = bmrs.NoisyNetwork(net).to(dtype)
    return model, guide(model).to(dtype)


def state(model, guide):
    """Return everything that two equal fits have in common."""
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    return {**tensors, **{f"guide.{name}": tensor for name, tensor in guide.state_dict().items()}}


def data(dtype=torch.float64):
    x, y = blobs(200)
    return x.to(dtype), y


def loader():
    return DataLoader(TensorDataset(*data()), batch_size=51, shuffle=True)


def fit_in_turns(folder, **changes):
    """Fit, from the checkpoint in ``folder`` on if there is one, and write down what came out."""
    model, guide = build(dtype=torch.float32)
    settings = {**SETTINGS, "epochs": 24, "fine_tune_epochs": 6, **changes}
    result = bmrs.fit(model, guide, data(torch.float32), callbacks=[Slow()], folder=folder, resume=True, **settings)
    scores = {f"score.{site}": score for site, score in result.scores.items()}
    save_file({**state(model, guide), **scores}, Path(folder) / "end.safetensors")


def resumed(folder, fabric=None, **changes):
    """Fit, from the checkpoint in ``folder`` on if there is one; note when it begins, how long it takes and its end."""
    folder = Path(folder)
    model, guide = build(dtype=torch.float32)
    settings = {**SETTINGS, "epochs": 24, "fine_tune_epochs": 6, "criterion": EveryThird(), **changes}
    (folder / "begun").touch()
    started = time.perf_counter()
    result = bmrs.fit(
        model, guide, data(torch.float32), callbacks=[Slow()], folder=folder, resume=True, fabric=fabric, **settings
    )
    if fabric is None or fabric.is_global_zero:
        scores = {f"score.{site}": score for site, score in result.scores.items()}
        save_file({**state(model, guide), **scores}, folder / "end.safetensors")
        (folder / "seconds").write_text(str(time.perf_counter() - started))


def resumed_plain(folder):
    resumed(folder)


def resumed_shrink(folder):
    resumed(folder, pruning=bmrs.Continuous(start=3, every=4, shrink=True))


def resumed_post_training(folder):
    levels = bmrs.PostTraining(levels=(0.1, 0.2, 0.3), epochs_per_level=2)
    resumed(folder, epochs=18, pruning=levels)


def resumed_two_processes(folder):
    fabric = Fabric(accelerator="cpu", devices=2, strategy="ddp")
    fabric.launch()
    resumed(folder, fabric)


def two_ranks(folder, guide=MedianGuide):
    """Fit in as many processes as were launched."""
    fabric = Fabric(accelerator="cpu", devices=2, strategy="ddp", precision="64-true")
    fabric.launch()
    model, guide = build(guide)
    bmrs.fit(model, guide, data(), criterion=EveryThird(), fabric=fabric, folder=folder, **SETTINGS)
    save_file(state(model, guide), Path(folder) / f"rank{fabric.global_rank}.safetensors")


def two_noises(folder):
    """Write down what each rank draws."""

    class Noted(bmrs.TruncatedLogNormalGuide):
        def draw_shared(self, examples):
            values = super().draw_shared(examples)
            drawn.append(values["2.theta"].detach().flatten()[:50])
            return values

    drawn = []
    two_ranks(folder, Noted)
    save_file({"drawn": torch.stack(drawn)}, Path(folder) / f"noise{os.environ['RANK']}.safetensors")


def two_loaders(folder):
    """Fit in two processes to a DataLoader, whose batches they divide."""
    fabric = Fabric(accelerator="cpu", devices=2, strategy="ddp", precision="64-true")
    fabric.launch()
    model, guide = build(MedianGuide)
    bmrs.fit(model, guide, loader(), criterion=EveryThird(), fabric=fabric, **LOADER_SETTINGS)
    save_file(state(model, guide), Path(folder) / f"rank{fabric.global_rank}.safetensors")


def two_samplers(folder):
    """Fit in two processes to loaders that have divided the examples themselves; note which each of them saw."""
    fabric = Fabric(accelerator="cpu", devices=2, strategy="ddp", precision="64-true")
    fabric.launch()
    seen = []

    class Noted(TensorDataset):
        def __getitem__(self, i):
            seen.append(i)
            return super().__getitem__(i)

    rows = Noted(*data())
    sampler = DistributedSampler(rows, num_replicas=2, rank=fabric.global_rank)
    model, guide = build(MedianGuide)
    loader = DataLoader(rows, batch_size=25, sampler=sampler)
    bmrs.fit(model, guide, loader, data(), fabric=fabric, **LOADER_SETTINGS)
    last = {"seen": torch.tensor(seen[-100:]), "before": torch.tensor(seen[-200:-100])}
    save_file({**state(model, guide), **last}, Path(folder) / f"rank{fabric.global_rank}.safetensors")


def one_dies(folder):
    """Have the second rank die in the middle of an epoch."""

    class Mortal(MedianGuide):
        def draw(self, sample_shape=()):
            drawn.append(1)
            if os.environ["LOCAL_RANK"] == "1" and len(drawn) == 10:
                os.kill(os.getpid(), signal.SIGKILL)
            return super().draw(sample_shape)

    drawn = []
    two_ranks(folder, Mortal)


if __name__ == "__main__":
    torch.set_num_threads(1)
    globals()[sys.argv[1]](sys.argv[2])
    if torch.distributed.is_initialized():  # gloo's threads may abort a process that ends without this
        torch.distributed.destroy_process_group()
