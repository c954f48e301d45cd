"""Fits of networks whose filters lie channels last: fused optimisers walk through memory, and must find it alike."""

import pytest
import torch
from processes import EveryThird
from torch import nn

import pyro_bmrs as bmrs

SETTINGS = {"batch_size": 16, "lr": 1e-2, "seed": 0, "progress": False, "precision": "64-true"}


def program(channels_last):
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(2, 6, 3),
        nn.ReLU(),
        bmrs.MultiplicativeNoise(6),
        nn.Conv2d(6, 9, 3),
        nn.ReLU(),
        bmrs.MultiplicativeNoise(9),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(9, 3),
    ).double()
    if channels_last:
        net = net.to(memory_format=torch.channels_last)
    model = bmrs.NoisyNetwork(net, num_data=48)
    return model, bmrs.TruncatedLogNormalGuide(model)


def images():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(48, 2, 8, 8, generator=generator, dtype=torch.float64), torch.arange(48) % 3


def ends(model, guide):
    return [parameter.detach() for parameter in (*model.parameters(), *guide.parameters())]


class Stop(bmrs.Callback):
    def on_epoch_end(self, record):
        if record["epoch"] == 4:
            raise KeyboardInterrupt


@pytest.mark.parametrize("shrink", [False, True])
def test_a_fit_ends_the_same_in_either_layout(shrink):
    found = []
    for channels_last in (False, True):
        model, guide = program(channels_last)
        pruning = bmrs.Continuous(start=2, stop=3, shrink=shrink)
        bmrs.fit(model, guide, images(), criterion=EveryThird(), pruning=pruning, epochs=5, **SETTINGS)
        found.append(ends(model, guide))
    torch.testing.assert_close(*found, rtol=1e-8, atol=1e-10)
    assert model.net[3].weight.is_contiguous(memory_format=torch.channels_last)
    assert not model.net[3].weight.is_contiguous()


@pytest.mark.slow
def test_an_interrupted_fit_resumes_to_the_same_end(tmp_path):
    whole, resumed = program(True), program(True)
    bmrs.fit(*whole, images(), epochs=6, folder=tmp_path / "whole", **SETTINGS)
    with pytest.raises(KeyboardInterrupt):
        bmrs.fit(*program(True), images(), epochs=6, folder=tmp_path / "resumed", callbacks=[Stop()], **SETTINGS)
    bmrs.fit(*resumed, images(), epochs=6, folder=tmp_path / "resumed", resume=True, **SETTINGS)
    torch.testing.assert_close(ends(*resumed), ends(*whole), rtol=0, atol=0)


@pytest.mark.exhaustive
def test_a_compiled_fit_ends_like_an_eager_one():
    found = []
    for compiled in (False, True):
        model, guide = program(True)
        bmrs.fit(model, guide, images(), epochs=2, compile=compiled, **SETTINGS)
        found.append(ends(model, guide))
    torch.testing.assert_close(*found, rtol=1e-6, atol=1e-8)
