"""One run of the study: from a configuration to its results."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from torch import Tensor, nn

import pyro_bmrs as bmrs
from analysis.best_epoch import BestEpoch
from analysis.config import METHODS, PEERS, RunConfig
from analysis.data import Split, digits, load
from analysis.dense import accuracy, train_dense
from analysis.peer_runs import execute_peer
from analysis.rank_correlation import spearman
from analysis.recipes import criterion
from analysis.reference_count import reference_compression
from analysis.run import compare, evaluate
from models import lenet5, lenet5_caffe, mlp
from pyro_bmrs.data import to_input
from pyro_bmrs.devices import resolve_device

__all__ = ["Execution", "epochs_done", "epochs_planned", "execute", "is_running", "work_folder"]

_LOCK = "lock"
_LEVELS = bmrs.PostTraining().levels
_OF_POSTERIORS = ("E[theta]", "SNR", "BMRS_")  # criteria that see nothing else, least of all weights


@dataclass(frozen=True)
class Execution:
    """How a run is executed, none of which changes what it comes to by more than rounding.

    Attributes:
        work: Folder of checkpoints, one folder a run; workers on several machines share it.
        data_dir: See ``analysis.data.load``.
        device: ``"auto"`` takes CUDA if there is a device.
        threads: Of the CPU, for one run.
        compile: Whether to compile training steps (on CUDA: to capture them), instead of shrinking while training.
        checkpoint_every: Epochs between checkpoints.
    """

    work: Path
    data_dir: Path | None = None
    device: str = "auto"
    threads: int = 1
    compile: bool = False
    checkpoint_every: int = 1


def work_folder(config: RunConfig, execution: Execution) -> Path:
    """Return the folder of one run's checkpoints, which need not exist."""
    return execution.work / config.id


def execute(config: RunConfig, execution: Execution) -> dict[str, Any]:
    """Carry out a run, or what is left of it, and return its results.

    Two calls for the same run, in whatever processes, wait for each other.
    """
    torch.set_num_threads(execution.threads)
    folder = work_folder(config, execution)
    with _only_here(folder):
        sessions = _note_session(config, execution)
        split = _on_device(_load(config, execution), resolve_device(execution.device))
        torch.manual_seed(config.seed)
        net: Any = _build(config, split.train[0])
        # On a CPU convolutions of few channels take up to 1.5 times as long in the other layout.
        net.to(memory_format=torch.channels_last)
        if config.method == "none":
            results = _dense(config, execution, net, split, folder)
        elif config.method in PEERS:
            results = execute_peer(config, net, split)
        elif config.pruning == "continuous":
            results = _continuous(config, execution, net, split, folder)
        else:
            results = _post_training(config, execution, net, split, folder)
    return {
        "dataset": config.dataset,
        "network": config.network,
        "method": config.method,
        "seed": config.seed,
        "epochs": config.epochs + config.fine_tune_epochs,
        **results,
        "sessions": sessions,
    }


@contextmanager
def _only_here(folder: Path) -> Iterator[None]:
    """Hold a lock that goes with the process, so that no two runs write the same checkpoint."""
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / _LOCK):
        yield


def _note_session(config: RunConfig, execution: Execution) -> list[int]:
    """Return how many epochs had been done at the start of each session of a run, this one the last."""
    path = work_folder(config, execution) / "sessions"
    with path.open("a", encoding="utf-8") as file:
        file.write(f"{epochs_done(config, execution)}\n")
    return [int(line) for line in path.read_text(encoding="utf-8").split()]


def _load(config: RunConfig, execution: Execution) -> Split:
    if config.dataset == "digits":
        split = digits(config.image_size)
    else:
        split = load(config.dataset, execution.data_dir, size=config.image_size)
    return split if config.pixels == (0.0, 1.0) else _with_pixels(split, *config.pixels)


def _with_pixels(split: Split, black: float, white: float) -> Split:
    parts = ((to_input(x) * (white - black) + black, y) for x, y in (split.train, split.validation, split.test))
    return Split(*parts)


def _on_device(split: Split, device: torch.device) -> Split:
    parts = ((x.to(device), y.to(device)) for x, y in (split.train, split.validation, split.test))
    return Split(*parts)


def _build(config: RunConfig, images: Tensor) -> nn.Module:
    channels = images.shape[1]
    if config.network == "lenet5":
        return lenet5(channels, noise_before_pool=config.noise_before_pool)
    if config.network == "lenet5_caffe":
        return lenet5_caffe(channels)
    return mlp(images[0].numel(), config.hidden, config.layers, input_noise=config.network == "mlp_inputs")


def _dense(config: RunConfig, execution: Execution, net: nn.Module, split: Split, folder: Path) -> dict[str, Any]:
    net.to(split.train[0].device)
    best = BestEpoch({"net": net}, config.best_of, folder)
    history = train_dense(
        net,
        split.train,
        config.epochs,
        config.batch_size,
        config.lr,
        config.seed,
        decay=config.decay,
        validation=split.validation,
        folder=folder,
        checkpoint_every=execution.checkpoint_every,
        callbacks=[best],
    )
    best.restore()
    seconds = sum(record["seconds"] for record in history)
    return {**compare(net, net, split), "seconds": seconds, "history": _in_short(history)}


def _continuous(config: RunConfig, execution: Execution, net: nn.Module, split: Split, folder: Path) -> dict[str, Any]:
    dense = copy.deepcopy(net).to(split.train[0].device)
    model, guide = _program(config, net, split.train[0])
    # Cutting while training is a matter of speed alone unless norms lose the weights of what has gone.
    shrink = config.method.startswith(_OF_POSTERIORS) and not execution.compile
    best = BestEpoch({"model": model, "guide": guide}, config.best_of, folder)
    result = _fit(
        model,
        guide,
        split,
        config,
        execution,
        folder,
        criterion=criterion(config),
        pruning=bmrs.Continuous(start=config.prune_from, stop=config.prune_until, shrink=shrink),
        epochs=config.epochs,
        fine_tune_epochs=config.fine_tune_epochs,
        callbacks=[best],
    )
    best.restore()
    return _results(dense, model, guide, result, split)


def _post_training(
    config: RunConfig, execution: Execution, net: nn.Module, split: Split, folder: Path
) -> dict[str, Any]:
    """Rank and remove after a training that all criteria share, in a folder that they share too."""
    dense = copy.deepcopy(net).to(split.train[0].device)
    model, guide = _program(config, net, split.train[0])
    shared_folder = work_folder(_shared(config), execution)
    with _only_here(shared_folder):
        trained = _fit(
            model,
            guide,
            split,
            config,
            execution,
            shared_folder,
            criterion=None,
            epochs=config.epochs,
            fine_tune_epochs=0,
        )
    scores = _scores(model, guide, config, split)
    chosen, judge = scores[config.method], criterion(config)
    assert judge is not None
    line = (chosen >= 0).double().mean().item() if config.method.startswith(_OF_POSTERIORS) else None
    levels = _LEVELS if line is None else tuple(sorted({*_LEVELS, line}))
    result = _fit(
        model,
        guide,
        split,
        config,
        execution,
        folder,
        criterion=judge,
        pruning=bmrs.PostTraining(levels=tuple(level for level in levels if level > 0), stop=False),
        epochs=0,
        fine_tune_epochs=0,
        callbacks=[_TestAccuracy(model, guide, split.test)],
    )
    keys = ("level", "removed", "compression", "accuracy_validation", "accuracy_test")
    return {
        **_results(dense, model, guide, result, split),
        "seconds": trained.seconds + result.seconds,
        "history": _in_short(trained.history),
        "curve": {key: [_rounded(record[key]) for record in result.history] for key in keys},
        "stop_level": None if line is None else _rounded(line),
        "rank_correlation": {"methods": list(scores), "spearman": _matrix(spearman(torch.stack([*scores.values()])))},
    }


def _program(
    config: RunConfig, net: nn.Module, images: Tensor
) -> tuple[bmrs.NoisyNetwork, bmrs.TruncatedLogNormalGuide]:
    kl_weight: Any = config.kl_weight
    if isinstance(kl_weight, str):
        kl_weight = bmrs.reference_kl_weights(net, len(images))
    elif config.kl_by_cost:
        kl_weight = bmrs.cost_kl_weights(net, to_input(images[:2]).cpu(), kl_weight)
    model = bmrs.NoisyNetwork(net, num_data=len(images), kl_weight=kl_weight)
    return model, bmrs.TruncatedLogNormalGuide(model)


def _fit(
    model: bmrs.NoisyNetwork,
    guide: bmrs.TruncatedLogNormalGuide,
    split: Split,
    config: RunConfig,
    execution: Execution,
    folder: Path,
    **phase: Any,
) -> bmrs.FitResult:
    return bmrs.fit(
        model,
        guide,
        split.train,
        split.validation,
        batch_size=config.batch_size,
        lr=config.lr,
        posterior_lr=config.posterior_lr,
        kl_warmup_epochs=config.kl_warmup_epochs,
        decay=config.decay,
        granularity=config.granularity,
        device=split.train[0].device,
        compile=execution.compile,
        seed=config.seed,
        progress=False,
        folder=folder,
        checkpoint_every=execution.checkpoint_every,
        resume=True,
        **phase,
    )


def _results(
    dense: nn.Module,
    model: bmrs.NoisyNetwork,
    guide: bmrs.TruncatedLogNormalGuide,
    result: bmrs.FitResult,
    split: Split,
) -> dict[str, Any]:
    pruned = bmrs.compact(model, guide, None, to_input(split.validation[0][:8]))
    measured = evaluate(dense, model, guide, pruned, result.masks, split)
    return {
        **measured,
        "compression_reference": _rounded(reference_compression(dense, measured["kept"])),
        "seconds": result.seconds,
        "history": _in_short(result.history),
    }


def _in_short(history: list[dict[str, Any]]) -> dict[str, list[float]]:
    return {key: [_rounded(record[key]) for record in history] for key in ("compression", "accuracy_validation")}


def _rounded(value: float) -> float:
    return round(value, 5)


class _TestAccuracy(bmrs.Callback):
    """Adds the test accuracy to the record of each level, for the curves to show; nothing is decided by it."""

    def __init__(
        self, model: bmrs.NoisyNetwork, guide: bmrs.TruncatedLogNormalGuide, test: tuple[Tensor, Tensor]
    ) -> None:
        self.model, self.guide, self.test = model, guide, test

    def on_epoch_end(self, record: dict[str, Any]) -> None:
        x, y = self.test
        record["accuracy_test"] = accuracy(bmrs.predict(self.model, self.guide, x), y)


def _scores(
    model: bmrs.NoisyNetwork, guide: bmrs.TruncatedLogNormalGuide, config: RunConfig, split: Split
) -> dict[str, Tensor]:
    """Return the scores that every method gives the same trained network, flat over all sites."""
    x, y = to_input(split.train[0][: config.batch_size]), split.train[1][: config.batch_size]
    context = bmrs.PruningContext(model.eval(), guide, bmrs.find_structures(model.net, x[:2]), x, y)
    scores = {}
    for method in dict.fromkeys((*METHODS[1:], config.method)):
        judge = criterion(replace(config, method=method))
        assert judge is not None, method
        scores[method] = torch.cat([score.detach() for score in judge.scores(context).values()])
    return scores


def _matrix(values: Tensor) -> list[list[float]]:
    return [[_rounded(value) for value in row] for row in values.tolist()]


def _shared(config: RunConfig) -> RunConfig:
    """Return what names the training that all criteria share."""
    return replace(config, method="shared", prior_log_odds=0.0, p2=None)


def epochs_planned(config: RunConfig) -> int:
    """Return how many epochs a run has, of post-training pruning about, since it may have a level of its own."""
    return config.epochs + config.fine_tune_epochs + (len(_LEVELS) if config.pruning == "post-training" else 0)


def epochs_done(config: RunConfig, execution: Execution) -> int:
    """Return how many of them its folder of checkpoints has a record of."""
    folders = [work_folder(config, execution)]
    if config.pruning == "post-training":
        folders.append(work_folder(_shared(config), execution))
    return sum(_count_lines(folder / "metrics.jsonl") for folder in folders)


def is_running(config: RunConfig, execution: Execution) -> bool:
    """Return whether some process is at work on a run; one that was killed no longer holds the lock."""
    path = work_folder(config, execution) / _LOCK
    if not path.exists():
        return False
    try:
        with FileLock(path, timeout=0):
            return False
    except Timeout:
        return True


def _count_lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0
