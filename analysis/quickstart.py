"""From a dense network to a smaller one: python -m analysis.quickstart [--network mlp] [--seed 1]."""

import copy
import json
import math
import sys
import time
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Literal

import torch
import tyro
from torch import nn

import pyro_bmrs as bmrs
from analysis.data.sets import digits
from analysis.runs.dense import accuracy, outputs, train_dense
from analysis.runs.results import draw_figures, evaluate, format_table, save_run
from models import lenet5, mlp
from pyro_bmrs.io.files import prepare_run_folder, write_json
from pyro_bmrs.pipeline.comparison import paired_change
from pyro_bmrs.svi.devices import resolve_device

__all__ = ["Quickstart", "main"]

_KL_WEIGHTS = {"lenet5": 1.0, "mlp": 2.0}


@dataclass(frozen=True)
class Quickstart:
    """Prune a network on scikit-learn's digits with BMRS_N and write everything about it to a run folder."""

    network: Literal["lenet5", "mlp"] = "lenet5"
    """LeNet-5, or a tanh MLP with three hidden layers of 100."""
    seed: int = 0
    """Of initial weights, data order and noise."""
    epochs: int = 60
    """With noise; the KL warms up over the first quarter, and pruning starts after that."""
    fine_tune_epochs: int = 20
    """Without noise, every theta at its posterior mean."""
    batch_size: int = 64
    lr: float = 4e-3
    """Of the weights."""
    posterior_lr: float | None = None
    """Of the posterior's parameters; by default 50 times lr."""
    kl_weight: float | None = None
    """1 is Bayes; more removes more. By default 1 for LeNet-5 and 2 for the MLP, chosen on validation data."""
    prior_log_odds: float = math.log(3)
    """Of a structure being absent, before seeing data; log 3 removes what lacks positive evidence."""
    device: str = "auto"
    threads: int = 1
    """Of the CPU; these networks are too small to gain from more, and lose on a busy machine."""
    output: Path | None = None
    """Run folder; by default a new one under runs/, named after network, seed and time."""
    overwrite: bool = False
    """Whether what an earlier run has left in --output may be deleted."""
    resume: bool = False
    """Go on from the checkpoint in --output, if there is one; a finished run is only read."""
    shrink: bool = False
    """Cut removed structures out while training, so that later epochs get faster."""
    compile: bool = False
    """Compile training steps (on CUDA: capture them as a graph)."""
    progress: bool = True


def main(config: Quickstart) -> dict[str, object]:
    """Run the quickstart, print its table and return its results."""
    stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
    folder = config.output or Path("runs") / f"quickstart-{config.network}-seed{config.seed}-{stamp}"
    folder = prepare_run_folder(folder, config.overwrite, config.resume)
    if config.resume and (folder / "results.json").exists():
        results: dict[str, object] = json.loads((folder / "results.json").read_text(encoding="utf-8"))
        print(f"{folder} is finished, nothing to do:\n\n{format_table(results)}\n\n{_where(folder)}")
        return results
    kl_weight = _KL_WEIGHTS[config.network] if config.kl_weight is None else config.kl_weight
    config = replace(config, kl_weight=kl_weight)
    write_json(folder / "config.json", {**asdict(config), "output": str(folder)})
    torch.set_num_threads(config.threads)
    split = digits()
    started = time.perf_counter()
    print(
        f"{config.network} with noise on every neuron and filter, {len(split.train[0]):,} images of handwritten digits "
        f"(scikit-learn's):\n{config.epochs} epochs with noise, from which the model evidence says what the data need; "
        f"{config.fine_tune_epochs} without; then the\nsame network without pruning, to compare. Everything goes to "
        f"{folder}",
        flush=True,
    )
    torch.manual_seed(config.seed)
    net = _build(config.network, split.train[0])
    dense = copy.deepcopy(net)

    model = bmrs.NoisyNetwork(net, num_data=len(split.train[0]), kl_weight=kl_weight)
    guide = bmrs.TruncatedLogNormalGuide(model)
    result = bmrs.fit(
        model,
        guide,
        split.train,
        split.validation,
        criterion=bmrs.BMRS_N(prior_log_odds=config.prior_log_odds),
        pruning=bmrs.Continuous(shrink=config.shrink),
        epochs=config.epochs,
        fine_tune_epochs=config.fine_tune_epochs,
        batch_size=config.batch_size,
        lr=config.lr,
        posterior_lr=config.posterior_lr,
        device=config.device,
        seed=config.seed,
        progress=config.progress,
        compile=config.compile,
        folder=folder,
        resume=config.resume,
    )

    print(f"dense {config.network}, without noise, {config.epochs + config.fine_tune_epochs} epochs ...", flush=True)
    dense_started = time.perf_counter()
    device = resolve_device(config.device)
    train = (split.train[0].to(device), split.train[1].to(device))
    train_dense(
        dense.to(device), train, config.epochs + config.fine_tune_epochs, config.batch_size, config.lr, config.seed
    )
    dense_seconds = time.perf_counter() - dense_started

    pruned = bmrs.compact(model, guide, None, split.validation[0][:8])
    x, y = (part.to(device) for part in split.test)
    right = [(outputs(net.eval(), x).argmax(-1) == y).double().cpu() for net in (dense, pruned)]
    results = {
        "dataset": "digits",
        "network": config.network,
        "method": "BMRS_N",
        "seed": config.seed,
        "epochs": config.epochs + config.fine_tune_epochs,
        **evaluate(dense, model, guide, pruned, result.masks, split),
        "accuracy_test_dense": float(right[0].mean()),
        "accuracy_test_change": paired_change(*right),
        "seconds": result.seconds,
        "seconds_dense": dense_seconds,
    }
    free_form = bmrs.free_form_evidence(model, guide, split.train)
    save_run(folder, results, model, guide, pruned, free_form)
    x, y = (part.to(device) for part in split.validation)
    draw_figures(folder, model, guide, result.history, config.prior_log_odds, accuracy(outputs(dense, x), y), free_form)
    print(f"\n{format_table(results)}\n\n{_where(folder)}\n{time.perf_counter() - started:.0f} s in all")
    return results


def _where(folder: Path) -> str:
    """Return what a run leaves, and how to go on with it."""
    return (
        f"figures       {folder}/figures/*.png\n"
        f"the network   pyro_bmrs.load('{folder}/pruned')\n"
        f"its posterior arviz.from_netcdf('{folder}/posterior.nc')\n"
        f"all numbers   {folder}/results.json, and {folder}/metrics.jsonl by epoch"
    )


def _build(network: str, images: torch.Tensor) -> nn.Module:
    if network == "lenet5":
        return lenet5(in_channels=images.shape[1])
    return mlp(in_features=images[0].numel(), hidden=100, layers=3)


if __name__ == "__main__":
    try:
        main(tyro.cli(Quickstart))
    except (ValueError, OSError, FloatingPointError) as error:
        sys.exit(f"error: {error}")
