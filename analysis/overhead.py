"""What noise costs a training step: python -m analysis.overhead [--device cuda] [--networks lenet5] [--threads 1]."""

import copy
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import pyro
import torch
import tyro
from pyro.infer import SVI, TraceMeanField_ELBO
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import pyro_bmrs as bmrs
from models import lenet5, mlp, resnet
from pyro_bmrs.io.files import write_json
from pyro_bmrs.svi.captured import CapturedStep
from pyro_bmrs.svi.compiled import CompiledStep
from pyro_bmrs.svi.devices import keep_freed_memory, resolve_device
from pyro_bmrs.svi.objective import NoisyObjective

__all__ = ["Overhead", "format_tables", "main"]

Work = Callable[[], object]

# With noise over without: tables 3 and 4 of the paper, batches of 32; its ResNet is ResNet-50, which has 50 sites too.
_PAPER = {
    "training": {"mlp": 8.3, "lenet5": 4.9, "resnet": 6.9},
    "inference": {"mlp": 1.56, "lenet5": 1.36, "resnet": 0.96},
}
_NUM_DATA = 50_000
_LR = 1e-4


@dataclass(frozen=True)
class Overhead:
    """Time one training step, and inference, of the same network with noise and without, in interleaved rounds.

    With several thread counts each is measured in a process of its own.
    """

    networks: tuple[Literal["mlp", "lenet5", "resnet"], ...] = ("mlp", "lenet5", "resnet")
    """A tanh MLP of 8 layers of 100, LeNet-5 for one channel, a bottleneck ResNet with 50 noise sites; 32x32 images."""
    batch_sizes: tuple[int, ...] = (32, 128)
    threads: tuple[int, ...] = (1, 0)
    """Of the CPU; 0 stands for all of them. On a GPU the first only."""
    rounds: int = 30
    """In each, every variant takes one step."""
    device: str = "auto"
    compile: bool = True
    """Whether to time compiled steps, which takes minutes for the compiler alone."""
    output: Path = Path("analysis/results/overhead")
    """Folder of overhead.json and overhead.md, which are replaced."""


def main(config: Overhead) -> dict[str, Any]:
    """Measure, print the tables, write them and all figures to the output folder, and return the figures."""
    device = resolve_device(config.device)
    threads = config.threads[:1] if device.type == "cuda" else config.threads
    if len(threads) == 1:
        report = _measure_all(replace(config, threads=threads), device)
    else:
        reports = [_in_a_process(replace(config, threads=(each,))) for each in threads]
        report = {**reports[0], "results": [result for each in reports for result in each["results"]]}
    report = json.loads(json.dumps(report))  # as whoever reads the file will see it
    report["config"] |= {"threads": list(config.threads), "output": str(config.output)}
    report["command"] = f"python -m analysis.overhead {' '.join(sys.argv[1:])}".strip()
    config.output.mkdir(parents=True, exist_ok=True)
    write_json(config.output / "overhead.json", report)
    tables = format_tables(report)
    (config.output / "overhead.md").write_text(tables + "\n", encoding="utf-8")
    print(f"\n{tables}\n\nwritten to {config.output}")
    return report


def _in_a_process(config: Overhead) -> dict[str, Any]:
    """Measure with one thread count: libraries fix their number of threads when they start."""
    count = config.threads[0]
    environment = {**os.environ, **({"OMP_NUM_THREADS": str(count)} if count else {})}
    if not count:
        environment.pop("OMP_NUM_THREADS", None)
    with tempfile.TemporaryDirectory() as folder:
        arguments = ["--networks", *config.networks, "--batch-sizes", *map(str, config.batch_sizes)]
        arguments += ["--threads", str(count), "--rounds", str(config.rounds), "--device", config.device]
        arguments += ["--compile" if config.compile else "--no-compile", "--output", folder]
        subprocess.run([sys.executable, "-m", "analysis.overhead", *arguments], env=environment, check=True)
        return json.loads((Path(folder) / "overhead.json").read_text(encoding="utf-8"))


def _measure_all(config: Overhead, device: torch.device) -> dict[str, Any]:
    torch.set_num_threads(config.threads[0] or os.cpu_count() or 1)
    keep_freed_memory(device)  # as a fit does
    results = []
    for network in config.networks:
        for batch_size in config.batch_sizes:
            print(f"{network}, batches of {batch_size}, {torch.get_num_threads()} threads ...", flush=True)
            net, x, y = _problem(network, batch_size, device)
            works, first_calls = _training(net, x, y, config.compile)
            results.append(
                {
                    "network": network,
                    "batch_size": batch_size,
                    "threads": torch.get_num_threads(),
                    "first_call_seconds": first_calls,
                    "training": _time(works, config.rounds, device),
                    "inference": _time(_inference(net, x), config.rounds, device),
                }
            )
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "config": {**asdict(config), "device": str(device), "output": str(config.output)},
        "machine": {
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
            "processor": platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
        },
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in ("torch", "pyro-ppl", "pyro-bmrs")},
        "results": results,
    }


def _problem(network: str, batch_size: int, device: torch.device) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    net = {"mlp": lambda: mlp(1024, 100, 8), "lenet5": lenet5, "resnet": resnet}[network]().to(device)
    x = torch.randn(batch_size, 3 if network == "resnet" else 1, 32, 32, device=device)
    return net, x, torch.randint(10, (batch_size,), device=device)


def _plain(net: nn.Module) -> nn.Module:
    """Return a copy of the network without its noise layers."""
    net = copy.deepcopy(net)
    for name, module in list(net.named_modules()):
        if isinstance(module, bmrs.MultiplicativeNoise):
            net.set_submodule(name, nn.Identity())
    return net


class _PlainObjective(nn.Module):
    """What is minimised without noise, called like an objective with it."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor, y: Tensor, kl_weight: Tensor | float, share: Tensor | float = 1.0) -> Tensor:
        return cross_entropy(self.net(x), y)


def _noisy(net: nn.Module) -> tuple[bmrs.NoisyNetwork, bmrs.TruncatedLogNormalGuide]:
    model = bmrs.NoisyNetwork(copy.deepcopy(net), num_data=_NUM_DATA)
    return model, bmrs.TruncatedLogNormalGuide(model).to(next(net.parameters()).device)


def _attached(net: nn.Module, x: Tensor) -> tuple[bmrs.NoisyNetwork, bmrs.TruncatedLogNormalGuide]:
    """Return the network with noise attached from outside, on as many structures, where layers read them."""
    plain = _plain(net)
    structures = bmrs.find_structures(plain, x[:2]).select(kinds="channel")
    model = bmrs.NoisyNetwork(bmrs.attach_noise(plain, structures), num_data=_NUM_DATA)
    return model, bmrs.TruncatedLogNormalGuide(model).to(x.device)


def _training(net: nn.Module, x: Tensor, y: Tensor, compiled: bool) -> tuple[dict[str, Work], dict[str, float]]:
    """Return each variant's training step, on a network of its own, and the seconds of first calls that compile."""

    def objective(noisy: bool) -> nn.Module:
        return NoisyObjective(*_noisy(net), bmrs.MeanFieldELBO()) if noisy else _PlainObjective(_plain(net))

    works = {"plain": _eager_step(objective(False), x, y), "ours": _eager_step(objective(True), x, y)}
    works["attached"] = _eager_step(NoisyObjective(*_attached(net, x), bmrs.MeanFieldELBO()), x, y)
    works["SVI.step"] = _pyro_step(net, x, y)
    slow: dict[str, Work] = {}
    for name, noisy in (("plain", False), ("ours", True)):
        if compiled:
            slow[f"{name}, compiled"] = _compiled_step(objective(noisy), x, y)
        if x.is_cuda:
            slow[f"{name}, captured"] = _captured_step(objective(noisy), x, y)
    first_calls = {}
    for name, work in slow.items():
        start = time.perf_counter()
        work()
        first_calls[name] = time.perf_counter() - start
    return works | slow, first_calls


def _eager_step(objective: nn.Module, x: Tensor, y: Tensor) -> Work:
    optimizer = torch.optim.Adam(objective.parameters(), _LR, fused=True)

    def step() -> None:
        optimizer.zero_grad()
        with pyro.validation_enabled(False):
            objective(x, y, 1.0).backward()
        optimizer.step()

    return step


def _compiled_step(objective: nn.Module, x: Tensor, y: Tensor) -> Work:
    optimizer = torch.optim.Adam(objective.parameters(), _LR, fused=True)
    loss_and_gradients = CompiledStep(objective)

    def step() -> None:
        optimizer.zero_grad()
        loss_and_gradients(x, y, 1.0)
        optimizer.step()

    return step


def _captured_step(objective: nn.Module, x: Tensor, y: Tensor) -> Work:
    rate = torch.tensor(_LR, device=x.device)
    optimizer = torch.optim.Adam(objective.parameters(), rate, fused=True, capturable=True)
    step = CapturedStep(objective, optimizer)
    return lambda: step(x, y, 1.0)


def _pyro_step(net: nn.Module, x: Tensor, y: Tensor) -> Work:
    pyro.clear_param_store()
    model, guide = _noisy(net)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": _LR}), TraceMeanField_ELBO())
    return lambda: svi.step(x, y)


def _inference(net: nn.Module, x: Tensor) -> dict[str, Work]:
    """Return the forward passes: dense and plain, dense with noise, and plain after half of the structures are gone."""
    plain = _plain(net).eval()
    model, guide = _noisy(net)
    generator = torch.Generator().manual_seed(0)
    masks = {site: torch.rand(size, generator=generator) < 0.5 for site, size in model.sizes.items()}
    small = bmrs.compact(model, guide, masks, x[:2]).eval()
    return {
        "plain": torch.no_grad()(lambda: plain(x)),
        "with noise layers": lambda: bmrs.predict(model, guide, x),
        "pruned by half": torch.no_grad()(lambda: small(x)),
    }


def _time(works: dict[str, Work], rounds: int, device: torch.device) -> dict[str, dict[str, list[float]]]:
    """Return quartiles of each work's milliseconds, and of its ratios to the plain one's of the same round."""
    times: dict[str, list[float]] = {name: [] for name in works}
    for i in range(5 + rounds):
        for name, work in works.items():
            _synchronize(device)
            start = time.perf_counter()
            work()
            _synchronize(device)
            if i >= 5:  # the first ones warm up, or are captured
                times[name].append(1e3 * (time.perf_counter() - start))
    return {
        name: {
            "ms": _quartiles(values),
            "ratio": _quartiles([a / b for a, b in zip(values, times["plain"], strict=True)]),
        }
        for name, values in times.items()
    }


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _quartiles(values: Sequence[float]) -> list[float]:
    return statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3


def format_tables(report: dict[str, Any]) -> str:
    """Return a Markdown table for each kind of work and number of threads, shaped like the paper's tables 3 and 4."""
    machine = report["machine"]
    lines = [f"{machine['device']}, {machine['processor']}, torch {report['versions']['torch']}, {report['date']}"]
    for kind in ("training", "inference"):
        for threads in dict.fromkeys(result["threads"] for result in report["results"]):
            lines += ["", f"{kind}, ms a batch (ratio to plain; medians), {threads} threads", ""]
            lines += _table(kind, [result for result in report["results"] if result["threads"] == threads])
    return "\n".join(lines)


def _table(kind: str, results: list[dict[str, Any]]) -> list[str]:
    variants = list(results[0][kind])
    head = ["network", "batch", *variants, "the paper's ratio"]
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for result in results:
        cells = [result["network"], str(result["batch_size"])]
        cells += [f"{each['ms'][1]:.2f} ({each['ratio'][1]:.2f})" for each in result[kind].values()]
        lines.append(f"| {' | '.join(cells)} | {_PAPER[kind][result['network']]} |")
    return lines


if __name__ == "__main__":
    try:
        main(tyro.cli(Overhead))
    except (ValueError, OSError, subprocess.CalledProcessError) as error:
        sys.exit(f"error: {error}")
