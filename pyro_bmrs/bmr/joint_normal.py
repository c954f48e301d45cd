"""Normal distributions of the elements of sites, picked and put together: what a correlated reduction needs.

Elements are counted as in ``flatten()``. Sites on the positive numbers are taken in their logarithm, which leaves an
evidence change as it is.
"""

from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import Distribution, LogNormal, MultivariateNormal, Normal

__all__ = ["Moments", "as_multivariate", "block_diagonal", "log_space", "marginals", "moments"]

Moments = tuple[Tensor, Tensor]


def marginals(distribution: Any) -> Any:
    """Return the distribution of each element alone, of a normal distribution or point mass."""
    if isinstance(distribution, dist.Delta):
        return dist.Delta(distribution.v)
    if isinstance(distribution, MultivariateNormal):
        return dist.Normal(distribution.loc, distribution.stddev)
    return distribution


def log_space(distribution: Any, positive: bool) -> Any:
    """Return the distribution of the logarithm if the site is ``positive``, else the distribution."""
    if not positive:
        return distribution
    if isinstance(distribution, dist.Delta):
        return dist.Delta(torch.log(distribution.v))
    return distribution.base_dist if isinstance(distribution, LogNormal) else distribution


def moments(distribution: Distribution, index: Tensor) -> Moments:
    """Return location and covariance, in float64, of the elements ``index`` of a normal distribution.

    A point mass is the normal without variance.

    Raises:
        NotImplementedError: If the distribution is not normal.
    """
    if isinstance(distribution, MultivariateNormal):
        size = distribution.event_shape[0]
        row, column = index // size, index % size
        covariance = distribution.covariance_matrix.reshape(-1, size, size)[row[:, None], column[:, None], column]
        return distribution.loc.flatten()[index].double(), covariance.double() * (row[:, None] == row)
    if isinstance(distribution, Normal):
        return distribution.loc.flatten()[index].double(), distribution.scale.flatten()[index].double().square().diag()
    if isinstance(distribution, dist.Delta):
        loc = distribution.v.flatten()[index].double()
        return loc, loc.new_zeros(len(loc), len(loc))
    raise NotImplementedError(
        f"correlated elements need normal (or, in an autoguide, log-normal) priors, but got {distribution}; sum their "
        "delta_f if you take them for independent"
    )


def block_diagonal(parts: list[Moments]) -> Distribution:
    """Return the joint distribution of independent parts: normal, or a point mass if none has any variance.

    Raises:
        NotImplementedError: If only some elements are without variance.
    """
    loc, covariance = torch.cat([loc for loc, _ in parts]), torch.block_diag(*(each for _, each in parts))
    fixed = covariance.diagonal() == 0
    if bool(fixed.all()):
        return dist.Delta(loc, event_dim=1)
    if bool(fixed.any()):
        raise NotImplementedError(
            "some of these correlated elements are fixed at a point and some are not; fix all of them, or give the "
            "point ones a narrow Normal"
        )
    return dist.MultivariateNormal(loc, covariance, validate_args=False)


def as_multivariate(distribution: Any) -> Any:
    """Return a normal distribution or point mass over the last dimension's elements as one of their vector."""
    if isinstance(distribution, Normal):
        return dist.MultivariateNormal(distribution.loc, scale_tril=torch.diag_embed(distribution.scale))
    if isinstance(distribution, dist.Delta):
        return dist.Delta(distribution.v, event_dim=1)
    return distribution
