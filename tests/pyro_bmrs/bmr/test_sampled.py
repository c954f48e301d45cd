"""The evidence change from draws: against closed forms, against quadrature, and what is said of its reliability."""

import math
import warnings

import pyro.distributions as dist
import pytest
import torch
from oracle import assert_close, double, integrate

import pyro_bmrs as bmrs
from pyro_bmrs import LogUniform, TruncatedLogNormal
from pyro_bmrs.bmr.sampled import UnreliableEvidenceWarning, estimate_evidence_change


def exponentials(k):
    """Return posterior, prior and reduced prior whose weights are Pareto with shape ``k`` < 1, and the exact result."""
    k = torch.as_tensor(k, dtype=torch.float64)
    rate, reduced_rate = 5.0, 5.0 - 4.0 * k
    exact = torch.log(reduced_rate / rate / (1 - k))
    return dist.Exponential(double(4.0)), dist.Exponential(double(rate)), dist.Exponential(reduced_rate), exact


def normal_rule(q, p, r):
    """The classical result for three normal distributions, in precisions."""
    (q_loc, q_prec), (p_loc, p_prec), (r_loc, r_prec) = ((each.loc, each.scale**-2) for each in (q, p, r))
    precision = q_prec + r_prec - p_prec
    loc = (q_prec * q_loc + r_prec * r_loc - p_prec * p_loc) / precision
    squares = q_prec * q_loc**2 + r_prec * r_loc**2 - p_prec * p_loc**2 - precision * loc**2
    return 0.5 * (torch.log(q_prec * r_prec / p_prec / precision) - squares)


def normal(loc, scale):
    return dist.Normal(double(loc), double(scale))


# --- the estimate --------------------------------------------------------------------------------------------


def test_errors_are_of_the_size_of_the_standard_error():
    q, p, r = normal([0.3] * 400, 0.5), normal(0.0, 2.0), normal(0.2, 0.4)
    result = estimate_evidence_change(q, p, r, num_samples=1000, seed=3)
    z = (result.estimate - normal_rule(q, p, r)) / result.standard_error
    assert abs(z.mean()) < 4 / math.sqrt(400)
    assert 0.9 < z.std() < 1.1


def test_agrees_with_quadrature():
    q, p, r = dist.Beta(double(5.0), double(3.0)), dist.Beta(double(1.0), double(1.0)), dist.Beta(double(2.0), 4.0)
    exact = integrate(lambda x: torch.exp(q.log_prob(x) + r.log_prob(x) - p.log_prob(x)), 1e-12, 1 - 1e-12).log()
    result = estimate_evidence_change(q, p, r, num_samples=20_000, seed=4)
    assert abs(result.estimate - exact) < 4 * result.standard_error < 0.1


@pytest.mark.parametrize("p2", [23, None])
def test_agrees_with_the_window(p2):
    prior = LogUniform(double(-20.0), double(0.0))
    q = TruncatedLogNormal(double([-3.5, -10.0, -6.0]), double([1.0, 2.0, 1.0]))
    result = estimate_evidence_change(q, prior, bmrs.precision_window(prior, p2=p2), seed=0)
    exact = bmrs.evidence_change(q, prior, bmrs.precision_window(prior, p2=p2))
    assert ((result.estimate - exact).abs() < 4 * result.standard_error + 1e-12).all()
    assert result.reliable.all()  # the weights are zero or one constant, which no Pareto tail describes


def test_an_unchanged_prior_changes_nothing():
    for q, p in [(normal([0.0, 3.0], 0.5), normal(0.0, 2.0)), exponentials(0.0)[:2]]:
        result = estimate_evidence_change(q, p, p)
        assert (result.estimate == 0).all()
        assert (result.standard_error == 0).all()
        assert result.reliable.all()


def test_the_same_prior_in_other_words_changes_nothing():
    q, p = dist.Beta(torch.tensor(3.0), torch.tensor(2.0)), dist.Beta(torch.tensor(1.0), torch.tensor(1.0))
    result = estimate_evidence_change(q, p, dist.Uniform(0.0, 1.0))
    assert_close(result.estimate, double(0.0), 1e-6)
    assert result.reliable


def test_events_count_as_one():
    q, p, r = normal([[0.1, 0.2, 0.3], [0.0, -0.1, 0.4]], 0.5), normal([0.0] * 3, 2.0), normal([0.2] * 3, 0.7)
    result = estimate_evidence_change(q.to_event(1), p.to_event(1), r.to_event(1), num_samples=20_000, seed=5)
    assert result.estimate.shape == result.pareto_k.shape == result.standard_error.shape == (2,)
    assert ((result.estimate - normal_rule(q, p, r).sum(-1)).abs() < 4 * result.standard_error).all()


def test_correlated_events():
    covariance = double([[1.0, 0.6], [0.6, 0.8]]) / 4
    q = dist.MultivariateNormal(double([0.1, -0.2]), covariance)
    p, r = (dist.MultivariateNormal(torch.zeros(2).double(), s * torch.eye(2).double()) for s in (4.0, 1.0))
    precision = covariance.inverse() + 0.75 * torch.eye(2).double()
    linear = torch.linalg.solve(covariance, q.loc)
    exact = 0.5 * (math.log(4**2) - torch.logdet(precision @ covariance) + linear @ precision.inverse() @ linear)
    exact = exact - 0.5 * linear @ q.loc
    result = estimate_evidence_change(q, p, r, num_samples=20_000, seed=6)
    assert abs(result.estimate - exact) < 4 * result.standard_error < 0.02


def test_batch_shapes_broadcast():
    q, p, r = normal([0.0, 0.5, 1.0], 0.5), normal(0.0, 2.0), normal([[0.2], [0.4]], 1.0)
    result = estimate_evidence_change(q, p, r, num_samples=20_000, seed=7)
    assert result.estimate.shape == (2, 3)
    assert ((result.estimate - normal_rule(q, p, r)).abs() < 4.5 * result.standard_error).all()


def test_results_have_the_dtype_of_the_draws():
    q, p, r = (dist.Normal(torch.zeros(2), scale) for scale in (0.5, 2.0, 1.0))
    result = estimate_evidence_change(q, p, r)
    assert {each.dtype for each in (result.estimate, result.standard_error, result.pareto_k)} == {torch.float32}
    counts = estimate_evidence_change(dist.Poisson(3.0), dist.Poisson(2.0), dist.Poisson(2.5), seed=0)
    assert abs(counts.estimate - (3 * 0.25 - 0.5)) < 4 * counts.standard_error


# --- reliability ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [0.0625, 0.2, 0.4])
def test_k_is_that_of_pareto_weights(k):
    q, p, r, exact = exponentials(k)
    result = estimate_evidence_change(q.expand([50]), p, r, seed=8)
    assert abs(result.pareto_k.mean() - (0.95 * k + 0.05 * 0.5)) < 0.04  # ArviZ's prior counts as 10 of the tail's 190
    assert abs((result.estimate - exact).mean()) < 0.02
    assert result.reliable.all()


def test_heavy_weights_warn_and_say_how_many():
    q, p, r, _ = exponentials([0.1, 0.95])
    with pytest.warns(
        UnreliableEvidenceWarning, match=r"of 1 of 2 elements .* above 0.7, up to .* 4000 draws .* closed"
    ):
        result = estimate_evidence_change(q, p, r, seed=9)
    assert result.reliable.tolist() == [True, False]


def test_no_draw_in_the_reduced_prior():
    q, p, r = normal([0.5, 0.7], 0.01), dist.Uniform(double(0.0), double(1.0)), dist.Uniform(double(0.0), double(0.1))
    with pytest.warns(UnreliableEvidenceWarning, match=r"2 of 2 elements .* up to inf"):
        result = estimate_evidence_change(q, p, r)
    assert (result.estimate == -torch.inf).all()
    assert (result.standard_error == torch.inf).all()
    assert not result.reliable.any()


def test_few_draws_in_the_reduced_prior():
    q, p, r = (dist.Uniform(double(0.0), double(high)) for high in (1.0, 1.0, 5e-4))
    with pytest.warns(UnreliableEvidenceWarning):
        result = estimate_evidence_change(q, p, r, seed=1)
    assert result.pareto_k == torch.inf
    assert torch.isfinite(result.estimate)


def test_a_spike_is_beyond_draws():
    prior = LogUniform(double(-20.0), double(0.0))
    q = TruncatedLogNormal(double([-18.0, -0.5]), double([1.0, 0.1]))
    with pytest.warns(UnreliableEvidenceWarning, match="2 of 2"):
        estimate_evidence_change(q, prior, bmrs.spike(prior))


# --- the draws -----------------------------------------------------------------------------------------------


def test_a_seed_repeats_and_leaves_the_random_state_alone():
    q, p, r = normal([0.0, 1.0], 0.5), normal(0.0, 2.0), normal(0.0, 1.0)
    state = torch.random.get_rng_state()
    first, second = (estimate_evidence_change(q, p, r, seed=1) for _ in range(2))
    assert torch.equal(first.estimate, second.estimate)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not torch.equal(estimate_evidence_change(q, p, r, seed=2).estimate, first.estimate)
    assert not torch.equal(estimate_evidence_change(q, p, r).estimate, first.estimate)
    assert not torch.equal(torch.random.get_rng_state(), state)


def test_elements_do_not_share_draws():
    q, p, r = normal([0.3, 0.3], 0.5), normal(0.0, 2.0), normal(0.2, 0.4)
    first, second = estimate_evidence_change(q, p, r).estimate
    assert first != second


def test_learnable_posteriors_need_no_detaching():
    loc = torch.zeros(2, requires_grad=True)
    result = estimate_evidence_change(dist.Normal(loc, 0.5), dist.Normal(0.0, 2.0), dist.Normal(0.0, 1.0))
    assert not result.estimate.requires_grad


# --- refusals ------------------------------------------------------------------------------------------------


def test_refuses_too_few_draws():
    with pytest.raises(ValueError, match="num_samples must be at least 25, but got 24"):
        estimate_evidence_change(normal(0.0, 1.0), normal(0.0, 1.0), normal(0.0, 1.0), num_samples=24)


@pytest.mark.parametrize("r", [normal([0.0, 1.0], 1.0), normal([0.0, 0.0, 0.0], 1.0).to_event(1)])
def test_refuses_shapes_that_do_not_fit(r):
    with pytest.raises(ValueError, match=r"\(batch_shape, event_shape\) are \(\(3,\), \(\)\)"):
        estimate_evidence_change(normal([0.0, 1.0, 2.0], 1.0), normal(0.0, 2.0), r)


def test_refuses_a_posterior_outside_the_prior():
    with pytest.raises(ValueError, match=r"of 4000 draws of the posterior lie outside the support of the Gamma prior"):
        estimate_evidence_change(normal(0.0, 1.0), dist.Gamma(1.0, 1.0), dist.Gamma(2.0, 1.0))


def test_is_silent_when_all_is_well():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert estimate_evidence_change(normal(0.0, 0.5), normal(0.0, 2.0), normal(0.0, 1.0)).reliable
