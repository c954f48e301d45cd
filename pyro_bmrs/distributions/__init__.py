"""Distributions over the multiplicative noise of a structure, one a file, and their divergences."""

from pyro_bmrs.distributions import kl as kl
from pyro_bmrs.distributions.log_uniform import LogUniform
from pyro_bmrs.distributions.logit_normal import LogitNormal
from pyro_bmrs.distributions.moments import signal_to_noise
from pyro_bmrs.distributions.truncated_log_normal import TruncatedLogNormal

__all__ = ["LogUniform", "LogitNormal", "TruncatedLogNormal", "signal_to_noise"]
