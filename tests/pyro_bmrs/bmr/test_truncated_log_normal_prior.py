"""A truncated log-normal prior, narrower and wider than the posterior: KL, evidence changes, reduced posteriors."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributions import kl_divergence

import pyro_bmrs as bmrs

LOW, HIGH = -20.0, 0.0
# Location and scale of posterior and prior; in the last three the posterior is the wider, and the exponent a dome.
PAIRS = [
    ((-4.0, 1.0), (-5.0, 3.0)),
    ((-22.0, 2.0), (-10.0, 4.0)),
    ((3.0, 0.7), (-1.0, 2.0)),
    ((-9.0, 2.0), (-9.0, 2.0)),
    ((-8.0, 5.0), (-6.0, 4.0)),
    ((-1.0, 60.0), (3.0, 50.0)),
    ((-3.0, 4.0), (-12.0, 3.0)),
]
REDUCED = {
    "spike": lambda p: bmrs.spike(p, scale=0.5),
    "narrow spike": bmrs.spike,
    "window": bmrs.precision_window,
    "log-uniform": lambda p: bmrs.LogUniform(p.log_low, p.log_high),
    "log-normal": lambda p: bmrs.TruncatedLogNormal(p.loc - 1, p.scale * 0.8, p.log_low, p.log_high),
}


def double(value):
    return torch.tensor(value, dtype=torch.float64)


def pair(q, p):
    return (bmrs.TruncatedLogNormal(double(loc), double(scale), LOW, HIGH) for loc, scale in (q, p))


def grid():
    """Return nodes and log weights of a Gauss-Legendre rule, its panels fine at both ends and cut at the window's."""
    fine = torch.logspace(-12, -1, 600, dtype=torch.float64)
    ends = double([LOW, HIGH, -23 * math.log(2), -8 * math.log(2)])
    edges = torch.cat([ends, LOW + fine, HIGH - fine, torch.linspace(LOW, HIGH, 3000, dtype=torch.float64)])
    edges = edges.unique()
    nodes, weights = (torch.from_numpy(v) for v in np.polynomial.legendre.leggauss(10))
    half = edges.diff().unsqueeze(1) / 2
    return (edges[:-1].unsqueeze(1) + half * (1 + nodes)).flatten(), torch.log(half * weights).flatten()


X, LOG_WEIGHTS = grid()


def log_density(distribution):
    """Log density of x = log(theta) at the nodes, normalised by quadrature and so by no code of ours."""
    low, high = distribution.log_low, distribution.log_high
    energy = torch.zeros_like(X)
    if isinstance(distribution, bmrs.TruncatedLogNormal):
        energy = 0.5 * ((X - distribution.loc) / distribution.scale) ** 2
    exponent = torch.where((low <= X) & (high >= X), -energy, -torch.inf)
    return exponent - torch.logsumexp(exponent + LOG_WEIGHTS, 0)


@pytest.mark.parametrize("name", REDUCED)
@pytest.mark.parametrize(("q", "p"), PAIRS)
def test_evidence_change_against_quadrature(name, q, p):
    q, p = pair(q, p)
    reduced = REDUCED[name](p)
    expected = torch.logsumexp(log_density(q) + log_density(reduced) - log_density(p) + LOG_WEIGHTS, 0)
    torch.testing.assert_close(bmrs.evidence_change(q, p, reduced), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("q", "p"), PAIRS)
def test_nothing_changes_if_the_reduced_prior_is_the_prior(q, p):
    q, p = pair(q, p)
    assert float(bmrs.evidence_change(q, p, p)) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize(("q", "p"), PAIRS)
def test_kl_against_quadrature(q, p):
    q, p = pair(q, p)
    log_q, log_p = log_density(q), log_density(p)
    expected = (torch.exp(log_q + LOG_WEIGHTS) * (log_q - log_p)).sum()
    torch.testing.assert_close(kl_divergence(q, p), expected, rtol=1e-9, atol=1e-9)


def test_kl_is_infinite_outside_the_priors_support():
    q = bmrs.TruncatedLogNormal(-1.0, 1.0, -20.0, 0.0)
    assert kl_divergence(q, bmrs.TruncatedLogNormal(-1.0, 1.0, -10.0, 0.0)).isinf()


@pytest.mark.parametrize("name", ["spike", "log-normal"])
@pytest.mark.parametrize(("q", "p"), PAIRS[:4])
def test_reduced_posterior_is_bayes_rule(name, q, p):
    q, p = pair(q, p)
    reduced = REDUCED[name](p)
    theta = torch.exp(torch.linspace(-19.9, -0.1, 25, dtype=torch.float64))
    expected = q.log_prob(theta) + reduced.log_prob(theta) - p.log_prob(theta) - bmrs.evidence_change(q, p, reduced)
    torch.testing.assert_close(bmrs.reduced_posterior(q, p, reduced).log_prob(theta), expected, rtol=1e-8, atol=1e-8)


def test_a_dome_is_no_truncated_log_normal():
    q, p = pair(*PAIRS[4])
    with pytest.raises(ValueError, match="its precision would be"):
        bmrs.reduced_posterior(q, p, bmrs.LogUniform(double(LOW), double(HIGH)))


@pytest.mark.slow
@given(st.floats(-60, 20), st.floats(-20, 6), st.floats(-30, 5), st.floats(-3, 5))
def test_everything_is_finite(q_loc, q_log_scale, p_loc, p_log_scale):
    q_loc, q_log_scale = (double(v).requires_grad_() for v in (q_loc, q_log_scale))
    q = bmrs.TruncatedLogNormal(q_loc, q_log_scale.exp(), LOW, HIGH)
    p = bmrs.TruncatedLogNormal(double(p_loc), double(p_log_scale).exp(), LOW, HIGH)
    for value in (kl_divergence(q, p), *(bmrs.evidence_change(q, p, make(p)) for make in REDUCED.values())):
        assert torch.isfinite(value)
        assert all(bool(torch.isfinite(g)) for g in torch.autograd.grad(value, (q_loc, q_log_scale), retain_graph=True))
