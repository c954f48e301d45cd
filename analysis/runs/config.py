"""What a run of the study is, down to the last setting: of which kind, of which network, and when it prunes."""

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import MISSING, Field, dataclass, fields
from typing import Any, ClassVar, Literal, get_args

from pyro_bmrs.svi.elbo import Granularity

__all__ = [
    "BASELINES",
    "METHODS",
    "MLP",
    "OTHERS",
    "AfterTraining",
    "Caffe",
    "DatasetName",
    "DenseRun",
    "LeNet5",
    "NetworkName",
    "NoisyRun",
    "Placement",
    "Pretrained",
    "PretrainedName",
    "PruningName",
    "Ranking",
    "RecipeName",
    "RunConfig",
    "ScratchRun",
    "ToSize",
    "TorchPruningRun",
    "WhileTraining",
    "read_config",
    "select_config",
]

DatasetName = Literal["mnist", "fashion_mnist", "cifar10", "digits", "tiny-imagenet"]
PretrainedName = Literal["resnet18", "resnet50", "vit_s", "vit_b16"]
NetworkName = Literal["mlp", "mlp_inputs", "lenet5", "lenet5_caffe", PretrainedName]
RecipeName = Literal["paper", "ours", "baselines"]
PruningName = Literal["continuous", "post-training", "to-size"]
Placement = Literal["readers", "outputs"]
Ranking = Literal["layer", "network"]

METHODS = ("none", "L2", "E[theta]", "SNR", "BMRS_N", "BMRS_U-8", "BMRS_U-4", "gradient")
OTHERS = ("free_form", "random")
_TORCH_PRUNING = ("tp_magnitude", "tp_taylor", "tp_group_norm")
BASELINES = (*_TORCH_PRUNING, "scratch")  # of the recipe "baselines", all of it


@dataclass(frozen=True)
class MLP:
    """An MLP of ``layers`` hidden layers of width ``hidden``; ``mlp_inputs`` has noise on its inputs too."""

    network: Literal["mlp", "mlp_inputs"]
    hidden: int
    layers: int


@dataclass(frozen=True)
class LeNet5:
    """LeNet-5 as the paper has it."""

    network: Literal["lenet5"]


@dataclass(frozen=True)
class Caffe:
    """LeNet-5-Caffe, with noise on the inputs of its first dense layer too."""

    network: Literal["lenet5_caffe"]


@dataclass(frozen=True)
class Pretrained:
    """A network that has been trained before, see ``analysis.runs.pretrained``.

    Attributes:
        network: Its name.
        hidden: Width of a ResNet's first stage or of a ViT, instead of that of its name.
        layers: Number of a ViT's layers, instead of that of its name.
        pretrain_epochs: In which it is trained here, without noise and alike for all seeds; with 0 its weights come
            from a folder.
    """

    network: PretrainedName
    hidden: int | None = None
    layers: int | None = None
    pretrain_epochs: int = 0


Network = MLP | LeNet5 | Caffe | Pretrained
_NETWORKS: dict[str, type[Network]] = {
    **dict.fromkeys(("mlp", "mlp_inputs"), MLP),
    "lenet5": LeNet5,
    "lenet5_caffe": Caffe,
    **dict.fromkeys(get_args(PretrainedName), Pretrained),
}


@dataclass(frozen=True)
class WhileTraining:
    """Removes after every epoch from one to another, counted from 1."""

    pruning: ClassVar[PruningName] = "continuous"
    prune_from: int
    prune_until: int


@dataclass(frozen=True)
class AfterTraining:
    """Ranks once, and removes level by level."""

    pruning: ClassVar[PruningName] = "post-training"


@dataclass(frozen=True)
class ToSize:
    """Removes that fraction of the parameters while training, by ``pyro_bmrs.ToSize``."""

    pruning: ClassVar[PruningName] = "to-size"
    budget: float


Schedule = WhileTraining | AfterTraining | ToSize
_SCHEDULES: dict[str, type[Schedule]] = {kind.pruning: kind for kind in get_args(Schedule)}


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """All that decides the results of one run; where and how fast it is executed does not belong here.

    This is what every run has; its kinds are ``DenseRun``, ``NoisyRun``, ``TorchPruningRun`` and ``ScratchRun``.

    Attributes:
        dataset: Its short name.
        net: The network.
        method: One of ``METHODS``, ``OTHERS`` or ``BASELINES``, or ``"BMRS_U-p1"`` of any p1.
        recipe: Name of the recipe that the settings started from.
        seed: Of initial weights, data order and noise.
        epochs: Of a run with noise those with noise, of others all.
        batch_size: Examples per step, at most.
        lr: Initial learning rate of the weights.
        decay: Whether learning rates fall along a cosine.
        image_size: Height and width of the images.
        pixels: What black and white are to the network.
        train_images: How many training images, the first ones.
        best_of: How many epochs at the end compete by their validation accuracy; by default the last one counts.
    """

    dataset: str
    net: Network
    method: str
    recipe: str
    seed: int
    epochs: int
    batch_size: int
    lr: float
    decay: bool
    image_size: int
    pixels: tuple[float, float] = (0.0, 1.0)
    train_images: int | Literal["all"] = "all"
    best_of: int = 0

    def __post_init__(self) -> None:
        for field in fields(self):
            object.__setattr__(self, field.name, _one_form(field, getattr(self, field.name)))
        if len(self.pixels) != 2 or len(set(self.pixels)) == 1 or not all(map(math.isfinite, self.pixels)):
            raise ValueError(f"pixels must be two numbers that differ, black's and white's, but got {self.pixels!r}")
        object.__setattr__(self, "pixels", tuple(float(value) for value in self.pixels))

    @property
    def network(self) -> str:
        """Name of the network."""
        return self.net.network

    @property
    def total_epochs(self) -> int:
        """Epochs of all training, that before left out."""
        return self.epochs

    @property
    def settings(self) -> dict[str, Any]:
        """All settings by name, network's and schedule's among them, without those that have a default and its value.

        So one added later changes no id, and no results kept before it look different from those kept after.
        """
        return _settings(self)

    @property
    def all_settings(self) -> dict[str, Any]:
        """All settings by name."""
        return _settings(self, defaults=True)

    @property
    def id(self) -> str:
        """Twelve hexadecimal digits that name the configuration, the same in every process and version of Python."""
        text = json.dumps(self.settings, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    @property
    def label(self) -> str:
        """What a person calls the run."""
        return f"{self.dataset} {self.network} {self.method} {self.recipe}{self._detail} seed {self.seed}"

    @property
    def _detail(self) -> str:
        return ""


@dataclass(frozen=True, kw_only=True)
class DenseRun(RunConfig):
    """A network without noise, trained as long: what others are compared with, or what is pruned later."""


@dataclass(frozen=True, kw_only=True)
class NoisyRun(RunConfig):
    """A fit with noise, pruned by a criterion.

    Attributes:
        fine_tune_epochs: Epochs at the posterior mean.
        posterior_lr: Initial learning rate of the posterior.
        kl_weight: A number, or ``"reference"`` for ``reference_kl_weights``.
        kl_warmup_epochs: Epochs over which the KL's weight rises.
        granularity: How often noise is drawn.
        schedule: When to prune.
        prior_log_odds: Which evidence is judged with: the criterion's own, that of the one whose compression is
            matched, or of those that others are compared with.
        p2: Of BMRS_U, also where others are compared with it; None reaches down to the prior's bound.
        kl_by_cost: Whether ``kl_weight`` is a mean, each site's own in proportion to the parameters that one of its
            structures costs, see ``cost_kl_weights``.
        kl_priced_at: How many structures each noise layer has, in their order, in the network in which they cost that;
            by default those of the whole network.
        match_by: What a criterion that only ranks removes as many of as BMRS_N would.
        log_high: Upper bound of the log-uniform prior on log(theta); the paper's is 0.
        placement: Where noise stands: ``"readers"``, in front of what reads a filter or channel, or ``"outputs"``, as
            in the paper: in LeNet-5 before the pooling, in networks trained before behind batch norms and output
            projections.
    """

    fine_tune_epochs: int
    posterior_lr: float
    kl_weight: float | str
    kl_warmup_epochs: int
    granularity: Granularity
    schedule: Schedule
    prior_log_odds: float
    p2: float | None
    kl_by_cost: bool = False
    kl_priced_at: tuple[int, ...] | None = None
    match_by: Literal["parameters", "structures"] = "parameters"
    log_high: float = 0.0
    placement: Placement = "readers"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kl_by_cost and isinstance(self.kl_weight, str):
            raise ValueError(f"kl_by_cost needs a number as kl_weight, the mean, but that is {self.kl_weight!r}")
        if self.kl_priced_at and not self.kl_by_cost:
            raise ValueError("kl_priced_at says at which widths structures have their price, which needs kl_by_cost")

    @property
    def total_epochs(self) -> int:
        return self.epochs + self.fine_tune_epochs

    @property
    def _detail(self) -> str:
        weight = "" if isinstance(self.kl_weight, str) else f" kl {self.kl_weight:g}"
        return f" budget {self.schedule.budget:g}" if isinstance(self.schedule, ToSize) else weight


@dataclass(frozen=True, kw_only=True)
class TorchPruningRun(RunConfig):
    """A network without noise, pruned while training by torch-pruning, see ``analysis.runs.baselines.train_baseline``.

    Attributes:
        budget: Fraction of the parameters to remove.
        ranking: How structures are ranked.
    """

    budget: float
    ranking: Ranking = "layer"

    @property
    def _detail(self) -> str:
        return f" budget {self.budget:g}"


@dataclass(frozen=True, kw_only=True)
class ScratchRun(RunConfig):
    """A small network trained from scratch.

    Attributes:
        budget: Fraction of the parameters that the runs have removed, on average over seeds, beside which it stands.
        widths: Structures at each noise layer, in their order, of that of its seed.
        placement: Where the noise of these runs stands.
    """

    budget: float
    widths: tuple[int, ...]
    placement: Placement = "readers"

    @property
    def _detail(self) -> str:
        return f" budget {self.budget:g}"


_KINDS = (DenseRun, NoisyRun, TorchPruningRun, ScratchRun)


def select_config(settings: Mapping[str, Any]) -> RunConfig:
    """Return a run of those settings that its kind, its network and its schedule have; others are left out.

    Args:
        settings: By name. The method decides on the kind of run, ``"pruning"`` on its schedule.

    Raises:
        TypeError: If one is missing, or no run has one of that name.
    """
    if unknown := settings.keys() - _KNOWN:
        raise TypeError(f"no run has a setting called {', '.join(sorted(unknown))}")
    if missing := {"method", "network"} - settings.keys():
        raise TypeError(f"a run needs a setting {' and '.join(sorted(missing))}")
    kind: Any = _kind(settings["method"])
    parts: dict[str, Any] = {"net": _NETWORKS[settings["network"]]}
    if kind is NoisyRun:
        parts["schedule"] = _SCHEDULES[settings.get("pruning", WhileTraining.pruning)]
    made: dict[str, Any] = {name: part(**_chosen(part, settings)) for name, part in parts.items()}
    config: RunConfig = kind(**_chosen(kind, settings), **made)
    return config


def read_config(settings: Mapping[str, Any]) -> RunConfig:
    """Return the run whose ``settings`` these are.

    Raises:
        TypeError: If a setting is missing, or the run has none of that name.
    """
    config = select_config(settings)
    if surplus := settings.keys() - config.all_settings:
        raise TypeError(f"a {type(config).__name__} of {config.network} has no setting {', '.join(sorted(surplus))}")
    return config


def _kind(method: str) -> type[RunConfig]:
    special = {"none": DenseRun, "pretraining": DenseRun, "scratch": ScratchRun}
    return special.get(method, TorchPruningRun if method in _TORCH_PRUNING else NoisyRun)


def _chosen(kind: type[Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    return {field.name: _one_form(field, settings[field.name]) for field in fields(kind) if field.name in settings}


def _one_form(field: Field[Any], value: Any) -> Any:
    """Return a value as its field has it: 30 and 30.0 are one setting, and JSON makes lists of tuples."""
    if type(value) is int and (field.type is float or float in get_args(field.type)):
        return float(value)
    return tuple(value) if isinstance(value, list) else value


def _settings(config: Any, defaults: bool = False) -> dict[str, Any]:
    """Return the fields by name, those of its parts in their place, with or without those that have their default."""
    found: dict[str, Any] = {}
    for field in fields(config):
        value = getattr(config, field.name)
        if field.name in ("net", "schedule"):
            found |= _settings(value, defaults)
        elif defaults or field.default is MISSING or value != field.default:
            found[field.name] = value
    return {**found, "pruning": config.pruning} if isinstance(config, get_args(Schedule)) else found


_KNOWN = {field.name for kind in (*_KINDS, *get_args(Network), *get_args(Schedule)) for field in fields(kind)} - {
    "net",
    "schedule",
} | {"pruning"}
