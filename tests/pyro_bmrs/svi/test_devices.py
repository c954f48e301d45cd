import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lightning_fabric import Fabric
from nets import blobs, small_classifier
from processes import LOADER_SETTINGS, SETTINGS, EveryThird, MedianGuide, build, data, loader, state
from safetensors.torch import load_file

import pyro_bmrs as bmrs

ROOT = Path(__file__).parents[3]
PROGRAM = str(ROOT / "tests" / "processes.py")
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def torchrun(name, folder):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, PROGRAM, name, str(folder)], env=ENVIRONMENT, capture_output=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr.decode()


@pytest.mark.slow
def test_two_processes_train_to_the_parameters_of_one_with_the_joint_batch(tmp_path):
    torchrun("two_ranks", tmp_path)
    model, guide = build(MedianGuide)
    bmrs.fit(model, guide, data(), criterion=EveryThird(), precision="64-true", **SETTINGS)
    expected = state(model, guide)
    for rank in (0, 1):
        found = load_file(tmp_path / f"rank{rank}.safetensors")
        for name, tensor in expected.items():
            torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-9, msg=name)
    assert [int(mask.sum()) for mask in model.masks.values()] == [10, 8]
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 9


@pytest.mark.exhaustive
def test_two_processes_divide_the_batches_of_a_loader(tmp_path):
    torchrun("two_loaders", tmp_path)
    model, guide = build(MedianGuide)
    bmrs.fit(model, guide, loader(), criterion=EveryThird(), precision="64-true", **LOADER_SETTINGS)
    for rank in (0, 1):
        found = load_file(tmp_path / f"rank{rank}.safetensors")
        torch.testing.assert_close(found, state(model, guide), rtol=0, atol=1e-9)


@pytest.mark.exhaustive
def test_loaders_that_divide_the_examples_themselves(tmp_path):
    torchrun("two_samplers", tmp_path)
    ranks = [load_file(tmp_path / f"rank{rank}.safetensors") for rank in (0, 1)]
    seen, before = (torch.cat([rank.pop(name) for rank in ranks]) for name in ("seen", "before"))
    assert sorted(seen.tolist()) == sorted(before.tolist()) == list(range(200))
    assert not torch.equal(seen, before)  # another order each epoch
    torch.testing.assert_close(*ranks, rtol=0, atol=0)


@pytest.mark.slow
def test_every_rank_draws_its_own_noise_and_ends_with_the_same_parameters(tmp_path):
    torchrun("two_noises", tmp_path)
    first, second = (load_file(tmp_path / f"noise{rank}.safetensors")["drawn"] for rank in (0, 1))
    assert first.shape == second.shape
    assert not (first == second).any()
    torch.testing.assert_close(*(load_file(tmp_path / f"rank{rank}.safetensors") for rank in (0, 1)), rtol=0, atol=0)


@pytest.mark.slow
def test_a_dead_rank_ends_the_run_with_an_error(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    launched = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "NODE_RANK": "0"}
    ranks = [
        subprocess.Popen(
            [sys.executable, PROGRAM, "one_dies", str(tmp_path)],
            env={**ENVIRONMENT, **launched, "LOCAL_RANK": str(rank)},
            stderr=subprocess.DEVNULL if rank else subprocess.PIPE,
        )
        for rank in (0, 1)
    ]
    _, error = ranks[0].communicate(timeout=240)
    assert ranks[1].wait(timeout=10) == -9
    assert ranks[0].returncode == 1
    assert b"Error" in error


def test_a_fabric_must_be_launched():
    model, guide = small_classifier()
    with pytest.raises(ValueError, match=r"call fabric.launch\(\) first"):
        bmrs.fit(model, guide, blobs(), fabric=Fabric(accelerator="cpu", devices=2, strategy="ddp"))


@pytest.mark.slow
def test_mixed_precision_keeps_the_posterior_in_float32():
    x, y = blobs()
    model, guide = small_classifier()
    dtypes = []
    model.net[0].register_forward_hook(lambda *arguments: dtypes.append(arguments[2].dtype))
    settings = {**SETTINGS, "epochs": 30}
    result = bmrs.fit(model, guide, (x, y), (x, y), precision="bf16-mixed", **settings)
    assert torch.bfloat16 in dtypes
    assert {p.dtype for p in (*model.parameters(), *guide.parameters())} == {torch.float32}
    assert result.history[-1]["accuracy_validation"] > 0.8


@pytest.mark.parametrize("precision", ["bf16-true", "16-true", "8"])
def test_precisions_too_low_for_a_posterior_are_refused(precision):
    model, guide = small_classifier()
    with pytest.raises(ValueError, match="precision must be one of 32-true"):
        bmrs.fit(model, guide, blobs(), precision=precision)


@pytest.mark.slow
def test_bytes_are_divided_by_255_when_used():
    x = torch.randint(0, 256, (200, 6), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    y = (x[:, 0] > 127).long()
    fits = []
    for inputs in (x, x.float() / 255):
        model, guide = small_classifier()
        bmrs.fit(model, guide, (inputs, y), (inputs, y), **SETTINGS)
        fits.append({**state(model, guide), "output": bmrs.predict(model, guide, inputs)})
    torch.testing.assert_close(*fits)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
def test_precisions_on_a_gpu(precision):
    x, y = blobs()
    model, guide = small_classifier()
    settings = {**SETTINGS, "epochs": 30}
    result = bmrs.fit(model, guide, (x, y), (x, y), device="cuda", precision=precision, **settings)
    assert result.history[-1]["accuracy_validation"] > 0.8
