r"""Rules for a truncated log-normal posterior, with log-uniform or truncated log-normal priors.

In :math:`x = \log\theta` every distribution here is :math:`e^{-E(x)}` on an interval, with :math:`E` quadratic (the
log-uniform's is zero), so posterior times reduced prior over prior is one too. Each is measured from its own mode
(``numerics``), which leaves a sum of terms that are small wherever the result is: eq. 8 of the paper subtracts numbers
near 4e14 to get there.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_bmrs import numerics
from pyro_bmrs.bmr.registry import register_evidence_change, register_reduced_posterior
from pyro_bmrs.distributions import LogUniform, TruncatedLogNormal

__all__: list[str] = []


_BLOCK = 1 << 15  # structures computed at once: what stays in a core's cache

Parameters = tuple[Tensor, ...]


@dataclass(frozen=True)
class _Quadratic:
    """A density of x = log(theta): ``exp(-energy(x) - log_mass)`` on ``[low, high]``, the energy 0 at its mode.

    Made from ``(low, high)``, log-uniform, or ``(loc, scale, low, high)``, truncated log-normal.
    """

    parameters: Parameters

    @property
    def low(self) -> Tensor:
        return self.parameters[-2]

    @property
    def high(self) -> Tensor:
        return self.parameters[-1]

    @property
    def is_flat(self) -> bool:
        return len(self.parameters) == 2

    @property
    def precision(self) -> Tensor:
        return torch.zeros_like(self.low) if self.is_flat else self.parameters[1] ** -2

    @property
    def log_mass(self) -> Tensor:
        if self.is_flat:
            return torch.log(self.high - self.low)
        return numerics.log_integral(*numerics.interval_coordinates(*self.parameters)) + torch.log(self.parameters[1])

    def energy(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x) if self.is_flat else numerics.relative_energy(x, *self.parameters)

    def slope(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x) if self.is_flat else (x - self.parameters[0]) / self.parameters[1] ** 2


def _parameters(distribution: LogUniform | TruncatedLogNormal) -> Parameters:
    if isinstance(distribution, LogUniform):
        return distribution.log_low.double(), distribution.log_high.double()
    return distribution.double_parameters()


def _evidence_change(
    q: TruncatedLogNormal, p: LogUniform | TruncatedLogNormal, reduced: LogUniform | TruncatedLogNormal
) -> Tensor:
    """Eqs. 8 and 10 of the paper, and their counterparts for a truncated log-normal prior, in one."""
    _check_supports(q, p, reduced)
    return _in_blocks(_log_expected_ratio, *map(_parameters, (q, p, reduced))).to(q.loc)


def _in_blocks(function: Callable[..., Tensor], *groups: Parameters) -> Tensor:
    """Call ``function`` on groups of tensors block by block of their common shape, so that memory stays linear."""
    shape = torch.broadcast_shapes(*(tensor.shape for group in groups for tensor in group))
    if shape.numel() <= _BLOCK:
        return function(*groups)
    starts = range(0, shape.numel(), _BLOCK)
    flat = [[t.reshape(-1) if t.numel() == 1 else t.expand(shape).reshape(-1) for t in group] for group in groups]
    blocks = [
        function(*(tuple(t if t.numel() == 1 else t[start : start + _BLOCK] for t in group) for group in flat))
        for start in starts
    ]
    return torch.cat(blocks).reshape(shape)


def _log_expected_ratio(q_parameters: Parameters, p_parameters: Parameters, r_parameters: Parameters) -> Tensor:
    """Return the log of the posterior's mean of reduced prior over prior."""
    q, p, r = map(_Quadratic, (q_parameters, p_parameters, r_parameters))
    curvature = q.precision + (r.precision - p.precision)
    slope_low, slope_high = (q.slope(bound) + (r.slope(bound) - p.slope(bound)) for bound in (r.low, r.high))
    mode = _lowest(slope_low, slope_high, curvature, r.low, r.high)
    energy = q.energy(mode) + (r.energy(mode) - p.energy(mode))
    log_mass = numerics.log_quadratic_integral(slope_low, -slope_high, curvature, r.high - r.low)
    return log_mass - energy - q.log_mass - (r.log_mass - p.log_mass)


def _lowest(slope_low: Tensor, slope_high: Tensor, curvature: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Return where in ``[low, high]`` the quadratic with these slopes at its ends is least."""
    bowl = curvature * (high - low) > 0
    from_low = -slope_low / torch.where(bowl, curvature, 1.0)
    from_high = -slope_high / torch.where(bowl, curvature, 1.0)
    inside = torch.where(from_low < 0.5 * (high - low), low + from_low, high + from_high)  # from the nearer end
    end = torch.where(slope_low + slope_high >= 0, low, high)
    return torch.where(bowl, torch.clamp(inside, low, high), end)


def _reduced_posterior(
    q: TruncatedLogNormal, p: LogUniform | TruncatedLogNormal, reduced: LogUniform | TruncatedLogNormal
) -> TruncatedLogNormal:
    """Return the truncated log-normal with the precisions' sum, which must be positive."""
    _check_supports(q, p, reduced)
    q_part, p_part, r_part = (_Quadratic(_parameters(each)) for each in (q, p, reduced))
    curvature = q_part.precision + (r_part.precision - p_part.precision)
    if not bool((curvature > 0).all()):
        raise ValueError(
            "the reduced posterior is no truncated log-normal: with this prior its precision would be "
            f"{curvature.min():.3g}, since the posterior is wider than the prior; evidence_change is defined regardless"
        )
    nearest = torch.clamp(q.loc.double(), r_part.low, r_part.high)
    slope = q_part.slope(nearest) + (r_part.slope(nearest) - p_part.slope(nearest))
    loc, scale = nearest - slope / curvature, torch.rsqrt(curvature)
    return TruncatedLogNormal(loc.to(q.loc), scale.to(q.loc), reduced.log_low, reduced.log_high, validate_args=False)


for _prior in (LogUniform, TruncatedLogNormal):
    for _reduced in (LogUniform, TruncatedLogNormal):
        register_evidence_change(TruncatedLogNormal, _prior, _reduced)(_evidence_change)
        register_reduced_posterior(TruncatedLogNormal, _prior, _reduced)(_reduced_posterior)


def _check_supports(
    q: TruncatedLogNormal, p: LogUniform | TruncatedLogNormal, reduced: LogUniform | TruncatedLogNormal
) -> None:
    for name, inner in (("posterior", q), ("reduced prior", reduced)):
        if not bool(((p.log_low <= inner.log_low) & (inner.log_high <= p.log_high)).all()):
            raise ValueError(
                f"the {name}'s support [exp({inner.log_low}), exp({inner.log_high})] must lie within the prior's "
                f"[exp({p.log_low}), exp({p.log_high})]"
            )
    if not bool(((q.log_low <= reduced.log_low) & (reduced.log_high <= q.log_high)).all()):
        raise ValueError("the reduced prior's support must lie within the posterior's; give all three the same bounds")
