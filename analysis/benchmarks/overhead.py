"""What noise costs a training step: python -m analysis.benchmarks.overhead [--device cuda]."""

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
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import pyro_bmrs as bmrs
from analysis.common.command import command
from models import lenet5, mlp, resnet
from pyro_bmrs.io.files import write_json
from pyro_bmrs.svi.captured import CapturedStep
from pyro_bmrs.svi.compiled import CompiledStep
from pyro_bmrs.svi.devices import keep_freed_memory, resolve_device
from pyro_bmrs.svi.objective import NoisyObjective

__all__ = ["Overhead", "format_tables", "main"]

Work = Callable[[], object]

# With noise over without, of the reference implementation: tables 3 and 4 of the paper, batches of 32; its ResNet is
# ResNet-50, which has 50 sites too.
_PAPER = {
    "training": {"mlp": 8.3, "lenet5": 4.9, "resnet": 6.9},
    "inference": {"mlp": 1.56, "lenet5": 1.36, "resnet": 0.96},
}
_NUM_DATA = 50_000
_LR = 1e-4
_STEPS = 5  # in a row, which are timed together: in training, too, a step follows one of its kind


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
    """In each, every variant takes a few steps in a row."""
    fit_epochs: int = 10
    """Of digits, in batches of 32, before anything is timed: some structures are noise then, and others are in the
    tail. With 0, guides are fresh."""
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
    report["command"] = command("benchmarks.overhead")
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
        subprocess.run([sys.executable, "-m", "analysis.benchmarks.overhead", *arguments], env=environment, check=True)
        return json.loads((Path(folder) / "overhead.json").read_text(encoding="utf-8"))


def _measure_all(config: Overhead, device: torch.device) -> dict[str, Any]:
    torch.set_num_threads(config.threads[0] or os.cpu_count() or 1)
    keep_freed_memory(device)  # as a fit does
    results = []
    for network in config.networks:
        for batch_size in config.batch_sizes:
            print(f"{network}, batches of {batch_size}, {torch.get_num_threads()} threads ...", flush=True)
            model, guide, x, y = _problem(network, batch_size, config.fit_epochs, device)
            works, first_calls = _training(model, guide, x, y, config.compile)
            results.append(
                {
                    "network": network,
                    "batch_size": batch_size,
                    "threads": torch.get_num_threads(),
                    "first_call_seconds": first_calls,
                    "posterior": _regimes(guide),
                    "training": _time(works, config.rounds, device),
                    "inference": _time(_inference(model, guide, x), config.rounds, device),
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


def _problem(
    network: str, batch_size: int, fit_epochs: int, device: torch.device
) -> tuple[bmrs.NoisyNetwork, bmrs.TruncatedLogNormalGuide, Tensor, Tensor]:
    """Return a network and a guide, fitted to enlarged digits, and a batch of these."""
    torch.manual_seed(0)
    net = {"mlp": lambda: mlp(1024, 100, 8), "lenet5": lenet5, "resnet": resnet}[network]().to(device)
    model = bmrs.NoisyNetwork(net)
    guide = bmrs.TruncatedLogNormalGuide(model).to(device)
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32, device=device).unsqueeze(1) / 16
    x = nn.functional.interpolate(images, size=(32, 32), mode="bilinear")
    x, y = x.expand(-1, 3 if network == "resnet" else 1, -1, -1), torch.tensor(digits.target, device=device)
    if fit_epochs:
        settings: dict[str, Any] = {"epochs": fit_epochs, "fine_tune_epochs": 0, "batch_size": 32, "posterior_lr": 0.2}
        bmrs.fit(model, guide, (x, y), criterion=None, device=str(device), progress=False, **settings)
    model.num_data = _NUM_DATA
    return model, guide, x[:batch_size].contiguous(), y[:batch_size]


def _regimes(guide: bmrs.TruncatedLogNormalGuide) -> dict[str, float]:
    """Return which fractions of the structures are noise, and which have their location beyond a bound."""
    posterior = guide.flat_posterior()
    outside = (guide.loc > guide.log_high + 2 * posterior.scale) | (guide.loc < guide.log_low - 2 * posterior.scale)
    return {"noise": float((posterior.snr < 1).float().mean()), "beyond a bound": float(outside.float().mean())}


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


def _attached(
    model: bmrs.NoisyNetwork, guide: bmrs.TruncatedLogNormalGuide, x: Tensor
) -> tuple[bmrs.NoisyNetwork, bmrs.TruncatedLogNormalGuide]:
    """Return the network with noise attached from outside, on as many structures, where layers read them.

    Its guide has the posteriors of the other in their order.
    """
    plain = _plain(model.net)
    structures = bmrs.find_structures(plain, x[:2]).select(kinds="channel")
    attached = bmrs.NoisyNetwork(bmrs.attach_noise(plain, structures), num_data=_NUM_DATA)
    own = bmrs.TruncatedLogNormalGuide(attached).to(x.device)
    with torch.no_grad():
        for mine, given in ((own.loc, guide.loc), (own.log_scale, guide.log_scale)):
            mine.copy_(given.repeat(-(-len(mine) // len(given)))[: len(mine)])
    return attached, own


def _training(
    model: bmrs.NoisyNetwork, guide: bmrs.TruncatedLogNormalGuide, x: Tensor, y: Tensor, compiled: bool
) -> tuple[dict[str, Work], dict[str, float]]:
    """Return each variant's training step, on a network of its own, and the seconds of first calls that compile."""

    def objective(noisy: bool) -> nn.Module:
        if not noisy:
            return _PlainObjective(_plain(model.net))
        return NoisyObjective(*copy.deepcopy((model, guide)), bmrs.MeanFieldELBO())

    works = {"plain": _eager_step(objective(False), x, y), "ours": _eager_step(objective(True), x, y)}
    works["attached"] = _eager_step(NoisyObjective(*_attached(model, guide, x), bmrs.MeanFieldELBO()), x, y)
    works["SVI.step"] = _pyro_step(*copy.deepcopy((model, guide)), x, y)
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


def _pyro_step(model: bmrs.NoisyNetwork, guide: bmrs.TruncatedLogNormalGuide, x: Tensor, y: Tensor) -> Work:
    pyro.clear_param_store()
    svi = SVI(model, guide, pyro.optim.Adam({"lr": _LR}), TraceMeanField_ELBO())
    return lambda: svi.step(x, y)


def _inference(model: bmrs.NoisyNetwork, guide: bmrs.TruncatedLogNormalGuide, x: Tensor) -> dict[str, Work]:
    """Return forward passes: without noise, by ``predict``, and of the networks that ``compact`` returns.

    The first of these keeps every structure, the second half of them.
    """
    plain = _plain(model.net).eval()
    generator = torch.Generator().manual_seed(0)
    half = {site: torch.rand(size, generator=generator) < 0.5 for site, size in model.sizes.items()}
    whole = {site: torch.ones(size, dtype=torch.bool) for site, size in model.sizes.items()}
    compacted, small = (bmrs.compact(model, guide, masks, x[:2]).eval() for masks in (whole, half))
    return {
        "plain": torch.no_grad()(lambda: plain(x)),
        "predict": lambda: bmrs.predict(model, guide, x),
        "compacted": torch.no_grad()(lambda: compacted(x)),
        "compacted by half": torch.no_grad()(lambda: small(x)),
    }


def _time(works: dict[str, Work], rounds: int, device: torch.device) -> dict[str, dict[str, list[float]]]:
    """Return quartiles of each work's milliseconds, and of its ratios to the plain one's of the same round."""
    times: dict[str, list[float]] = {name: [] for name in works}
    for i in range(1 + rounds):
        for name, work in works.items():
            work()
            _synchronize(device)
            start = time.perf_counter()
            for _ in range(_STEPS):
                work()
            _synchronize(device)
            if i:  # in the first round all are warmed up, or captured
                times[name].append(1e3 * (time.perf_counter() - start) / _STEPS)
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
    fitted = report["config"]["fit_epochs"]
    guides = f"guides fitted for {fitted} epochs" if fitted else "fresh guides"
    where = f"{machine['device']}, {machine['processor']}, torch {report['versions']['torch']}, {report['date']}"
    lines = [f"{where}, {guides}"]
    for kind in ("training", "inference"):
        for threads in dict.fromkeys(result["threads"] for result in report["results"]):
            lines += ["", f"{kind}, ms a batch (ratio to plain; medians), {threads} threads", ""]
            lines += _table(kind, [result for result in report["results"] if result["threads"] == threads])
    return "\n".join(lines)


def _table(kind: str, results: list[dict[str, Any]]) -> list[str]:
    variants = list(results[0][kind])
    head = ["network", "batch", *variants, "reference implementation's ratio, published"]
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
