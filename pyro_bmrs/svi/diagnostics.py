"""Whether a posterior has moved and converged, when the epochs with noise have ended."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_bmrs.model.guides.flat import FlatGuide
from pyro_bmrs.randomness import local_seed
from pyro_bmrs.svi.checkpoint import State
from pyro_bmrs.svi.data.in_memory import InMemory
from pyro_bmrs.svi.data.source import Source
from pyro_bmrs.svi.importance import FEWEST_RATIOS, log_ratios

__all__ = ["Diagnostics", "PosteriorWatch"]

_HARDLY = 0.01  # of a parameter: what a few steps of Adam move it by
_MOVES = 0.1  # less is no move, whatever it is a part of
_DRAWS = 200
_EPOCHS_PER_DRAW = 10 / 3  # a pass over the data without gradients takes a third of an epoch: all take a tenth of them
_AT_ONCE = 20  # of them, so that a million structures have room

BySite = dict[str, Tensor]


@dataclass(frozen=True)
class Diagnostics:
    """How the posterior stood when the epochs with noise had ended; ``print`` gives three lines.

    Each is a tensor of shape ``(size,)`` for each site, in the numbering of the network that was given to ``fit``.

    Attributes:
        unmoved: bool; every parameter of the structure's posterior is within 0.01 of where it began.
        moving: bool; a parameter went at least half as far in the last tenth of the epochs as in their average tenth,
            and further than 0.1: more epochs, or a decay of the learning rates, would let it converge.
        at_bound: bool; a parameter is at the end of the range that its guide keeps it in.
        overlap: Mass that posterior and prior have in common, from 0 to 1, of 200 draws; near 1, the data say nothing
            of the structure. NaN where it has been cut out by shrinking.
        log_ratios: Logs of the importance ratios of 25 draws, of shape ``(25,)``: density of what the posterior
            approximates, noise given the data, over its own. None where 25 passes over the data would take more than a
            tenth of the fit (fewer than 84 epochs with noise), where data are loaded as they are used, there are other
            latent sites, or sites differ in the weight of their KL.
    """

    unmoved: BySite
    moving: BySite
    at_bound: BySite
    overlap: BySite
    log_ratios: Tensor | None = None

    @property
    def pareto_k(self) -> float | None:
        """Pareto k-hat of the importance ratios: above 0.7 they cannot correct the posterior (Yao et al., 2018)."""
        from pyro_bmrs._arviz import pareto_k  # noqa: PLC0415  (ArviZ takes as long to import as torch)

        if self.log_ratios is None:
            return None
        return float(pareto_k((self.log_ratios - self.log_ratios.max()).unsqueeze(0).numpy())[0])

    def __str__(self) -> str:
        unmoved, moving, at_bound = (_counted(each) for each in (self.unmoved, self.moving, self.at_bound))
        overlap = torch.cat([each[each.isfinite()] for each in self.overlap.values()])
        prior = int((overlap > 0.5).sum())
        return (
            f"posterior at its initial value: {unmoved}\n"
            f"still moving at the end: {moving}; at a bound of its range: {at_bound}\n"
            f"more than half prior: {prior:,} of {len(overlap):,} structures (median overlap {_median(overlap):.2f})"
            + ("" if self.log_ratios is None else f"; k-hat of importance ratios {self.pareto_k:.2f}")
        )


class PosteriorWatch:
    """Notes a guide's parameters before a fit, and when the last tenth of the epochs with noise begins and ends.

    Args:
        guide: The guide.
        noisy_epochs: Number of epochs with noise.
    """

    def __init__(self, guide: FlatGuide, noisy_epochs: int) -> None:
        self.guide = guide
        self._late = noisy_epochs - max(noisy_epochs // 10, 1)
        self._share = (noisy_epochs - self._late) / max(noisy_epochs, 1)
        self._noisy_epochs = noisy_epochs
        self._start = _parameters(guide)
        self._before_last = self._start
        self._log_ratios: Tensor | None = None

    def note(self, epoch: int) -> None:
        """Note the posterior at the end of an epoch with noise, counted from 1, if it is the last but one tenth."""
        if epoch == self._late:
            self._before_last = _parameters(self.guide)

    def note_end(self, data: Source) -> None:
        """Take the importance ratios, when the epochs with noise have ended: later, weights no longer fit its draws."""
        model, guide = self.guide.model, self.guide
        simple = set(model.kl_weights.values()) == {1.0} and guide.latents is None and isinstance(data, InMemory)
        if simple and self._noisy_epochs >= _EPOCHS_PER_DRAW * FEWEST_RATIOS:
            self._log_ratios = log_ratios(model, guide, data).cpu()

    def state(self) -> State:
        """Return all that a resumed fit needs to know."""
        noted = {"start": self._start, "before_last": self._before_last}
        tensors = {f"{when}.{name}": value for when, values in noted.items() for name, value in values.items()}
        return State(tensors if self._log_ratios is None else {**tensors, "log_ratios": self._log_ratios})

    def restore(self, state: State) -> None:
        """Take up what ``state`` returned.

        Raises:
            ValueError: If it is of another guide.
        """
        for when, known in (("start", self._start), ("before_last", self._before_last)):
            for name, value in known.items():
                if state.tensors[f"{when}.{name}"].shape != value.shape:
                    raise ValueError(f"what was noted of {name!r} is of another guide")
        self._start, self._before_last = (
            {name: state.tensors[f"{when}.{name}"].to(value) for name, value in self._start.items()}
            for when in ("start", "before_last")
        )
        self._log_ratios = state.tensors.get("log_ratios")

    @torch.no_grad()
    def diagnostics(self) -> Diagnostics:
        """Return how the posterior stands."""
        now = _parameters(self.guide)
        way = _distance(now, self._start)
        last = _distance(now, self._before_last)
        bounds = torch.stack([_at(now[name], ends) for name, ends in self.guide.parameter_ranges.items()] or [way < 0])
        moving = (last >= 0.5 * self._share * way) & (last > _MOVES)
        return Diagnostics(
            unmoved=self._by_site(way < _HARDLY),
            moving=self._by_site(moving),
            at_bound=self._by_site(bounds.any(0)),
            overlap=_overlap(self.guide),
            log_ratios=self._log_ratios,
        )

    def _by_site(self, values: Tensor) -> BySite:
        sizes = [layer.original_size for layer in self.guide.noise.values()]
        return dict(zip(self.guide.sizes, values.split(sizes), strict=True))


@torch.no_grad()
def _parameters(guide: FlatGuide) -> dict[str, Tensor]:
    """Return a copy of each parameter in the numbering of the original network, NaN where a structure has been cut."""
    found = {}
    for name, parameter in guide.named_parameters():
        by_site = guide.split(parameter.detach()).items()
        found[name] = torch.cat([guide.noise[site].in_original(values, math.nan) for site, values in by_site])
    return found


def _distance(now: Mapping[str, Tensor], then: Mapping[str, Tensor]) -> Tensor:
    """Return how far the parameter of each structure that has moved most is from where it was; NaN for cut ones."""
    return torch.stack([(now[name] - then[name]).abs().float() for name in now]).amax(0)


def _at(values: Tensor, ends: tuple[float, float]) -> Tensor:
    return (values <= ends[0] + 1e-3) | (values >= ends[1] - 1e-3)


def _overlap(guide: FlatGuide) -> BySite:
    """Return the mass that posterior and prior share, the mean over draws of the posterior of ``min(1, p / q)``."""
    priors, found = guide.prior(), {}
    with local_seed(0, [guide.device], validate=False):
        for site, posterior in guide.posterior().items():
            shared = torch.zeros(posterior.batch_shape, device=guide.device)
            for _ in range(_DRAWS // _AT_ONCE):
                theta = posterior.sample((_AT_ONCE,))
                ratio = priors[site].log_prob(theta).double() - posterior.log_prob(theta).double()
                shared += ratio.clamp(max=0).exp().sum(0)
            found[site] = guide.noise[site].in_original(shared / _DRAWS, math.nan)
    return found


def _counted(masks: BySite) -> str:
    every = torch.cat(list(masks.values()))
    sites = [f"{site.removesuffix('.theta')}: {int(mask.sum())}" for site, mask in masks.items() if bool(mask.any())]
    where = f" ({', '.join(sites[:4])}{', ...' if len(sites) > 4 else ''})" if sites else ""
    return f"{int(every.sum()):,} of {len(every):,} structures{where}"


def _median(values: Tensor) -> float:
    return float(values.median()) if len(values) else math.nan
