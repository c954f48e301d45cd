"""The recipes that fill in the settings of a run, and the criterion that they name.

A recipe is nothing but values of options that the library has for everyone; ``analysis.runs.experiment`` knows of none.
"""

import math
import re
from dataclasses import dataclass
from typing import Any, Literal, get_args

from analysis.runs.config import (
    BASELINES,
    METHODS,
    OTHERS,
    NoisyRun,
    PruningName,
    RecipeName,
    RunConfig,
    select_config,
)
from analysis.runs.reference import REFERENCE_LOG_ODDS
from pyro_bmrs import (
    BMRS_N,
    BMRS_U,
    SNR,
    Criterion,
    FreeFormCriterion,
    GradientWeightNorm,
    PosteriorMean,
    Random,
    WeightNorm,
)

__all__ = ["criterion", "dense_of", "make_config"]

_EVIDENCE = re.compile(r"BMRS_N|BMRS_U-(\d+)")
_RANKINGS = ("L2", "gradient", "random")


@dataclass(frozen=True)
class _Setting:
    """What the paper's appendix says of one network on one data set; widths and depths are so by any recipe."""

    batch_size: int
    lr: float
    hidden: int | None = None
    layers: int | None = None
    image_size: int = 32
    pretrain_epochs: int = 0
    train_images: int | Literal["all"] = "all"


# An MLP of the paper's n has n + 1 hidden layers. Ours are those of digits, for tests, and the small ResNets and ViTs.
_SETTINGS: dict[tuple[str, str], _Setting] = {
    ("mlp", "mnist"): _Setting(128, 8.5e-4, 100, 8),
    ("mlp", "fashion_mnist"): _Setting(128, 1.5e-3, 150, 2),
    ("mlp", "cifar10"): _Setting(32, 6.8e-4, 150, 6),
    ("mlp", "digits"): _Setting(64, 4e-3, 100, 3),
    ("lenet5", "mnist"): _Setting(128, 1.4e-3),
    ("lenet5", "fashion_mnist"): _Setting(32, 1.4e-3),
    ("lenet5", "cifar10"): _Setting(64, 1e-3),
    ("lenet5", "digits"): _Setting(64, 4e-3),
    ("resnet18", "digits"): _Setting(64, 1e-3, hidden=8, pretrain_epochs=2),
    ("vit_s", "digits"): _Setting(64, 1e-3, hidden=32, layers=2, pretrain_epochs=2),
    ("resnet18", "cifar10"): _Setting(64, 1e-3, hidden=16, pretrain_epochs=12, train_images=20_000),
    ("vit_s", "cifar10"): _Setting(64, 1e-3, hidden=64, layers=3, pretrain_epochs=12, train_images=20_000),
    ("resnet50", "cifar10"): _Setting(32, 6.8e-4, image_size=224),
    ("vit_b16", "cifar10"): _Setting(32, 6.8e-4, image_size=224),
    ("resnet50", "tiny-imagenet"): _Setting(32, 6.8e-4, image_size=224),
    ("vit_b16", "tiny-imagenet"): _Setting(32, 6.8e-4, image_size=224),
    ("lenet5_caffe", "mnist"): _Setting(128, 1.4e-3),
    ("lenet5_caffe", "fashion_mnist"): _Setting(128, 1.4e-3),
    ("lenet5_caffe", "digits"): _Setting(64, 4e-3),
}


# The reference takes 127 from the bytes of these and divides by 255; others it maps to [-1, 1].
_PAPER_PIXELS = dict.fromkeys(("mnist", "fashion_mnist"), (-127 / 255, 128 / 255))


@dataclass(frozen=True)
class _Ours:
    """Our setting of one network on one data set, chosen on validation data, as for its dense network and baselines."""

    kl_weight: float
    epochs: int
    fine_tune_epochs: int
    batch_size: int
    lr: float
    posterior_lr: float
    kl_by_cost: bool = False
    kl_priced_at: tuple[int, ...] | None = None
    pixels: tuple[float, float] = (0, 1)
    log_high: float = 0.0


# Noise of the MLPs may grow to e: ahead of noise up to 1 on validation data at every size tried (not on Fashion-MNIST).
# LeNet-5 learns CIFAR-10 better from pixels of mean 0 and variance 1; the deep tanh MLP worse.
_OURS: dict[tuple[str, str], _Ours] = {
    ("mlp", "mnist"): _Ours(6, 40, 20, 128, 8.5e-4, 50 * 8.5e-4, log_high=1),
    ("mlp", "fashion_mnist"): _Ours(6, 40, 20, 128, 8.5e-4, 50 * 8.5e-4, log_high=1),
    ("mlp", "cifar10"): _Ours(12, 40, 20, 128, 3e-4, 0.01, kl_by_cost=True, log_high=1),
    ("mlp_inputs", "mnist"): _Ours(5, 40, 20, 128, 8.5e-4, 50 * 8.5e-4, log_high=1),
    ("mlp_inputs", "cifar10"): _Ours(3, 40, 20, 64, 3e-4, 0.01, kl_by_cost=True),
    ("mlp", "digits"): _Ours(2, 60, 20, 64, 4e-3, 0.2, log_high=1),
    ("lenet5", "mnist"): _Ours(70, 50, 10, 128, 3e-3, 0.01),
    ("lenet5", "fashion_mnist"): _Ours(70, 50, 10, 128, 3e-3, 0.01),
    ("lenet5", "cifar10"): _Ours(23, 12, 6, 64, 1e-3, 0.05, pixels=(-1.9, 2.1)),
    ("lenet5", "digits"): _Ours(1, 60, 20, 64, 4e-3, 0.2),
    ("resnet18", "digits"): _Ours(1, 4, 2, 64, 1e-3, 0.1),
    ("vit_s", "digits"): _Ours(1, 4, 2, 64, 1e-3, 0.1),
    ("resnet18", "cifar10"): _Ours(30, 3, 1, 64, 1e-3, 0.05, pixels=(-1.9, 2.1)),
    ("vit_s", "cifar10"): _Ours(20, 3, 1, 64, 5e-4, 0.05, pixels=(-1.9, 2.1)),
    # Not run yet: they take a GPU.
    ("resnet50", "cifar10"): _Ours(20, 80, 20, 32, 6.8e-4, 0.01, pixels=(-1.9, 2.1)),
    ("vit_b16", "cifar10"): _Ours(20, 80, 20, 32, 1e-4, 0.01, pixels=(-1.9, 2.1)),
    ("resnet50", "tiny-imagenet"): _Ours(20, 80, 20, 32, 6.8e-4, 0.01, pixels=(-1.9, 2.1)),
    ("vit_b16", "tiny-imagenet"): _Ours(20, 80, 20, 32, 1e-4, 0.01, pixels=(-1.9, 2.1)),
    ("lenet5_caffe", "mnist"): _Ours(40, 30, 30, 64, 2e-3, 0.01, kl_by_cost=True, kl_priced_at=(6, 9, 53, 13)),
    ("lenet5_caffe", "fashion_mnist"): _Ours(40, 30, 30, 64, 2e-3, 0.01, kl_by_cost=True, kl_priced_at=(6, 9, 53, 13)),
    ("lenet5_caffe", "digits"): _Ours(1, 60, 20, 64, 4e-3, 0.2),
}


def make_config(
    dataset: str,
    network: str,
    method: str,
    recipe: str,
    seed: int,
    *,
    pruning: PruningName = "continuous",
    epochs: int | None = None,
    fine_tune_epochs: int | None = None,
    kl_weight: float | str | None = None,
    **changes: Any,
) -> RunConfig:
    """Return the recipe's configuration of a run.

    Args:
        dataset: Short name of the data set.
        network: Name of the network.
        method: One of ``METHODS`` or ``OTHERS``, or ``"BMRS_U-p1"``; with the recipe ``"baselines"`` one of
            ``BASELINES``.
        recipe: ``"paper"``, ``"ours"``, or ``"baselines"``: as long a training as ours, without noise.
        seed: Of the run.
        pruning: When to remove.
        epochs: Epochs in which structures are removed; by default the recipe's.
        fine_tune_epochs: Epochs after them, with the noise on in the paper's recipe and off in ours. After-training
            pruning fine-tunes at its levels instead.
        kl_weight: Instead of the recipe's.
        changes: Any other setting; one that this run does not have is left out.

    Raises:
        ValueError: If there is no such method or recipe, the one is not for the other, or there is no setting for this
            network on this data set, or a number of epochs is negative.
        TypeError: If no run has a setting of such a name.
    """
    if recipe not in get_args(RecipeName):
        raise ValueError(f"there is no recipe {recipe!r}; choose one of {', '.join(get_args(RecipeName))}")
    _check_method(method, recipe)
    for name, value in (("epochs", epochs), ("fine_tune_epochs", fine_tune_epochs)):
        if value is not None and value < 0:
            raise ValueError(f"{name} must not be negative, but got {value}")
    family = network.removesuffix("_inputs")
    if (family, dataset) not in _SETTINGS:
        raise ValueError(f"there is no setting for the network {network!r} on {dataset!r}; there are {_pairs()}")
    setting, ours = _SETTINGS[family, dataset], _OURS.get((network, dataset), _OURS[family, dataset])
    common: dict[str, Any] = {
        "dataset": dataset,
        "network": network,
        "method": method,
        "recipe": recipe,
        "seed": seed,
        "pruning": pruning,
        "hidden": setting.hidden,
        "layers": setting.layers,
        "image_size": 28 if network == "lenet5_caffe" else setting.image_size,
        "pretrain_epochs": setting.pretrain_epochs,
        "train_images": setting.train_images,
    }
    if recipe == "paper":
        epochs, tuning = _given(epochs, 50), _given(fine_tune_epochs, 10)
        specific = _paper(method, network, epochs, 0 if pruning == "post-training" else tuning)
        if method in _RANKINGS and pruning == "continuous":  # as many structures as BMRS_N has removed in the end
            specific |= {"prune_from": epochs, "match_by": "structures"}
        specific |= {"batch_size": setting.batch_size, "lr": setting.lr, "posterior_lr": setting.lr}
        specific |= {
            "pixels": _PAPER_PIXELS.get(dataset, (-1, 1)),
            "best_of": 0 if pruning == "post-training" else tuning,
        }
    else:
        epochs, tuning = _given(epochs, ours.epochs), _given(fine_tune_epochs, ours.fine_tune_epochs)
        specific = _ours(method, epochs, 0 if pruning == "post-training" else tuning)
        own = ("kl_weight", "kl_by_cost", "kl_priced_at", "batch_size", "lr", "posterior_lr", "pixels", "log_high")
        specific |= {name: getattr(ours, name) for name in own}
    if pruning == "to-size":
        specific |= {"kl_warmup_epochs": 0, "best_of": 0}  # its weight begins small, and its size is that of the end
    if kl_weight is not None:
        specific["kl_weight"] = kl_weight
    settings = {**common, **specific, **changes}
    if method == "none" or recipe == "baselines":
        settings["epochs"] += settings["fine_tune_epochs"]
    return select_config(settings)


def dense_of(config: RunConfig) -> RunConfig:
    """Return the configuration of the dense network of the same recipe, trained as long with the same seed."""
    return select_config({**config.all_settings, "method": "none", "epochs": config.total_epochs})


def _paper(method: str, network: str, epochs: int, fine_tune_epochs: int) -> dict[str, Any]:
    """Return the reference implementation's settings; it fine-tunes with noise, without removing any more.

    Of the epochs of fine-tuning it goes back to the one with the best validation accuracy.
    """
    return {
        "epochs": epochs + fine_tune_epochs,
        "fine_tune_epochs": 0,
        "decay": False,
        "kl_weight": "reference",
        "kl_warmup_epochs": 0,
        "granularity": "element",
        "prune_from": 1,
        "prune_until": epochs,
        # Its BMRS_N, which L2 and gradient norm are matched to, lacks a term of eq. 8; its BMRS_U lacks none.
        "prior_log_odds": REFERENCE_LOG_ODDS if method in ("BMRS_N", *_RANKINGS) else 0.0,
        "p2": 23.0,
        "placement": "readers" if network.startswith(("mlp", "lenet5_caffe")) else "outputs",
    }


def _ours(method: str, epochs: int, fine_tune_epochs: int) -> dict[str, Any]:
    """Return our other settings, written out so that an id does not change its meaning when a default does."""
    has_line = method in (*_RANKINGS, "free_form") or _EVIDENCE.fullmatch(method)
    return {
        "epochs": epochs,
        "fine_tune_epochs": fine_tune_epochs,
        "decay": True,
        "kl_warmup_epochs": epochs // 4,
        "granularity": "shared",
        "prune_from": epochs // 4 + 1,
        "prune_until": epochs,
        "prior_log_odds": math.log(3) if has_line else 0.0,
        "p2": None,
    }


def criterion(config: NoisyRun, gradients: Any = None) -> Criterion:
    """Return the criterion that a configuration names.

    Args:
        config: The configuration.
        gradients: What free-form evidence is made of, see ``FreeFormCriterion``.
    """
    if config.method == "free_form":
        return FreeFormCriterion(gradients, prior_log_odds=config.prior_log_odds)
    matched = BMRS_N(prior_log_odds=config.prior_log_odds)
    fixed: dict[str, Criterion] = {
        "L2": WeightNorm(matched, match_by=config.match_by),
        "gradient": GradientWeightNorm(matched, match_by=config.match_by),
        "random": Random(matched, match_by=config.match_by, seed=config.seed),
        "E[theta]": PosteriorMean(0.1),
        "SNR": SNR(1.0),
        "BMRS_N": matched,
    }
    if config.method in fixed:
        return fixed[config.method]
    return BMRS_U(_p1(config.method), config.p2, prior_log_odds=config.prior_log_odds)


def _check_method(method: str, recipe: str) -> None:
    if method not in (*METHODS, *OTHERS, *BASELINES) and not _EVIDENCE.fullmatch(method):
        raise ValueError(f"there is no method {method!r}; choose one of {', '.join(METHODS)}, or BMRS_U-p1 of any p1")
    if (method in BASELINES) != (recipe == "baselines"):
        raise ValueError(
            f"{method!r} does not go with the recipe {recipe!r}; that of baselines is of {', '.join(BASELINES)}"
        )


def _p1(method: str) -> int:
    match = _EVIDENCE.fullmatch(method)
    assert match is not None, method
    return int(match[1])


def _given(value: int | None, otherwise: int) -> int:
    return otherwise if value is None else value


def _pairs() -> str:
    return ", ".join(f"{network} on {dataset}" for network, dataset in _SETTINGS)
