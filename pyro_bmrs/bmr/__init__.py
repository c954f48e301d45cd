"""Bayesian model reduction: how the evidence changes under another prior, from the posterior alone."""

from pyro_bmrs.bmr import finite as finite
from pyro_bmrs.bmr import multivariate_normal as multivariate_normal
from pyro_bmrs.bmr import normal as normal
from pyro_bmrs.bmr import quadrature as quadrature
from pyro_bmrs.bmr import savage_dickey as savage_dickey
from pyro_bmrs.bmr import truncated_log_normal as truncated_log_normal
from pyro_bmrs.bmr.exponential_family import register_exponential_family
from pyro_bmrs.bmr.latents import posterior_and_prior
from pyro_bmrs.bmr.reduced_priors import precision_window, spike
from pyro_bmrs.bmr.reduction import Reduction, reduce
from pyro_bmrs.bmr.registry import (
    DivergentIntegralError,
    evidence_change,
    reduced_posterior,
    register_evidence_change,
    register_reduced_posterior,
)
from pyro_bmrs.bmr.sampled import SampledEvidenceChange, UnreliableEvidenceWarning, estimate_evidence_change
from pyro_bmrs.bmr.search import SearchResult, greedy_search

__all__ = [
    "DivergentIntegralError",
    "Reduction",
    "SampledEvidenceChange",
    "SearchResult",
    "UnreliableEvidenceWarning",
    "estimate_evidence_change",
    "evidence_change",
    "greedy_search",
    "posterior_and_prior",
    "precision_window",
    "reduce",
    "reduced_posterior",
    "register_evidence_change",
    "register_exponential_family",
    "register_reduced_posterior",
    "spike",
]
