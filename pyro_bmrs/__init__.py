"""Principled structured pruning: noise on a structure is a sample site, a reduced prior is another distribution there,
and Bayesian model reduction compares the two in closed form."""

from pyro_bmrs.bmr import (
    evidence_change,
    precision_window,
    reduced_posterior,
    register_evidence_change,
    register_reduced_posterior,
    spike,
)
from pyro_bmrs.distributions import LogUniform, TruncatedLogNormal
from pyro_bmrs.elbo import MeanFieldELBO
from pyro_bmrs.guide import TruncatedLogNormalGuide
from pyro_bmrs.model import NoisyNetwork
from pyro_bmrs.noise import MultiplicativeNoise
from pyro_bmrs.criteria import BMRS_N, BMRS_U, SNR, GradientWeightNorm, PosteriorMean, Random, WeightNorm
from pyro_bmrs.prediction import predict
from pyro_bmrs.surgery import compact
from pyro_bmrs.svi import Continuous, FitResult, PostTraining, fit
