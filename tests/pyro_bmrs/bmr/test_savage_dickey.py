"""The Savage-Dickey ratio: the limit of narrow reduced priors, conjugate evidence, event dimensions, points outside."""

import math

import pytest
import torch
from oracle import assert_close, double
from pyro.distributions import Delta, Independent
from torch import distributions as td

from pyro_bmrs import LogUniform, TruncatedLogNormal, evidence_change, reduced_posterior, spike

PRIOR = LogUniform(double(-20.0), double(0.0))
Q = TruncatedLogNormal(double([-18.0, -0.5, -6.0, -25.0]), double([1.0, 0.3, 3.0, 2.0]))


# --- limits ---------------------------------------------------------------------------------------------------


def test_it_is_the_limit_of_the_spike():
    at_bound = Delta(torch.exp(PRIOR.log_low))
    exact = evidence_change(Q, PRIOR, at_bound)
    for scale in (1e-6, 1e-9):
        assert_close(evidence_change(Q, PRIOR, spike(PRIOR, scale)), exact, 300 * scale)


def test_it_is_the_limit_of_narrow_normals():
    q, p = td.Normal(double([0.3, -2.0]), double([0.2, 1.0])), td.Normal(double(0.1), double(1.5))
    exact = evidence_change(q, p, Delta(double(0.5)))
    assert_close(evidence_change(q, p, td.Normal(double(0.5), double(1e-8))), exact, 1e-13)


def test_it_is_the_limit_of_concentrated_gammas():
    q, p, point = td.Gamma(double(7.0), double(3.0)), td.Gamma(double(1.5), double(1.0)), double(2.0)
    exact = evidence_change(q, p, Delta(point))
    assert_close(evidence_change(q, p, td.Gamma(1e10 * point, double(1e10))), exact, 1e-5)


def test_it_is_the_limit_of_narrow_multivariate_normals():
    q = td.MultivariateNormal(torch.randn(2).double(), scale_tril=double([[0.5, 0.0], [0.2, 0.3]]))
    p = td.MultivariateNormal(torch.zeros(2).double(), torch.eye(2).double())
    point = double([0.2, -0.1])
    exact = evidence_change(q, p, Delta(point, event_dim=1))
    assert exact.shape == ()
    narrow = td.MultivariateNormal(point, scale_tril=1e-8 * torch.eye(2).double())
    assert_close(evidence_change(q, p, narrow), exact, 1e-13)


# --- models ---------------------------------------------------------------------------------------------------


def test_a_fair_coin():
    prior, tosses = double([1.5, 0.5]), double([3.0, 7.0])
    q, p = td.Beta(*(prior + tosses)), td.Beta(*prior)
    log_beta = [torch.lgamma(c).sum() - torch.lgamma(c.sum()) for c in (prior + tosses, prior)]
    expected = 10 * math.log(0.5) - (log_beta[0] - log_beta[1])
    assert_close(evidence_change(q, p, Delta(double(0.5))), expected, 1e-13)
    simplex = (td.Dirichlet(prior + tosses), td.Dirichlet(prior), Delta(double([0.5, 0.5]), event_dim=1))
    assert_close(evidence_change(*simplex), expected, 1e-13)


def test_types_may_differ():
    q = td.StudentT(double(4.0), double(0.2), double(0.5))
    found = evidence_change(q, td.Laplace(double(0.0), double(1.0)), Delta(double(0.0)))
    assert_close(found, q.log_prob(double(0.0)) + math.log(2), 1e-14)


def test_discrete_sites():
    assert_close(
        evidence_change(td.Bernoulli(double(0.9)), td.Bernoulli(double(0.3)), Delta(double(1.0))),
        double(math.log(3)),
        1e-14,
    )


# --- shapes ---------------------------------------------------------------------------------------------------


def test_batch_shapes_broadcast():
    q, p = td.Normal(torch.randn(2, 1).double(), 0.5), td.Normal(double(0.0), double(1.0))
    reduced = Delta(torch.randn(3).double())
    assert evidence_change(q, p, reduced).shape == (2, 3)
    result = reduced_posterior(q, p, reduced)
    assert isinstance(result, Delta)
    assert_close(result.v, reduced.v.expand(2, 3), 0)
    assert (result.batch_shape, result.event_shape) == ((2, 3), ())


def test_independent_multivariate_normals():
    q = td.MultivariateNormal(torch.randn(4, 3, 2).double(), torch.eye(2).double())
    p = td.MultivariateNormal(torch.zeros(4, 3, 2).double(), 4 * torch.eye(2).double())
    point = torch.randn(4, 3, 2).double()
    apart = evidence_change(q, p, Delta(point, event_dim=1))
    joint = evidence_change(Independent(q, 1), Independent(p, 1), Delta(point, event_dim=2))
    assert_close(joint, apart.sum(-1), 1e-14)


def test_a_joint_and_an_independent_prior_mix():
    q = td.MultivariateNormal(double([0.1, 0.2]), scale_tril=double([[0.5, 0.0], [0.2, 0.3]]))
    p, point = td.Normal(torch.zeros(2).double(), 1.0), double([0.0, 0.1])
    expected = q.log_prob(point) - p.log_prob(point).sum()
    assert_close(evidence_change(q, Independent(p, 1), Delta(point, event_dim=1)), expected, 1e-14)


@pytest.mark.parametrize("question", [evidence_change, reduced_posterior])
def test_event_dimensions_must_agree(question):
    q = Independent(td.Normal(torch.zeros(3), 1.0), 1)
    with pytest.raises(ValueError, match=r"event dimensions, but have 1, 1 and 0; .* event_dim=1"):
        question(q, q, Delta(torch.zeros(3)))
    with pytest.raises(ValueError, match="event dimensions"):
        question(q, td.Normal(torch.zeros(3), 1.0), Delta(torch.zeros(3), event_dim=1))


def test_float32():
    q, p = (TruncatedLogNormal(torch.tensor(-3.0), torch.tensor(0.5)), LogUniform())
    found = evidence_change(q, p, Delta(torch.exp(p.log_low)))
    assert found.dtype == torch.float32
    exact = evidence_change(TruncatedLogNormal(double(-3.0), double(0.5)), PRIOR, Delta(torch.exp(PRIOR.log_low)))
    assert_close(found, exact, 1e-5)


def test_gradients():
    loc, scale, v = (double(x).requires_grad_() for x in (0.3, 0.5, 0.1))

    def change(loc, scale, v):
        return evidence_change(td.Normal(loc, scale), td.Normal(double(0.0), double(1.0)), Delta(v))

    assert torch.autograd.gradcheck(change, (loc, scale, v))


# --- points outside -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("validate", [True, False])
@pytest.mark.parametrize("question", [evidence_change, reduced_posterior])
def test_the_point_must_have_prior_density(question, validate):
    gammas = [td.Gamma(double(a), double(1.0), validate_args=validate) for a in (5.0, 2.0)]
    for v in (-1.0, 0.0):
        with pytest.raises(ValueError, match="within the prior's support"):
            question(*gammas, Delta(double(v)))
    unbounded = td.Gamma(double(0.5), double(1.0), validate_args=validate)
    with pytest.raises(ValueError, match="positive and finite"):
        question(gammas[0], unbounded, Delta(double(0.0)))


@pytest.mark.parametrize("validate", [True, False])
def test_a_point_that_the_posterior_rules_out(validate):
    q, p = (td.Uniform(double([0.0, 0.2]), double(1.0), validate_args=validate) for _ in range(2))
    p = td.Uniform(double(0.0), double(1.0), validate_args=validate)
    found = evidence_change(q, p, Delta(double(0.1)))
    assert_close(found, double([0.0, -math.inf]), 0)
    narrow = Independent(TruncatedLogNormal(double([-3.0]), double(0.5), -10.0, 0.0, validate_args=validate), 1)
    at_bound = Delta(torch.exp(PRIOR.log_low).expand(1), event_dim=1)
    assert evidence_change(narrow, Independent(PRIOR.expand([1]), 1), at_bound) == -math.inf


def test_the_distributions_keep_validating():
    q = Independent(td.Gamma(double([5.0]), double(1.0), validate_args=True), 1, validate_args=True)
    evidence_change(q, q, Delta(double([1.0]), event_dim=1))
    assert q._validate_args
    assert q.base_dist._validate_args


def test_a_reduced_prior_integrates_to_one():
    q = td.Normal(double(0.0), double(1.0))
    with pytest.raises(ValueError, match="log_density at 0"):
        evidence_change(q, q, Delta(double(0.0), log_density=double(0.5)))
