"""One run of the study: from a configuration to its results."""

from typing import Any

import torch
from torch import Tensor, nn

from analysis.data.sets import Split, count_classes, digits, load
from analysis.runs.baseline_runs import execute_baseline
from analysis.runs.best_epoch import BestEpoch
from analysis.runs.config import (
    MLP,
    AfterTraining,
    Caffe,
    DenseRun,
    LeNet5,
    NoisyRun,
    Placement,
    Pretrained,
    RunConfig,
    ScratchRun,
    TorchPruningRun,
)
from analysis.runs.dense import train_dense
from analysis.runs.execution import Execution, note_session, run_lock, work_folder
from analysis.runs.noisy import execute_post_training, execute_while_training
from analysis.runs.pretrained import architecture, trained, with_noise
from analysis.runs.results import compare, short_history
from models import lenet5, lenet5_caffe, mlp
from pyro_bmrs import LogUniform, MultiplicativeNoise
from pyro_bmrs.structures.inputs import to_input
from pyro_bmrs.svi.devices import resolve_device

__all__ = ["execute"]


def execute(config: RunConfig, execution: Execution) -> dict[str, Any]:
    """Carry out a run, or what is left of it, and return its results.

    Two calls for the same run, in whatever processes, wait for each other. Of several processes that train together,
    only the first has results.
    """
    torch.set_num_threads(execution.threads)
    device = resolve_device(execution.device) if execution.fabric is None else execution.fabric.device
    with run_lock(config, execution):
        sessions = note_session(config, execution) if execution.is_first else []
        split = _on_device(_load(config, execution), device)
        net: Any = _build(config, execution, split)
        if not isinstance(config.net, Pretrained):
            # On a CPU convolutions of few channels take up to 1.5 times as long in the other layout. There torch 2.13.0
            # corrupts memory in the backward pass of 1x1 convolutions of stride 2 and fewer than 8 channels, as in
            # the shortcuts of a narrow ResNet.
            net.to(memory_format=torch.channels_last)
        results = _run(config, execution, net, split)
    if not execution.is_first:
        return {}
    if execution.fabric is not None:
        results["processes"] = execution.fabric.world_size
    return {
        "dataset": config.dataset,
        "network": config.network,
        "method": config.method,
        "seed": config.seed,
        "epochs": config.total_epochs,
        **results,
        "sessions": sessions,
    }


def _run(config: RunConfig, execution: Execution, net: nn.Module, split: Split) -> dict[str, Any]:
    match config:
        case DenseRun():
            return _dense(config, execution, net, split)
        case TorchPruningRun() | ScratchRun():
            return execute_baseline(config, net, split)
        case NoisyRun(schedule=AfterTraining()):
            return execute_post_training(config, execution, net, split)
        case NoisyRun():
            return execute_while_training(config, execution, net, split)
    raise TypeError(f"{type(config).__name__} is no kind of run that can be carried out")


def _load(config: RunConfig, execution: Execution) -> Split:
    if config.dataset == "digits":
        split = digits(config.image_size)
    else:
        split = load(config.dataset, execution.data_dir, size=config.image_size)
    if config.train_images != "all":
        x, y = (part[: config.train_images] for part in split.train)
        split = Split((x, y), split.validation, split.test)
    return split if config.pixels == (0.0, 1.0) else _with_pixels(split, *config.pixels)


def _with_pixels(split: Split, black: float, white: float) -> Split:
    parts = ((to_input(x) * (white - black) + black, y) for x, y in (split.train, split.validation, split.test))
    return Split(*parts)


def _on_device(split: Split, device: torch.device) -> Split:
    parts = ((x.to(device), y.to(device)) for x, y in (split.train, split.validation, split.test))
    return Split(*parts)


def _build(config: RunConfig, execution: Execution, split: Split) -> nn.Module:
    """Return the network, with the noise that the configuration names."""
    placement = config.placement if isinstance(config, NoisyRun | ScratchRun) else "readers"
    log_high = config.log_high if isinstance(config, NoisyRun) else 0.0
    if isinstance(config.net, Pretrained):
        net = _trained_before(config, config.net, execution, split)
        return net if isinstance(config, DenseRun) else with_noise(net, placement, log_high, split.train[0])
    torch.manual_seed(config.seed)
    net = _network(config.net, placement, split.train[0])
    for name, module in list(net.named_modules()):
        if isinstance(module, MultiplicativeNoise) and log_high:
            prior = LogUniform(module.prior.log_low[0], torch.tensor(log_high))
            net.set_submodule(name, MultiplicativeNoise(module.size, prior, module.dim))
    return net


def _trained_before(config: RunConfig, kind: Pretrained, execution: Execution, split: Split) -> nn.Module:
    classes = count_classes(config.dataset)
    if isinstance(config, ScratchRun):
        torch.manual_seed(config.seed)
        return architecture(kind, config.image_size, classes)
    net = trained(config, execution, split, classes)
    torch.manual_seed(config.seed)
    return net


def _network(kind: MLP | LeNet5 | Caffe, placement: Placement, images: Tensor) -> nn.Module:
    channels = images.shape[1]
    match kind:
        case LeNet5():
            return lenet5(channels, noise_before_pool=placement == "outputs")
        case Caffe():
            return lenet5_caffe(channels)
        case MLP():
            return mlp(images[0].numel(), kind.hidden, kind.layers, input_noise=kind.network == "mlp_inputs")


def _dense(config: DenseRun, execution: Execution, net: nn.Module, split: Split) -> dict[str, Any]:
    net.to(split.train[0].device)
    folder = work_folder(config, execution)
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
    return {**compare(net, net, split), "seconds": seconds, "history": short_history(history)}
