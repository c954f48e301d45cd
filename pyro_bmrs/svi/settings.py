"""The settings that all fits have in common, their defaults, and their checks before anything is changed."""

import difflib
import inspect
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypedDict

import torch

from pyro_bmrs.checks import check_flag, check_list, described
from pyro_bmrs.criteria import BMRS_N, Criterion
from pyro_bmrs.criteria.evidence import LACKING_EVIDENCE
from pyro_bmrs.model.guides.flat import FlatGuide
from pyro_bmrs.model.network import NoisyNetwork
from pyro_bmrs.randomness import local_seed
from pyro_bmrs.structures.pair import check_pair
from pyro_bmrs.structures.refusal import Unremovable
from pyro_bmrs.svi.callbacks import Callback
from pyro_bmrs.svi.data.making import make_source
from pyro_bmrs.svi.data.source import Source
from pyro_bmrs.svi.data.unpacking import Unpack
from pyro_bmrs.svi.elbo import Granularity, check_lean
from pyro_bmrs.svi.nonfinite import check_finite
from pyro_bmrs.svi.pruning import Continuous, PlannedEpoch, Pruning
from pyro_bmrs.svi.result import FitWarning
from pyro_bmrs.svi.schedule import Rates
from pyro_bmrs.warn import warn

__all__ = [
    "FitSettings",
    "Preparation",
    "check_callbacks",
    "check_keywords",
    "check_model_and_guide",
    "checked_settings",
    "counting_examples",
    "prepare",
]


class FitSettings(TypedDict, total=False):
    r"""Keywords that ``fit``, ``fit_ensemble`` and ``prune`` have in common; each may be left out.

    Args:
        criterion: What to remove; None removes nothing. By default ``BMRS_N(prior_log_odds=math.log(3))``.
        pruning: When to remove: ``Continuous()``, the default, ``PostTraining()`` or, to reach a size,
            ``ToSize(fraction)``. An ensemble takes ``Continuous()`` alone, and does not shrink.
        epochs: Epochs with noise; by default what 5,000 steps take, at least 3.
        fine_tune_epochs: Epochs without (of post-training pruning: after the last level); by default a third of
            ``epochs``. In them the statistics of batch norms, which noise has widened, become those without noise.
        batch_size: At most this many examples per step, over all processes (of an ensemble: per replica); by default a
            sixteenth of them, but 16 to 64. A ``DataLoader`` and an iterable of batches have sizes of their own.
        lr: Initial learning rate of the weights; 0.002 by default.
        posterior_lr: Initial learning rate of the posterior's parameters, in units of :math:`\log\theta`; by default
            50 times ``lr``: locations have to travel, weights do not. More where there are so few steps that they could
            not travel 500 nats, up to 0.3.
        kl_warmup_epochs: Epochs over which the KL's weight rises linearly to ``model.kl_weight``; by default a quarter
            of ``epochs``, none with ``ToSize``. Without, a posterior that moves faster than the weights collapses onto
            its prior before they have learned anything.
        decay: Whether learning rates decay along the cosine, as by default; otherwise they stay as they are.
        granularity: How often noise is drawn, see ``MeanFieldELBO``; ``"shared"`` by default.
        device: ``"auto"``, the default, takes CUDA if there is a device.
        unremovable: What to do with sites whose structures cannot be removed later: ``"refuse"`` them before training,
            the default, or ``"mask"`` them only.
        progress: Whether to show a progress bar, as by default; of an ensemble with means over the replicas.

    Example:
        >>> quick: bmrs.FitSettings = {"epochs": 2, "fine_tune_epochs": 1, "criterion": None, "progress": False}
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), bmrs.MultiplicativeNoise(8), nn.Linear(8, 3))
        >>> model = bmrs.NoisyNetwork(net)
        >>> guide = bmrs.TruncatedLogNormalGuide(model)
        >>> len(bmrs.fit(model, guide, (torch.randn(32, 4), torch.arange(32) % 3), **quick).history)
        3
    """

    criterion: Criterion | None
    pruning: Pruning
    epochs: int | None
    fine_tune_epochs: int | None
    batch_size: int | None
    lr: float
    posterior_lr: float | None
    kl_warmup_epochs: int | None
    decay: bool
    granularity: Granularity
    device: str | torch.device
    unremovable: Unremovable
    progress: bool


_DEFAULTS: FitSettings = {
    "criterion": BMRS_N(prior_log_odds=LACKING_EVIDENCE),
    "pruning": Continuous(),
    "epochs": None,
    "fine_tune_epochs": None,
    "batch_size": None,
    "lr": 2e-3,
    "posterior_lr": None,
    "kl_warmup_epochs": None,
    "decay": True,
    "granularity": "shared",
    "device": "auto",
    "unremovable": "refuse",
    "progress": True,
}


@dataclass(frozen=True)
class Preparation:
    """What follows from settings and data before training begins.

    Attributes:
        data: What to train on.
        validation: What to report on, or None.
        rates: Learning rates and KL weight over the epochs.
        plan: The epochs, in order.
    """

    data: Source
    validation: Source | None
    rates: Rates
    plan: list[PlannedEpoch]

    def place(self, device: torch.device) -> None:
        """Move the data to a device, if there is room for them."""
        for source in (self.data, *([] if self.validation is None else [self.validation])):
            source.place(device)


def check_keywords(settings: Mapping[str, Any], function: Callable[..., Any], passed_to: Callable[..., Any]) -> None:
    """Raise ``TypeError`` if one of ``settings`` is no keyword of ``function``, which passes them on, nor of a fit."""
    taken = [
        name
        for each in (function, passed_to)
        for name, parameter in inspect.signature(each).parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY
    ]
    known = list(dict.fromkeys([*taken, *_DEFAULTS]))
    for name in settings:
        if name not in known:
            close = difflib.get_close_matches(name, known, 1)
            meant = f"; did you mean {close[0]}?" if close else "."
            raise TypeError(
                f"{function.__name__} got an unexpected keyword argument {name!r}{meant} It takes {', '.join(known)}"
            )


def checked_settings(function: Callable[..., Any], settings: Mapping[str, Any]) -> FitSettings:
    """Return settings of a fit with the defaults filled in.

    Raises:
        TypeError: If there is no such setting, or one is not what its name says.
        ValueError: If two do not go together.
    """
    check_keywords(settings, function, function)
    merged: FitSettings = {**_DEFAULTS, **settings}  # type: ignore[typeddict-item]
    _check_choices(merged["criterion"], merged["pruning"])
    check_flag("progress", merged["progress"])
    return merged


def prepare(
    pairs: Sequence[tuple[NoisyNetwork, FlatGuide]],
    train: Any,
    validation: Any,
    settings: FitSettings,
    unpack: Unpack | None = None,
) -> Preparation:
    """Return data, rates and epochs of a fit of models alike, each with its guide.

    Raises:
        TypeError, ValueError: If the data or a setting does not fit.
    """
    models = [model for model, _ in pairs]
    data, held_out = _check_data_sets(models, train, validation, unpack, settings["batch_size"])
    pruning, warm_up = settings["pruning"], settings["kl_warmup_epochs"]
    levels = len(pruning.levels_to_visit())
    rates = Rates.planned(
        settings["lr"],
        settings["posterior_lr"],
        settings["epochs"],
        settings["fine_tune_epochs"],
        0 if warm_up is None and not pruning.warms_up else warm_up,
        data.steps,
        levels,
        settings["decay"],
    )
    fine_tune_epochs = rates.epochs - rates.noisy_epochs - levels
    for model, guide in pairs:
        _check_trained(model, guide, rates.epochs - rates.noisy_epochs)
    return Preparation(data, held_out, rates, pruning.phases(rates.noisy_epochs, fine_tune_epochs))


def check_model_and_guide(model: NoisyNetwork, guide: FlatGuide) -> None:
    """Raise unless model and guide belong together, are programs that a fit can run, and have finite parameters."""
    check_pair(model, guide)
    check_lean(model, guide)
    guide.check_priors()
    check_finite(model, guide)


def _check_choices(criterion: Any, pruning: Any) -> None:
    """Raise unless these are what their names say, and go together."""
    if not (criterion is None or isinstance(criterion, Criterion)):
        raise TypeError(
            f"criterion must be a Criterion, for instance BMRS_N(), or None, but got {described(criterion)}"
        )
    if not isinstance(pruning, Pruning):
        raise TypeError(f"pruning must be Continuous(), PostTraining() or ToSize(...), but got {described(pruning)}")
    if pruning.shrinks and criterion is not None and not criterion.has_line:
        raise ValueError(
            f"shrink=True cuts out what {type(criterion).__name__}, which only ranks, has to count later: leave it out"
        )


def check_callbacks(callbacks: Any) -> list[Callback]:
    """Return callbacks as a list, or raise ``TypeError`` if one is none."""
    checked = check_list("callbacks", callbacks, "Callback")
    for each in checked:
        if not isinstance(each, Callback):
            raise TypeError(f"callbacks must be a sequence of Callback, but got {described(each)}")
    return checked


def _check_trained(model: NoisyNetwork, guide: FlatGuide, fine_tune_epochs: int) -> None:
    """Raise ``ValueError`` where epochs would have nothing to train."""
    weights = any(parameter.requires_grad for parameter in model.parameters())
    if not weights and fine_tune_epochs:
        raise ValueError(
            f"all weights of the model are frozen, so {fine_tune_epochs} epochs without noise have nothing to train: "
            "use fine_tune_epochs=0 and pruning=Continuous()"
        )
    if not all(parameter.requires_grad for parameter in guide.parameters()):
        raise ValueError("parameters of the guide are frozen (requires_grad=False): a fit trains them all")


def _check_data_sets(
    models: Sequence[NoisyNetwork],
    train: Any,
    validation: Any,
    unpack: Unpack | None = None,
    batch_size: int | None = None,
) -> tuple[Source, Source | None]:
    """Return training and validation data, which each of ``models``, all alike, and its likelihood take."""
    dtype = next((p.dtype for p in models[0].parameters() if p.is_floating_point()), torch.get_default_dtype())
    sources = [make_source(train, "train", dtype, unpack, batch_size)]
    if validation is not None:
        sources.append(make_source(validation, "validation", dtype, unpack, batch_size))
    # numbers that are not finite are for the fit to name, and what is tried here may draw
    with local_seed(devices=[], validate=False):
        for source, model in itertools.product(sources, models):
            source.check(model)
    return sources[0], None if validation is None else sources[1]


@contextmanager
def counting_examples(model: NoisyNetwork, size: int) -> Iterator[None]:
    """Have ``model`` count ``size`` examples while it is fitted, if it has no number of its own."""
    if model.num_data is not None and model.num_data != size:
        warn(
            f"num_data of the model is {model.num_data}, but train has {size} examples: the likelihood counts as "
            f"{model.num_data} examples; leave num_data out to have it count as {size}",
            FitWarning,
        )
    with model.counting(size):
        yield
