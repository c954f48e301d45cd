r"""Rules on a finite set: ``Bernoulli`` and ``Categorical``.

.. math:: \Delta F = \log \sum_x q(x) \, \tilde p(x) / p(x)

in log space. Outcomes of probability 0 are meant: where the prior rules an outcome out, posterior and reduced prior
must too (else a ``ValueError``: nothing is known of the likelihood there); where the reduced prior rules out all that
the posterior allows, :math:`\Delta F` is -inf. The sum has finitely many terms, so it never diverges.
"""

from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import Bernoulli, Categorical

from pyro_bmrs.bmr.registry import register_evidence_change, register_reduced_posterior

__all__: list[str] = []


def _is_by_logits(q: Any) -> bool:
    """Return whether the distribution was made from logits; torch clips those that it makes from probs."""
    return q._param is q.__dict__.get("logits")


def _bernoulli_log_probs(q: Bernoulli) -> Tensor:
    """Return the log probabilities of 0 and 1 along a new last dimension, in float64."""
    if _is_by_logits(q):
        logits = q.logits.double()
        return torch.nn.functional.logsigmoid(torch.stack([-logits, logits], -1))
    probs = q.probs.double()
    return _log(torch.stack([1 - probs, probs], -1))


def _categorical_log_probs(q: Categorical) -> Tensor:
    """Return the log probabilities along the last dimension, in float64."""
    return torch.log_softmax(q.logits.double(), -1) if _is_by_logits(q) else _log(q.probs.double())


def _log(probs: Tensor) -> Tensor:
    """Return the log, without a gradient where it is -inf."""
    positive = probs > 0
    return torch.where(positive, torch.log(torch.where(positive, probs, 1.0)), -torch.inf)


def _log_weights(log_q: Tensor, log_p: Tensor, log_r: Tensor) -> Tensor:
    """Return log q(x) + log r(x) - log p(x), -inf where either of the first two is."""
    log_q, log_p, log_r = torch.broadcast_tensors(log_q, log_p, log_r)
    for name, other in (("posterior", log_q), ("reduced prior", log_r)):
        if bool(((log_p == -torch.inf) & (other > -torch.inf)).any()):
            raise ValueError(
                f"the {name}'s support must lie within the prior's: it allows outcomes that the prior rules out"
            )
    possible = (log_q > -torch.inf) & (log_r > -torch.inf)
    log_q, log_p, log_r = (torch.where(possible, value, 0.0) for value in (log_q, log_p, log_r))
    return torch.where(possible, log_q + (log_r - log_p), -torch.inf)


def _log_sum(log_weights: Tensor) -> Tensor:
    """Return the log of the sum; -inf, and no gradient, where there is nothing to sum."""
    possible = (log_weights > -torch.inf).any(-1)
    log_weights = torch.where(possible.unsqueeze(-1), log_weights, 0.0)
    return torch.where(possible, torch.logsumexp(log_weights, -1), -torch.inf)


def _normalised(log_weights: Tensor) -> Tensor:
    log_sum = _log_sum(log_weights)
    if bool((log_sum == -torch.inf).any()):
        raise ValueError("there is no reduced posterior: the reduced prior rules out all that the posterior allows")
    return log_weights - log_sum.unsqueeze(-1)


@register_evidence_change(Bernoulli, Bernoulli, Bernoulli)
def _evidence_change_bernoulli(q: Bernoulli, p: Bernoulli, reduced: Bernoulli) -> Tensor:
    return _log_sum(_log_weights(*(_bernoulli_log_probs(each) for each in (q, p, reduced)))).to(q._param)


@register_reduced_posterior(Bernoulli, Bernoulli, Bernoulli)
def _reduced_posterior_bernoulli(q: Bernoulli, p: Bernoulli, reduced: Bernoulli) -> dist.Bernoulli:
    """Return it by its logits, infinite where an outcome is certain."""
    failure, success = _normalised(_log_weights(*(_bernoulli_log_probs(each) for each in (q, p, reduced)))).unbind(-1)
    return dist.Bernoulli(logits=(success - failure).to(q._param), validate_args=False)


@register_evidence_change(Categorical, Categorical, Categorical)
def _evidence_change_categorical(q: Categorical, p: Categorical, reduced: Categorical) -> Tensor:
    return _log_sum(_log_weights(*(_categorical_log_probs(each) for each in (q, p, reduced)))).to(q._param)


@register_reduced_posterior(Categorical, Categorical, Categorical)
def _reduced_posterior_categorical(q: Categorical, p: Categorical, reduced: Categorical) -> dist.Categorical:
    log_probs = _normalised(_log_weights(*(_categorical_log_probs(each) for each in (q, p, reduced))))
    return dist.Categorical(probs=torch.exp(log_probs).to(q._param), validate_args=False)
