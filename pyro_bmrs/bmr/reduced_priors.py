"""Priors that would remove a structure: the paper's two."""

import math
from collections.abc import Callable
from functools import singledispatch, wraps
from typing import Any

import torch
from torch.distributions import Distribution, HalfCauchy, HalfNormal

from pyro_bmrs.checks import check_number
from pyro_bmrs.distributions import LogUniform, TruncatedLogNormal

__all__ = ["precision_window", "spike"]


def _by_type_of_first(function: Callable[..., Any]) -> Any:
    """Make a function dispatch on the type of its first argument, which may also be given by name."""
    dispatched = singledispatch(function)
    first = function.__code__.co_varnames[0]

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if not args and first in kwargs:
            args = (kwargs.pop(first),)
        return dispatched(*args, **kwargs)

    call.register = dispatched.register  # type: ignore[attr-defined]
    return call


@_by_type_of_first
def spike(prior: Any, scale: float = 1e-6) -> Distribution:
    r"""Return BMRS_N's reduced prior: all mass within about ``scale`` of the prior's lower bound.

    For a log-uniform or truncated log-normal prior, a truncated log-normal on its support with location
    :math:`\tilde\mu = \log a` (section 3.1 of the paper, with :math:`\tilde\sigma^2 = 10^{-12}`). As ``scale`` goes to
    0, :math:`\Delta F` becomes the Savage-Dickey density ratio :math:`\log q(a) - \log p(a)`. For a half-normal or
    half-Cauchy prior, the same one of ``scale`` times its scale. Families of your own say what their spike is with
    ``@spike.register``.

    Args:
        prior: The prior on the noise.
        scale: :math:`\tilde\sigma` > 0, in units of :math:`\log\theta`.

    Raises:
        ValueError: If ``scale`` is not a positive number.
        NotImplementedError: If no spike is known for this type of prior.

    Example:
        >>> bmrs.spike(bmrs.LogUniform(-20.0, 0.0)).loc
        tensor(-20.)
    """
    raise NotImplementedError(
        f"no spike is known for a {type(prior).__name__} prior; register one with @spike.register, or name the "
        "reduced prior yourself in a subclass of EvidenceCriterion"
    )


@spike.register(LogUniform)
@spike.register(TruncatedLogNormal)
def _spike_at_lower_bound(prior: LogUniform | TruncatedLogNormal, scale: float = 1e-6) -> TruncatedLogNormal:
    check_number("scale", scale)
    return TruncatedLogNormal(
        prior.log_low, torch.full_like(prior.log_low, scale), prior.log_low, prior.log_high, validate_args=False
    )


@spike.register(HalfNormal)
@spike.register(HalfCauchy)
def _spike_of_small_scale(prior: Any, scale: float = 1e-6) -> Distribution:
    """Return the prior, ``scale`` times as wide."""
    check_number("scale", scale)
    return type(prior)(prior.scale * scale, validate_args=False)


@_by_type_of_first
def precision_window(prior: Any, p1: float = 8, p2: float | None = 23) -> Distribution:
    r"""Return BMRS_U's reduced prior: log-uniform on :math:`[2^{-p_2}, 2^{-p_1}]` (eq. 10 of the paper).

    Noise below :math:`2^{-p_1}` is lost when it multiplies numbers of :math:`p_1` bits; :math:`2^{-23}` is
    the resolution of float32.

    Args:
        prior: The prior on the noise.
        p1: Bits that the noise must reach to matter.
        p2: Bits below which nothing is representable; None reaches down to the prior's own lower bound, so that
            a structure that collapsed onto it is not kept for being *too* small.

    Raises:
        ValueError: If the window is empty or reaches outside the prior's support.
        NotImplementedError: If no window is known for this type of prior; families of your own say what it is with
            ``@precision_window.register``.

    Example:
        >>> window = bmrs.precision_window(bmrs.LogUniform(-20.0, 0.0), p1=8, p2=None)
        >>> round(window.log_high.exp().item(), 6)  # 2^-8
        0.003906
    """
    raise NotImplementedError(
        f"no precision window is known for a {type(prior).__name__} prior, only for LogUniform and TruncatedLogNormal "
        "ones: use BMRS_N, or register one with @precision_window.register"
    )


@precision_window.register(LogUniform)
@precision_window.register(TruncatedLogNormal)
def _window_of_logs(prior: LogUniform | TruncatedLogNormal, p1: float = 8, p2: float | None = 23) -> LogUniform:
    check_number("p1", p1, positive=False)
    if p2 is not None:
        check_number("p2", p2, positive=False)
    log_high = torch.full_like(prior.log_high, -p1 * math.log(2))
    log_low = prior.log_low if p2 is None else torch.full_like(prior.log_low, -p2 * math.log(2))
    inside = (prior.log_low <= log_low) & (log_low < log_high) & (log_high <= prior.log_high)
    if not bool(inside.all()):
        low = "the prior's lower bound" if p2 is None else f"2^({-p2:g})"
        raise ValueError(
            f"the window from {low} to 2^({-p1:g}) must not be empty and must lie within the prior's support "
            f"[exp({prior.log_low.min():g}), exp({prior.log_high.max():g})]; choose p1 < p2, or p2=None to reach down "
            "to the prior's bound"
        )
    return LogUniform(log_low, log_high, validate_args=False)
