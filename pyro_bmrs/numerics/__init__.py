"""A Gaussian on an interval, in the form that survives floating point.

Everything the library knows about one structure is a Gaussian in ``x = log(theta)`` restricted to
``[low, high]``. Its integral can be as small as ``exp(-1e20)``, so nothing here ever leaves two
coordinates that stay of order one wherever the Gaussian sits:

- ``distance``: from the Gaussian's centre to the *nearest* bound, in units of its scale, positive when the
  centre lies outside the interval and negative when it lies inside;
- ``width``: of the interval, in the same units.

The Gaussian's height is measured from its **mode on the interval** (the bound, or the centre itself), so the
huge exponents that a normal density would bring cancel before they are ever computed. With
``t`` the displacement from the nearest bound, the density is proportional to
``exp(-(distance * t + t**2 / 2))`` on ``[0, width]``, and three regimes cover the plane:

- *narrow*: the density hardly changes over the interval; Gauss-Legendre quadrature around the middle;
- *interior*: the centre lies inside; ordinary normal CDFs, which do not cancel there;
- *tail*: the centre lies outside; Mills ratios and their continued fraction.

A product of Gaussians divided by another can curve the other way. ``log_quadratic_integral`` covers that too, with
Dawson's function in the place of the Mills ratio.

The regimes' values stand in ``regimes.py``, what is differentiable of them in ``interval.py``, the other way of curving
in ``quadratic.py``, exact quantiles in ``quantile.py``. What every training step needs is simpler and faster: the
divergence from uniform in ``divergence.py``, draws in ``sample.py``. All functions but those of draws expect float64
(callers convert at the edge); all work elementwise on broadcastable tensors. First and second derivatives are exact:
each cumulant's gradient is the next cumulant.
"""

from pyro_bmrs.numerics.divergence import kl_from_uniform, kl_of_truncated
from pyro_bmrs.numerics.interval import (
    interval_coordinates,
    log_integral,
    mean_displacement,
    relative_energy,
    variance,
)
from pyro_bmrs.numerics.quadratic import dawson, log_quadratic_integral
from pyro_bmrs.numerics.quantile import quantile
from pyro_bmrs.numerics.regimes import LOG_SQRT_2PI, can_branch_on
from pyro_bmrs.numerics.sample import sample, sample_and_kl

__all__ = [
    "LOG_SQRT_2PI",
    "can_branch_on",
    "dawson",
    "interval_coordinates",
    "kl_from_uniform",
    "kl_of_truncated",
    "log_integral",
    "log_quadratic_integral",
    "mean_displacement",
    "quantile",
    "relative_energy",
    "sample",
    "sample_and_kl",
    "variance",
]
