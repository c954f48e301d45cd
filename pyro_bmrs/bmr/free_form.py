r"""Evidence without a family: the best factor of a mean-field posterior, whatever its shape.

Given the posterior of all other noise, the factor that maximises the ELBO is

.. math:: q^*_i(\theta) \propto p(\theta) \, e^{L_i(\theta) / \lambda}, \quad
    L_i(\theta) = E[\log p(D \mid \theta_i = \theta)]

with the expectation over the others' posterior and :math:`\lambda` the weight of the KL. Removing the structure puts
:math:`\theta = 0`, so that the evidence changes by

.. math:: \Delta F_i = -\log E_{p(\theta)} \, e^{(L_i(\theta) - L_i(0)) / \lambda}

Here :math:`L_i` is a parabola: its slope at the mean of :math:`\theta` and its curvature come from the gradients of
log likelihoods with respect to noise drawn from the posterior.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyro_bmrs.numerics.integral import log_integral

__all__ = ["FreeFormFactor", "GradientSums", "free_form_factor", "log_parabola_moment"]

_TRUST = 0.25  # standard deviation of the curvature about minus the Gauss-Newton one, as a part of it
_ROUNDING = 1e-6  # of a prior's bounds in float32, beyond which its density is zero
_NOTHING = 1e-9  # nats, below which an evidence change is one of rounding: of a dead ReLU for one


@dataclass(frozen=True)
class GradientSums:
    r"""Six sums over examples and draws, of which the parabola is made; they add over batches, epochs and processes.

    Attributes:
        values: :math:`\sum 1, \theta, \theta^2, g, g \theta, g^2` with g the gradient of an example's log likelihood
            with respect to its own noise: of shape ``(6, structures)``, float64.
        curvature: Sum over examples of the Gauss-Newton curvature (the square of the gradient of a sampled output's log
            probability), of shape ``(structures,)``.
        curvature_count: Number of examples in it; 0 where none has been taken.
    """

    values: Tensor
    curvature: Tensor
    curvature_count: int = 0

    @classmethod
    def of(cls, theta: Tensor, gradient: Tensor) -> "GradientSums":
        """Return the sums of one batch: noise and gradients of shape ``(examples, structures)``."""
        t, g = theta.detach().double(), gradient.detach().double()
        values = torch.stack([torch.ones_like(t), t, t * t, g, g * t, g * g]).sum(1)
        return cls(values, torch.zeros_like(values[0]))

    def with_curvature(self, gradient: Tensor) -> "GradientSums":
        """Return the same with the curvature of one batch: gradients of shape ``(examples, structures)``."""
        squares = gradient.detach().double().square().sum(0)
        return GradientSums(self.values, self.curvature + squares, self.curvature_count + len(gradient))

    def __add__(self, other: "GradientSums") -> "GradientSums":
        counts = self.curvature_count + other.curvature_count
        return GradientSums(self.values + other.values, self.curvature + other.curvature, counts)


@dataclass(frozen=True)
class FreeFormFactor:
    r"""The free-form factors of some structures, each of shape ``(structures,)``, float64.

    Attributes:
        delta_f: :math:`\Delta F` of removing each structure alone, in nats; >= 0 favours removal.
        standard_error: Its standard error, in nats, of the gradients that were drawn: half of what the evidence changes
            by between one standard error of the curvature below and above, and the level's.
        slope: :math:`L'` at :math:`\theta = 0`, divided by :math:`\lambda`.
        curvature: :math:`L''`, divided by :math:`\lambda`.
        prior: The prior.
    """

    delta_f: Tensor
    standard_error: Tensor
    slope: Tensor
    curvature: Tensor
    prior: Any

    def structure(self, index: int) -> "FreeFormFactor":
        """Return the factor of one structure, whose tensors are of shape ``()``."""
        parameters = {name: getattr(self.prior, name).detach()[index] for name in self.prior.arg_constraints}
        prior = type(self.prior)(**parameters, validate_args=False)
        delta_f, error = self.delta_f[index], self.standard_error[index]
        return FreeFormFactor(delta_f, error, self.slope[index], self.curvature[index], prior)

    def log_density(self, log_theta: Tensor) -> Tensor:
        r"""Return the log density of :math:`\log\theta` under the factor, of shape ``(*log_theta, structures)``."""
        u = log_theta.double().reshape(*log_theta.shape, *(1,) * self.slope.dim()).to(self.slope.device)
        return _log_integrand(u, self.slope, self.curvature, self.prior) + self.delta_f


def free_form_factor(sums: GradientSums, prior: Any, num_data: int, kl_weight: float) -> FreeFormFactor:
    r"""Return the free-form factors that gradients at draws of the posterior imply.

    The parabola's slope is regressed on the noise; it is drawn towards minus the Gauss-Newton curvature, where that has
    been taken, by as much as its own error and a quarter of that curvature, as their standard deviations, ask for.

    Args:
        sums: Of gradients, one entry per structure.
        prior: Log-uniform or truncated log-normal prior, of ``batch_shape`` ``(structures,)``.
        num_data: Number :math:`N` of examples that the likelihood counts.
        kl_weight: :math:`\lambda`.

    Raises:
        NotImplementedError: If the prior is of another family.
    """
    if not (hasattr(prior, "log_low") and hasattr(prior, "log_high")):
        raise NotImplementedError(
            f"free-form evidence knows log-uniform and truncated log-normal priors, but got a {type(prior).__name__}"
        )
    n, t, tt, g, gt, gg = sums.values
    mean, level = t / n, g / n
    variance = (tt / n - mean.square()).clamp_min(1e-14)
    slope = (gt / n - mean * level) / variance
    noise = (gg / n - level.square() - slope.square() * variance).clamp_min(0) / n
    error, weight = noise / variance, torch.ones_like(variance)
    if sums.curvature_count:
        guess = sums.curvature / sums.curvature_count
        spread = (_TRUST * guess).square()
        weight = spread / (spread + error + 1e-30)
        slope = weight * slope - (1 - weight) * guess
    scale = num_data / kl_weight

    def log_moment(slope: Tensor, order: int = 0) -> Tensor:
        return log_parabola_moment(scale * (level - slope * mean), scale * slope, prior, order)

    total, step = log_moment(slope), (weight * error).sqrt()
    delta_f = torch.where(total.abs() < _NOTHING, torch.zeros_like(total), -total)
    of_level = scale * noise.sqrt() * torch.exp(log_moment(slope, 1) - total)
    of_slope = (log_moment(slope + step) - log_moment(slope - step)) / 2
    standard_error = torch.hypot(of_level, of_slope)
    return FreeFormFactor(delta_f, standard_error, scale * (level - slope * mean), scale * slope, prior)


def log_parabola_moment(slope: Tensor, curvature: Tensor, prior: Any, order: int = 0) -> Tensor:
    r"""Return :math:`\log E_{p(\theta)} \, \theta^k e^{s \theta + c \theta^2 / 2}`; of order 0, minus the evidence.

    Args:
        slope: :math:`s`, of shape ``(structures,)``.
        curvature: :math:`c`, of the same shape.
        prior: As for ``free_form_factor``.
        order: :math:`k`.
    """
    low, high = (each.double().expand(slope.shape) for each in (prior.log_low, prior.log_high))
    return log_integral(lambda u: _log_integrand(u, slope, curvature, prior) + order * u, low, high)


def _log_integrand(u: Tensor, slope: Tensor, curvature: Tensor, prior: Any) -> Tensor:
    r"""Return the log of the prior density of log(theta) times the likelihood, relative to that at 0."""
    theta = torch.exp(u)
    low, high = prior.log_low.double().exp(), prior.log_high.double().exp()
    inside = torch.minimum(torch.maximum(theta, low * (1 + _ROUNDING)), high * (1 - _ROUNDING))
    log_prior = prior.log_prob(inside).double() + inside.log()
    return slope * theta + 0.5 * curvature * theta.square() + log_prior
