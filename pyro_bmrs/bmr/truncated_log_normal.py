r"""Rules for a truncated log-normal posterior.

In :math:`x = \log\theta` every distribution here is a Gaussian on an interval (the log-uniform one of precision
zero), so posterior times reduced prior is one again. Each of the Gaussians is measured from its mode on its own
interval (``numerics``), which leaves a sum of terms that are small wherever the result is: eq. 8 of the paper
subtracts numbers near 4e14 to get there.
"""

import torch
from torch import Tensor

from pyro_bmrs import numerics
from pyro_bmrs.bmr.registry import register_evidence_change, register_reduced_posterior
from pyro_bmrs.distributions import LogUniform, TruncatedLogNormal

__all__: list[str] = []


@register_reduced_posterior(TruncatedLogNormal, LogUniform, LogUniform)
def _reduced_posterior_window(q: TruncatedLogNormal, p: LogUniform, reduced: LogUniform) -> TruncatedLogNormal:
    _check_supports(q, p, reduced)
    return TruncatedLogNormal(q.loc, q.scale, reduced.log_low, reduced.log_high, validate_args=False)


@register_reduced_posterior(TruncatedLogNormal, LogUniform, TruncatedLogNormal)
def _reduced_posterior_log_normal(
    q: TruncatedLogNormal, p: LogUniform, reduced: TruncatedLogNormal
) -> TruncatedLogNormal:
    _check_supports(q, p, reduced)
    loc, scale = _product(q, reduced)
    return TruncatedLogNormal(loc.to(q.loc), scale.to(q.loc), reduced.log_low, reduced.log_high, validate_args=False)


@register_evidence_change(TruncatedLogNormal, LogUniform, LogUniform)
def _evidence_change_window(q: TruncatedLogNormal, p: LogUniform, reduced: LogUniform) -> Tensor:
    """Eqs. 10 and 11 of the paper: width ratio plus the log mass of q in the window."""
    _check_supports(q, p, reduced)
    loc, scale, low, high = q.double_parameters()
    window = reduced.log_low.double(), reduced.log_high.double()
    log_widths = torch.log(p.log_width.double()) - torch.log(window[1] - window[0])
    mode = torch.clamp(loc, *window)
    log_mass = numerics.log_integral(*numerics.interval_coordinates(loc, scale, *window))
    log_mass = log_mass - numerics.log_integral(*q.interval_coordinates())
    return (log_widths + log_mass - numerics.excess(mode, loc, scale, low, high)).to(q.loc)


@register_evidence_change(TruncatedLogNormal, LogUniform, TruncatedLogNormal)
def _evidence_change_log_normal(q: TruncatedLogNormal, p: LogUniform, reduced: TruncatedLogNormal) -> Tensor:
    """Eq. 8 of the paper, equal to it and without its cancellation."""
    _check_supports(q, p, reduced)
    q_parameters, r_parameters = q.double_parameters(), reduced.double_parameters()
    loc, scale = _product(q, reduced)
    mode = torch.clamp(loc, *r_parameters[2:])
    log_mass = numerics.log_integral(*_product_coordinates(q, reduced)) + torch.log(scale)
    for each in (q, reduced):
        log_mass = log_mass - numerics.log_integral(*each.interval_coordinates()) - torch.log(each.scale.double())
    drop = numerics.excess(mode, *q_parameters) + numerics.excess(mode, *r_parameters)
    return (torch.log(p.log_width.double()) + log_mass - drop).to(q.loc)


def _product(q: TruncatedLogNormal, reduced: TruncatedLogNormal) -> tuple[Tensor, Tensor]:
    """Return centre and scale of the product of the two Gaussians."""
    q_loc, q_scale, _, _ = q.double_parameters()
    r_loc, r_scale, _, _ = reduced.double_parameters()
    norm = torch.hypot(q_scale, r_scale)
    q_share, r_share = (r_scale / norm) ** 2, (q_scale / norm) ** 2  # each centre weighs by the other's variance
    loc = torch.where(q_share > r_share, q_loc + (r_loc - q_loc) * r_share, r_loc + (q_loc - r_loc) * q_share)
    return loc, q_scale * (r_scale / norm)


def _product_coordinates(q: TruncatedLogNormal, reduced: TruncatedLogNormal) -> tuple[Tensor, Tensor]:
    """Return the product's coordinates on the reduced prior's support.

    Its centre can lie within rounding of the spike's and still many of its own scales from it, so the bounds are
    standardised under each factor first and combined then.
    """
    q_loc, q_scale, _, _ = q.double_parameters()
    r_loc, r_scale, low, high = reduced.double_parameters()
    norm = torch.hypot(q_scale, r_scale)
    to_low, to_high = (
        (bound - q_loc) / q_scale * (r_scale / norm) + (bound - r_loc) / r_scale * (q_scale / norm)
        for bound in (low, high)
    )
    return torch.maximum(to_low, -to_high), (high - low) / q_scale * (norm / r_scale)


def _check_supports(q: TruncatedLogNormal, p: LogUniform, reduced: LogUniform | TruncatedLogNormal) -> None:
    for name, inner in (("posterior", q), ("reduced prior", reduced)):
        if not bool(((p.log_low <= inner.log_low) & (inner.log_high <= p.log_high)).all()):
            raise ValueError(
                f"the {name}'s support [exp({inner.log_low}), exp({inner.log_high})] must lie within the prior's "
                f"[exp({p.log_low}), exp({p.log_high})]"
            )
    if not bool(((q.log_low <= reduced.log_low) & (reduced.log_high <= q.log_high)).all()):
        raise ValueError("the reduced prior's support must lie within the posterior's; give all three the same bounds")
