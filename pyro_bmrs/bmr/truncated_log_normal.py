r"""Rules for a truncated log-normal posterior, with log-uniform or truncated log-normal priors.

In :math:`x = \log\theta` every distribution here is :math:`e^{-E(x)}` on an interval, with :math:`E` quadratic (the
log-uniform's is zero), so posterior times reduced prior over prior is one too. Each is measured from its own mode
(``numerics``), which leaves a sum of terms that are small wherever the result is: eq. 8 of the paper subtracts numbers
near 4e14 to get there.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_bmrs import numerics
from pyro_bmrs.bmr.registry import register_evidence_change, register_reduced_posterior
from pyro_bmrs.distributions import LogUniform, TruncatedLogNormal

__all__: list[str] = []


@dataclass(frozen=True)
class _Quadratic:
    """A density of x = log(theta): ``exp(-energy(x) - log_mass)`` on ``[low, high]``, the energy 0 at its mode."""

    low: Tensor
    high: Tensor
    log_mass: Tensor
    precision: Tensor
    parameters: tuple[Tensor, ...]

    @staticmethod
    def of(distribution: LogUniform | TruncatedLogNormal) -> "_Quadratic":
        low, high = distribution.log_low.double(), distribution.log_high.double()
        if isinstance(distribution, LogUniform):
            return _Quadratic(low, high, torch.log(high - low), torch.zeros_like(low), ())
        parameters = distribution.double_parameters()
        scale = parameters[1]
        log_mass = numerics.log_integral(*distribution.interval_coordinates()) + torch.log(scale)
        return _Quadratic(low, high, log_mass, scale**-2, parameters)

    def energy(self, x: Tensor) -> Tensor:
        return numerics.excess(x, *self.parameters) if self.parameters else torch.zeros_like(x)

    def slope(self, x: Tensor) -> Tensor:
        return (x - self.parameters[0]) / self.parameters[1] / self.parameters[1] if self.parameters else torch.zeros_like(x)


def _evidence_change(
    q: TruncatedLogNormal, p: LogUniform | TruncatedLogNormal, reduced: LogUniform | TruncatedLogNormal
) -> Tensor:
    """Eqs. 8 and 10 of the paper, and their counterparts for a truncated log-normal prior, in one."""
    _check_supports(q, p, reduced)
    q_part, p_part, r_part = (_Quadratic.of(each) for each in (q, p, reduced))
    low, high = torch.broadcast_tensors(r_part.low, r_part.high)
    curvature = q_part.precision + (r_part.precision - p_part.precision)
    slope_low, slope_high = (
        q_part.slope(bound) + (r_part.slope(bound) - p_part.slope(bound)) for bound in (low, high)
    )
    mode = _lowest(slope_low, slope_high, curvature, low, high)
    energy = q_part.energy(mode) + (r_part.energy(mode) - p_part.energy(mode))
    log_mass = numerics.log_quadratic_integral(slope_low, -slope_high, curvature, high - low)
    return (log_mass - energy - q_part.log_mass - (r_part.log_mass - p_part.log_mass)).to(q.loc)


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
    q_part, p_part, r_part = (_Quadratic.of(each) for each in (q, p, reduced))
    curvature = q_part.precision + (r_part.precision - p_part.precision)
    if not bool((curvature > 0).all()):
        raise ValueError(
            "the reduced posterior is no truncated log-normal: with this prior its precision would be "
            f"{curvature.min():.3g}, since the posterior is wider than the prior; evidence_change is defined all the same"
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
