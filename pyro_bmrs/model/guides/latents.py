"""A guide for what of a model is latent besides its noise: weights with a prior, a layer's scale with a hyperprior."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import pyro
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoGuide
from pyro.poutine.util import site_is_subsample
from torch import Tensor, nn

from pyro_bmrs.checks import described
from pyro_bmrs.randomness import local_seed
from pyro_bmrs.structures.copying import undisturbed
from pyro_bmrs.structures.inputs import first_examples

__all__ = ["LatentDraw", "LatentGuide"]

_DRAWS = 200  # of a guide without medians, whose mean stands for it


class LatentDraw(NamedTuple):
    """A draw of every other latent site: its value by name, and the log of their joint density, of shape ``()``."""

    values: dict[str, Tensor]
    log_prob: Tensor


class LatentGuide:
    """What a fit and a prediction ask of the guide of other latent sites.

    Args:
        guide: A guide that is a module: an autoguide, or a ``PyroModule`` with sample statements.
        noise: Names of the model's noise sites, which it must leave alone.
        sampled: Names of the sites of the network's weights that have a prior.

    Raises:
        TypeError: If ``guide`` is no module.
    """

    def __init__(self, guide: Any, noise: list[str], sampled: list[str]) -> None:
        if not isinstance(guide, nn.Module):
            raise TypeError(
                "the guide of other latent sites must be a module, for instance AutoNormal or a PyroModule, whose "
                f"parameters can be trained, but got {described(guide)}"
            )
        self.module, self._noise, self._sampled = guide, noise, sampled
        self._arguments: tuple[Any, ...] | None = None

    def set_up(self, x: Any, y: Tensor) -> None:
        """Run it once on a few examples, as autoguides need it before they have parameters.

        Raises:
            ValueError: If it draws one of the noise sites too.
        """
        self._arguments = first_examples(x, 2), y[:2]
        for site in self._sampled:
            if self._sampled.count(site) > 1:
                raise ValueError(
                    f"several layers have weights that are the sample site {site!r}: put them into PyroModule modules, "
                    "for instance PyroModule[nn.Sequential](...), and Pyro names each after its layer"
                )
        with undisturbed(self.module):
            values = self.draw(*self._arguments).values
        for site in self._noise:
            if site in values:
                raise ValueError(
                    f"the guide of other latent sites draws the noise {site!r} too: make it of "
                    "poutine.block(model, hide=list(model.sizes)), or give its class alone, add_latents(AutoNormal)"
                )

    def draw(self, *args: Any, **kwargs: Any) -> LatentDraw:
        """Draw every site once."""
        with _own_parameters():
            trace = poutine.trace(self.module).get_trace(*args, **kwargs)
        nodes = {
            name: node
            for name, node in trace.nodes.items()
            if node["type"] == "sample" and not (node["is_observed"] or site_is_subsample(node))
        }
        values = {name: node["value"] for name, node in nodes.items() if not node["infer"].get("is_auxiliary")}
        return LatentDraw(values, trace.log_prob_sum())

    @torch.no_grad()
    def draws(self, count: int) -> tuple[dict[str, Tensor], Tensor]:
        """Return draws of each site, of shape ``(count, *site)``, and the logs of their densities, ``(count,)``."""
        drawn = [self.draw(*self._known_arguments()) for _ in range(count)]
        values = {name: torch.stack([each.values[name] for each in drawn]) for name in drawn[0].values}
        return values, torch.stack([torch.as_tensor(each.log_prob).double() for each in drawn])

    @torch.no_grad()
    def point(self) -> dict[str, Tensor]:
        """Return one value of each site that stands for its posterior: an autoguide's median, or else a mean of draws.

        Raises:
            ValueError: If it has never been run.
        """
        arguments = self._known_arguments()
        if isinstance(self.module, AutoGuide):
            try:
                with _own_parameters():
                    return {name: each.detach() for name, each in self.module.median(*arguments).items()}
            except NotImplementedError:
                pass  # as flows
        with local_seed(0):
            return {name: each.mean(0) for name, each in self.draws(_DRAWS)[0].items()}

    def _known_arguments(self) -> tuple[Any, ...]:
        if self._arguments is None:
            raise ValueError("the guide of the model's other latent sites has not been fitted: fit it first")
        return self._arguments


@contextmanager
def _own_parameters() -> Iterator[None]:
    """Have a guide use its own parameters, not those that the global store may have under their names.

    Pyro's own inference reads them from the store: inside it nothing changes.
    """
    if pyro.poutine.runtime._PYRO_STACK:
        yield
        return
    with pyro.get_param_store().scope():
        yield
