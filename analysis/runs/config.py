"""What a run of the study is, down to the last setting."""

import hashlib
import json
import math
from dataclasses import MISSING, dataclass, fields
from typing import Any, Literal, get_args

from pyro_bmrs.svi.elbo import Granularity

__all__ = ["BASELINES", "METHODS", "OTHERS", "DatasetName", "NetworkName", "PretrainedName", "RecipeName", "RunConfig"]

DatasetName = Literal["mnist", "fashion_mnist", "cifar10", "digits", "tiny-imagenet"]
PretrainedName = Literal["resnet18", "resnet50", "vit_s", "vit_b16"]
NetworkName = Literal["mlp", "mlp_inputs", "lenet5", "lenet5_caffe", PretrainedName]
RecipeName = Literal["paper", "ours", "baselines"]

METHODS = ("none", "L2", "E[theta]", "SNR", "BMRS_N", "BMRS_U-8", "BMRS_U-4", "gradient")
OTHERS = ("free_form", "random")
BASELINES = ("tp_magnitude", "tp_taylor", "tp_group_norm", "scratch")  # of the recipe "baselines", all of it


@dataclass(frozen=True)
class RunConfig:
    """All that decides the results of one run; where and how fast it is executed does not belong here.

    Attributes:
        dataset: Its short name.
        network: ``"mlp"``, ``"mlp_inputs"`` (noise on the network's inputs too), ``"lenet5"``, ``"lenet5_caffe"``, or
            one that has been trained before, see ``analysis.runs.pretrained``.
        method: One of ``METHODS``, ``OTHERS`` or ``BASELINES``, or ``"BMRS_U-p1"`` of any p1.
        recipe: Name of the recipe that the settings below started from.
        seed: Of initial weights, data order and noise.
        epochs: Epochs with noise; of the dense network and of baselines all.
        fine_tune_epochs: Epochs at the posterior mean.
        batch_size: Examples per step, at most.
        lr: Initial learning rate of the weights.
        posterior_lr: That of the posterior.
        decay: Whether both fall along a cosine.
        kl_weight: A number, or ``"reference"`` for ``reference_kl_weights``.
        kl_warmup_epochs: Epochs over which the KL's weight rises.
        granularity: How often noise is drawn.
        pruning: ``"continuous"`` or ``"post-training"``.
        prune_from: First epoch after which to prune continuously.
        prune_until: Last one.
        prior_log_odds: Of the evidence criterion, or of that whose compression is matched; 0 where there is none.
        p2: Of BMRS_U, also where others are compared with it; None reaches down to the prior's bound.
        hidden: Width of an MLP's hidden layers, of a ResNet's first stage or of a ViT; 0 for that of its name.
        layers: Number of an MLP's hidden layers or of a ViT's; 0 for that of its name.
        image_size: Height and width of the images.
        noise_before_pool: Where filters' noise stands, see ``models.lenet5``.
        budget: Fraction of the parameters that a baseline is to remove.
        ranking: How it ranks structures, see ``analysis.runs.baselines.train_baseline``.
        kl_by_cost: Whether ``kl_weight`` is a mean, each site's own in proportion to the parameters that one of its
            structures costs, see ``cost_kl_weights``.
        kl_priced_at: How many structures each noise layer has, in their order, in the network in which they cost that;
            by default those of the whole network.
        widths: Structures at each noise layer, in their order, of the network that ``"scratch"`` trains.
        pixels: What black and white are to the network.
        best_of: Of how many epochs at the end that with the best validation accuracy counts; 0 is the last one.
        match_by: What a criterion that only ranks removes as many of as BMRS_N would.
        log_high: Upper bound of the log-uniform prior on log(theta); the paper's is 0.
        pretrain_epochs: Epochs in which a network is trained first, without noise and alike for all seeds; 0 where its
            weights come from a folder.
        train_images: Number of training images, the first ones; 0 for all.
        placement: Where the noise of pretrained networks stands: ``"readers"``, in front of what reads a channel, or
            ``"outputs"``, as in the paper, behind batch norms and output projections.
    """

    dataset: str
    network: str
    method: str
    recipe: str
    seed: int
    epochs: int
    fine_tune_epochs: int
    batch_size: int
    lr: float
    posterior_lr: float
    decay: bool
    kl_weight: float | str
    kl_warmup_epochs: int
    granularity: Granularity
    pruning: Literal["continuous", "post-training"]
    prune_from: int
    prune_until: int
    prior_log_odds: float
    p2: float | None
    hidden: int
    layers: int
    image_size: int
    noise_before_pool: bool
    budget: float = 0.0
    ranking: Literal["layer", "network"] = "layer"
    kl_by_cost: bool = False
    widths: tuple[int, ...] = ()
    pixels: tuple[float, float] = (0.0, 1.0)
    best_of: int = 0
    kl_priced_at: tuple[int, ...] = ()
    match_by: Literal["parameters", "structures"] = "parameters"
    log_high: float = 0.0
    pretrain_epochs: int = 0
    train_images: int = 0
    placement: Literal["readers", "outputs"] = "readers"

    def __post_init__(self) -> None:
        for field in fields(self):  # 30 and 30.0 are one setting, and must not have two ids
            value = getattr(self, field.name)
            if type(value) is int and (field.type is float or float in get_args(field.type)):
                object.__setattr__(self, field.name, float(value))
        for name in ("widths", "kl_priced_at"):
            object.__setattr__(self, name, tuple(getattr(self, name)))  # JSON has made lists of them
        if self.kl_by_cost and isinstance(self.kl_weight, str):
            raise ValueError(f"kl_by_cost needs a number as kl_weight, the mean, but that is {self.kl_weight!r}")
        if self.kl_priced_at and not self.kl_by_cost:
            raise ValueError("kl_priced_at says at which widths structures have their price, which needs kl_by_cost")
        if len(self.pixels) != 2 or len(set(self.pixels)) == 1 or not all(map(math.isfinite, self.pixels)):
            raise ValueError(f"pixels must be two numbers that differ, black's and white's, but got {self.pixels!r}")
        object.__setattr__(self, "pixels", tuple(float(value) for value in self.pixels))

    @property
    def settings(self) -> dict[str, Any]:
        """The fields by name, without those that have a default and still have that value.

        So one added later changes no id, and no results kept before it look different from those kept after.
        """
        return {
            field.name: getattr(self, field.name)
            for field in fields(self)
            if field.default is MISSING or getattr(self, field.name) != field.default
        }

    @property
    def id(self) -> str:
        """Twelve hexadecimal digits that name the configuration, the same in every process and version of Python."""
        text = json.dumps(self.settings, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    @property
    def label(self) -> str:
        """What a person calls the run."""
        detail = "" if isinstance(self.kl_weight, str) or self.method == "none" else f" kl {self.kl_weight:g}"
        if self.recipe == "baselines":
            detail = f" budget {self.budget:g}"
        return f"{self.dataset} {self.network} {self.method} {self.recipe}{detail} seed {self.seed}"
