"""The guide of log-uniform and truncated log-normal noise."""

from functools import cache

import torch
from torch import Tensor, nn

from pyro_bmrs import numerics
from pyro_bmrs.checks import check_integer, check_number
from pyro_bmrs.distributions import LogUniform, TruncatedLogNormal
from pyro_bmrs.model.guides.flat import FlatGuide, at_least_float32
from pyro_bmrs.model.network import NoisyNetwork

__all__ = ["LOC_RANGE", "LOG_SCALE_RANGE", "SHARED_DRAWS", "TruncatedLogNormalGuide"]

SHARED_DRAWS = 16  # of each structure's noise in a batch, see ``draw_shared``
LOC_RANGE = (-1000.0, 1000.0)  # beyond, nothing that a posterior can say changes, and float32 runs out of digits
LOG_SCALE_RANGE = (-20.0, 5.0)


def _check_inside(name: str, value: float, bounds: tuple[float, float]) -> None:
    if not bounds[0] <= check_number(name, value, positive=False) <= bounds[1]:
        raise ValueError(f"{name} must lie between {bounds[0]:g} and {bounds[1]:g}, but got {value}")


class TruncatedLogNormalGuide(FlatGuide):
    r"""Mean-field guide: a truncated log-normal for the noise of every structure.

    Args:
        model: The model whose noise layers have log-uniform or truncated log-normal priors; the posterior takes over
            their bounds.
        init_loc: Initial location of :math:`\log\theta`.
        init_log_scale: Initial log standard deviation of :math:`\log\theta`.

    Attributes:
        loc: Parameter of shape ``(structures,)``; fitting keeps it within ``LOC_RANGE``.
        log_scale: Parameter of shape ``(structures,)``, used clamped to ``LOG_SCALE_RANGE``.
        lattice: Buffer of shape ``(structures, SHARED_DRAWS)``: of each structure, the strata of its shared draws.

    Raises:
        TypeError: If a noise layer's prior is of another type, or an initial value is no number.
        ValueError: If an initial value lies outside the range of its parameter.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), bmrs.MultiplicativeNoise(8), nn.Linear(8, 3))
        >>> guide = bmrs.TruncatedLogNormalGuide(bmrs.NoisyNetwork(net, num_data=100))
        >>> guide.posterior()["2.theta"].mean.shape
        torch.Size([8])
    """

    prior_types = (LogUniform, TruncatedLogNormal)
    parameter_ranges = {"loc": LOC_RANGE, "log_scale": LOG_SCALE_RANGE}
    lattice: Tensor

    def __init__(self, model: NoisyNetwork, init_loc: float = 0.0, init_log_scale: float = -5.0) -> None:
        super().__init__(model)
        _check_inside("init_loc", init_loc, LOC_RANGE)
        _check_inside("init_log_scale", init_log_scale, LOG_SCALE_RANGE)
        priors = list(self.prior().values())
        self.register_buffer("log_low", at_least_float32(torch.cat([prior.log_low for prior in priors])))
        self.register_buffer("log_high", at_least_float32(torch.cat([prior.log_high for prior in priors])))
        self.loc = nn.Parameter(torch.full_like(self.log_low, init_loc))
        self.log_scale = nn.Parameter(torch.full_like(self.log_low, init_log_scale))
        self.register_buffer("lattice", _drawn_lattice(len(self.loc)).to(self.loc), persistent=False)

    def draw_shared(self, examples: int) -> dict[str, Tensor]:
        """Draw ``SHARED_DRAWS`` noises of each structure, stratified, which the examples take in turn.

        They are the structure's quantiles at equal distances, all shifted by one random number, in an order of its own
        that stays the same. So each draw is exact, and independent of all other structures' in the same example, while
        their mean has little variance.
        """
        posterior = self.flat_posterior()
        if self._has_own("draw") or type(posterior) is not TruncatedLogNormal:
            return super().draw_shared(examples)
        return self._in_turn(posterior.rsample_at(self._strata(examples)), examples)

    def draw_and_kl(self, examples: int) -> tuple[dict[str, Tensor], Tensor]:
        uniform_priors = all(kind is LogUniform for kind, _, _ in self._prior_groups)
        own = self._has_own("draw", "draw_shared", "family", "flat_posterior", "kl")
        if own or not uniform_priors or self.loc.dtype != torch.float32:
            return super().draw_and_kl(examples)
        bounds = self.log_low, self.log_high
        theta, kl = numerics.sample_and_kl(self._strata(examples), self.loc, self._scale(), *bounds)
        return self._in_turn(theta, examples), (kl * (self.keep * self._site_weights())).sum()

    def select(self, kept: Tensor) -> None:
        super().select(kept)
        self.lattice = _draws_together(self.lattice)

    def check_priors(self) -> None:
        """Raise ``ValueError`` if a prior is not the one that the guide was made for any more, or bounds differ."""
        super().check_priors()
        priors = list(self.prior().values())
        for name in ("log_low", "log_high"):
            if not torch.equal(getattr(self, name), torch.cat([getattr(each, name) for each in priors]).to(self.loc)):
                raise ValueError(
                    f"{name} of the guide is not that of its model's priors: make {type(self).__name__}(model) again"
                )

    @torch.no_grad()
    def project_(self) -> None:
        self.loc.clamp_(*LOC_RANGE)
        self.log_scale.clamp_(*LOG_SCALE_RANGE)

    def family(self, index: slice | Tensor = slice(None)) -> TruncatedLogNormal:
        bounds = self.log_low[index], self.log_high[index]
        return TruncatedLogNormal(self.loc[index], self._scale(index), *bounds, validate_args=False)

    def _scale(self, index: slice | Tensor = slice(None)) -> Tensor:
        return torch.exp(self.log_scale[index].clamp(*LOG_SCALE_RANGE))

    def _strata(self, examples: int) -> Tensor:
        """Return uniforms in [0, 1), of shape ``(draws, structures)``."""
        check_integer("examples", examples, low=1)
        shift = torch.rand(self.loc.shape, dtype=self.loc.dtype, device=self.loc.device)
        return (self.lattice.t()[:examples] + shift).frac_()

    def _in_turn(self, theta: Tensor, examples: int) -> dict[str, Tensor]:
        """Split draws, of shape ``(draws, structures)``, into those of each site's examples."""
        theta = theta.repeat(-(-examples // len(theta)), 1)
        return self.split(theta if len(theta) == examples else theta[:examples])

    def _has_own(self, *methods: str) -> bool:
        """Return whether a subclass, or this guide alone, has methods of its own in the place of these."""
        return any(name in vars(self) for name in methods) or _subclass_has_own(type(self), *methods)


@cache
def _subclass_has_own(kind: type[TruncatedLogNormalGuide], *methods: str) -> bool:
    return any(getattr(kind, name) is not getattr(TruncatedLogNormalGuide, name) for name in methods)


def _drawn_lattice(structures: int) -> Tensor:
    """Return ``SHARED_DRAWS`` equidistant numbers in [0, 1), of shape ``(structures, SHARED_DRAWS)``.

    Each structure has them in an order of its own, always the same one: with one order for all, structures would be
    large and small together.
    """
    keys = torch.empty(structures, SHARED_DRAWS).uniform_(generator=torch.Generator().manual_seed(0))
    return _draws_together(keys.argsort(-1) / SHARED_DRAWS)


def _draws_together(lattice: Tensor) -> Tensor:
    """Return the same with what is drawn at once together in memory, as a step reads it."""
    return lattice.t().contiguous().t()
