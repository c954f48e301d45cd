"""Bayesian model reduction: how the evidence changes under another prior, from the posterior alone."""

from pyro_bmrs.bmr import truncated_log_normal as truncated_log_normal
from pyro_bmrs.bmr.reduced_priors import precision_window, spike
from pyro_bmrs.bmr.registry import (
    evidence_change,
    reduced_posterior,
    register_evidence_change,
    register_reduced_posterior,
)

__all__ = [
    "evidence_change",
    "precision_window",
    "reduced_posterior",
    "register_evidence_change",
    "register_reduced_posterior",
    "spike",
]
