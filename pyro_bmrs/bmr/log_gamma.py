r"""Second differences of the log-normalisers that are made of log-gamma functions, without their cancellation.

At a concentration of 1e6 log-gamma is near 1e7, and four of them make a change of evidence of order one. Here
:math:`n = q + r - p`, and :math:`\log(n p) - \log(q r) = \log(1 - (q - p)(r - p) / (q r))` is the second difference
of the logarithm, from which the others are built. All are 0 where ``r`` equals ``p``.
"""

import torch
from torch import Tensor

__all__ = ["gamma_second_difference", "log_gamma_second_difference", "log_second_difference", "subtract_prior"]

_SHIFT = 10  # log-gamma's series is used beyond this, its recurrence below
# Stirling's series, B_2k / (2k (2k - 1)): below 1e-16 after these terms from 10 on.
_STIRLING = (1 / 12, -1 / 360, 1 / 1260, -1 / 1680, 1 / 1188, -691 / 360360, 1 / 156)


def subtract_prior(q: Tensor, p: Tensor, r: Tensor) -> Tensor:
    """Return ``q + r - p`` correctly rounded, however close to 0 it is (Knuth's two-sum, twice)."""
    first, first_error = _two_sum(r, -p)
    second, second_error = _two_sum(q, first)
    return second + torch.where(torch.isfinite(second), first_error + second_error, 0.0)


def _two_sum(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Return the rounded sum and its rounding error."""
    total = x + y
    from_y = total - x
    return total, (x - (total - from_y)) + (y - from_y)


def log_second_difference(q: Tensor, p: Tensor, r: Tensor, n: Tensor) -> Tensor:
    """Return ``log(n) + log(p) - log(q) - log(r)``, elementwise, for positive arguments with ``n = q + r - p``."""
    share = (q - p) / q * ((r - p) / r)
    far = share > 0.5  # where n or p is small against q and r
    near = torch.log1p(-torch.where(far, 0.0, share))
    return torch.where(far, (torch.log(n) - torch.log(r)) + (torch.log(p) - torch.log(q)), near)


def _x_log_x_second_difference(q: Tensor, p: Tensor, r: Tensor, n: Tensor, offset: float) -> Tensor:
    """Return the second difference of ``(x - offset) * log(x)``."""
    along = (q - p) * torch.log1p((r - p) / q) + (r - p) * torch.log1p((q - p) / r)
    return (p - offset) * log_second_difference(q, p, r, n) + along


def log_gamma_second_difference(q: Tensor, p: Tensor, r: Tensor, n: Tensor) -> Tensor:
    """Return ``lgamma(n) + lgamma(p) - lgamma(q) - lgamma(r)``, elementwise, for positive arguments."""
    total = torch.zeros_like(n)
    for k in range(_SHIFT):
        total = total - log_second_difference(q + k, p + k, r + k, n + k)
    q, p, r, n = q + _SHIFT, p + _SHIFT, r + _SHIFT, n + _SHIFT
    remainder = (_stirling_remainder(n) - _stirling_remainder(q)) + (_stirling_remainder(p) - _stirling_remainder(r))
    return total + _x_log_x_second_difference(q, p, r, n, 0.5) + remainder


def _stirling_remainder(x: Tensor) -> Tensor:
    """Return ``lgamma(x) - ((x - 1/2) log x - x + log(2 pi) / 2)`` for x >= 10."""
    inverse_square = 1 / x**2
    series = torch.zeros_like(x)
    for coefficient in reversed(_STIRLING):
        series = series * inverse_square + coefficient
    return series / x


def gamma_second_difference(q: Tensor, p: Tensor, r: Tensor, n: Tensor) -> Tensor:
    """Return the second difference of ``lgamma(a) - a * log(b)`` over ``(a, b)`` on the last dimension."""
    (q_a, q_b), (p_a, p_b), (r_a, r_b), (n_a, n_b) = (each.unbind(-1) for each in (q, p, r, n))
    of_rates = p_a * log_second_difference(q_b, p_b, r_b, n_b)
    of_rates = of_rates + (q_a - p_a) * torch.log1p((r_b - p_b) / q_b) + (r_a - p_a) * torch.log1p((q_b - p_b) / r_b)
    return log_gamma_second_difference(q_a, p_a, r_a, n_a) - of_rates
