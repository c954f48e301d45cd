"""Arguments that all fits have in common: checked before anything is changed."""

import itertools
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pyro
import torch

from pyro_bmrs.checks import check_list, described
from pyro_bmrs.criteria import Criterion
from pyro_bmrs.model.guides.flat import FlatGuide
from pyro_bmrs.model.network import NoisyNetwork
from pyro_bmrs.structures.pair import check_pair
from pyro_bmrs.svi.callbacks import Callback
from pyro_bmrs.svi.data.making import make_source
from pyro_bmrs.svi.data.source import Source
from pyro_bmrs.svi.data.unpacking import Unpack
from pyro_bmrs.svi.elbo import check_lean
from pyro_bmrs.svi.faults import check_finite
from pyro_bmrs.svi.result import FitWarning
from pyro_bmrs.svi.schedule import Pruning

__all__ = [
    "check_callbacks",
    "check_choices",
    "check_data_sets",
    "check_model_and_guide",
    "check_trained",
    "counting_examples",
]


def check_model_and_guide(model: NoisyNetwork, guide: FlatGuide) -> None:
    """Raise unless model and guide belong together, are programs that a fit can run, and have finite parameters."""
    check_pair(model, guide)
    check_lean(model, guide)
    guide.check_priors()
    check_finite(model, guide)


def check_choices(criterion: Any, pruning: Any) -> None:
    """Raise ``TypeError`` unless these are what their names say."""
    if not (criterion is None or isinstance(criterion, Criterion)):
        raise TypeError(
            f"criterion must be a Criterion, for instance BMRS_N(), or None, but got {described(criterion)}"
        )
    if not isinstance(pruning, Pruning):
        raise TypeError(f"pruning must be Continuous(), PostTraining() or ToSize(...), but got {described(pruning)}")


def check_callbacks(callbacks: Any) -> list[Callback]:
    """Return callbacks as a list, or raise ``TypeError`` if one is none."""
    checked = check_list("callbacks", callbacks, "Callback")
    for each in checked:
        if not isinstance(each, Callback):
            raise TypeError(f"callbacks must be a sequence of Callback, but got {described(each)}")
    return checked


def check_trained(model: NoisyNetwork, guide: FlatGuide, fine_tune_epochs: int) -> None:
    """Raise ``ValueError`` where epochs would have nothing to train."""
    weights = any(parameter.requires_grad for parameter in model.parameters())
    if not weights and fine_tune_epochs:
        raise ValueError(
            f"all weights of the model are frozen, so {fine_tune_epochs} epochs without noise have nothing to train: "
            "use fine_tune_epochs=0 and pruning=Continuous()"
        )
    if not all(parameter.requires_grad for parameter in guide.parameters()):
        raise ValueError("parameters of the guide are frozen (requires_grad=False): a fit trains them all")


def check_data_sets(
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
    with pyro.validation_enabled(False), torch.random.fork_rng([]):
        for source, model in itertools.product(sources, models):
            source.check(model)
    return sources[0], None if validation is None else sources[1]


@contextmanager
def counting_examples(model: NoisyNetwork, size: int) -> Iterator[None]:
    """Have ``model`` count ``size`` examples while it is fitted, if it has no number of its own."""
    if model.num_data is not None:
        if model.num_data != size:
            warnings.warn(
                f"num_data of the model is {model.num_data}, but train has {size} examples: the likelihood counts as "
                f"{model.num_data} examples; leave num_data out to have it count as {size}",
                FitWarning,
                stacklevel=4,
            )
        yield
        return
    model.num_data = size
    try:
        yield
    finally:
        model.num_data = None
