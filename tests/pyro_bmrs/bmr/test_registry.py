"""Look-up of rules by three types: which one wins, what Independent means, and honest refusals."""

import pytest
import torch
from oracle import assert_close, double
from pyro.distributions import Delta
from torch.distributions import Independent, Normal

from pyro_bmrs import (
    LogUniform,
    TruncatedLogNormal,
    evidence_change,
    reduced_posterior,
    register_evidence_change,
    register_reduced_posterior,
    spike,
)
from pyro_bmrs.bmr import DivergentIntegralError, registry
from pyro_bmrs.bmr.registry import check_convergence

PRIOR = LogUniform(double(-20.0), double(0.0))
Q = TruncatedLogNormal(double([[-18.0, -0.5, -6.0], [-25.0, 1.0, -3.0]]), double([1.0, 0.1, 3.0]))


def special(name="Special"):
    """Return a posterior of a class of its own, for which a test may register rules."""
    return type(name, (TruncatedLogNormal,), {})(double([-3.0, -9.0]), double(0.5))


# --- which rule ----------------------------------------------------------------------------------------------


def test_a_rule_serves_subclasses():
    plain = TruncatedLogNormal(double([-3.0, -9.0]), double(0.5))
    assert_close(evidence_change(special(), PRIOR, spike(PRIOR)), evidence_change(plain, PRIOR, spike(PRIOR)), 0)


def test_the_most_specific_rule_wins():
    q = special()
    before = evidence_change(q, PRIOR, PRIOR)  # and is in the cache of look-ups

    @register_evidence_change(type(q), LogUniform, LogUniform)
    def constant(q, p, reduced):
        return torch.full(q.batch_shape, 7.0)

    assert_close(before, double(0.0), 1e-12)
    assert_close(evidence_change(q, PRIOR, PRIOR), double(7.0), 0)
    assert_close(evidence_change(Q, PRIOR, PRIOR), double(0.0), 1e-12)


def test_the_posterior_decides_before_the_priors():
    class SpecialPrior(LogUniform):
        pass

    q = special()
    register_evidence_change(TruncatedLogNormal, SpecialPrior, LogUniform)(lambda q, p, reduced: double(1.0))
    register_evidence_change(type(q), LogUniform, LogUniform)(lambda q, p, reduced: double(2.0))
    assert evidence_change(q, SpecialPrior(), PRIOR) == 2
    assert evidence_change(Q, SpecialPrior(), PRIOR) == 1


def test_registering_returns_the_function():
    class Mine(Normal):
        pass

    def rule(q, p, reduced):
        return q

    assert register_reduced_posterior(Mine, Mine, Mine)(rule) is rule
    q = Mine(0.0, 1.0)
    assert reduced_posterior(q, q, q) is q


# --- independent dimensions ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dims", [1, 2])
def test_independent_dimensions_add(dims):
    prior = PRIOR.expand([2, 3])
    for reduced in (spike(prior), prior):
        total = evidence_change(*(Independent(each, dims) for each in (Q, prior, reduced)))
        assert total.shape == (2, 3)[: 2 - dims]
        assert_close(total, evidence_change(Q, prior, reduced).flatten(2 - dims).sum(-1), 1e-14)


def test_reduced_posterior_keeps_event_dimensions():
    prior = PRIOR.expand([2, 3])
    reduced = reduced_posterior(*(Independent(each, 1) for each in (Q, prior, spike(prior, 1.0))))
    assert (reduced.batch_shape, reduced.event_shape) == ((2,), (3,))
    assert_close(reduced.base_dist.loc, reduced_posterior(Q, prior, spike(prior, 1.0)).loc, 0)


@pytest.mark.parametrize("question", [evidence_change, reduced_posterior])
def test_event_dimensions_must_agree(question):
    prior = PRIOR.expand([2, 3])
    q, p, reduced = (Independent(each, 1) for each in (Q, prior, spike(prior)))
    for wrong in (prior, Independent(prior, 2)):
        with pytest.raises(ValueError, match="event dimensions"):
            question(q, wrong, reduced)
        with pytest.raises(ValueError, match="event dimensions"):
            question(q, p, wrong)


def test_point_masses_keep_their_own_event_dimensions():
    q, p = Normal(torch.randn(2, 3).double(), 0.5), Normal(torch.zeros(2, 3).double(), 1.0)
    point = Delta(torch.zeros(2, 3).double())
    expected = (q.log_prob(point.v) - p.log_prob(point.v)).sum(-1)
    for reduced in (Delta(point.v, event_dim=1), point.to_event(1), Independent(point, 1)):
        assert_close(evidence_change(Independent(q, 1), Independent(p, 1), reduced), expected, 1e-14)
        result = reduced_posterior(Independent(q, 1), Independent(p, 1), reduced)
        assert (type(result), result.batch_shape, result.event_shape) == (Delta, (2,), (3,))


# --- the list of rules ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("question", [evidence_change, reduced_posterior])
def test_docstrings_list_every_rule(question):
    table = registry._EVIDENCE_CHANGES if question is evidence_change else registry._REDUCED_POSTERIORS
    rows = question.__doc__.partition(registry._TABLE_TITLE)[2].split("\n    * ")[1:]
    assert len(rows) == len(table) > 10
    assert "``TruncatedLogNormal``, ``LogUniform``, ``LogUniform``" in rows
    assert rows == sorted(rows)


def test_docstrings_list_later_rules():
    register_evidence_change(type(special("Earlier")), LogUniform, LogUniform)(lambda q, p, reduced: q.loc)
    before = evidence_change.__doc__
    register_evidence_change(type(special("Later")), LogUniform, LogUniform)(lambda q, p, reduced: q.loc)
    assert "``Later``, ``LogUniform``" in evidence_change.__doc__
    assert "Later" not in reduced_posterior.__doc__
    assert evidence_change.__doc__.replace("    * ``Later``, ``LogUniform``, ``LogUniform``\n", "") == before


def test_no_docstring_gets_no_list(monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(evidence_change, "__doc__", None)  # as under python -OO
        register_evidence_change(type(special()), LogUniform, LogUniform)(lambda q, p, reduced: q.loc)
        assert evidence_change.__doc__ is None
    register_evidence_change(type(special()), LogUniform, LogUniform)(lambda q, p, reduced: q.loc)  # lists both


# --- refusals ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("question", [evidence_change, reduced_posterior])
def test_a_missing_rule_names_the_three_types(question):
    with pytest.raises(NotImplementedError, match=r"Normal.*LogUniform.*TruncatedLogNormal"):
        question(Normal(0.0, 1.0), PRIOR, spike(PRIOR))


def test_a_missing_rule_names_the_sampled_estimate():
    with pytest.raises(NotImplementedError, match=r"estimate_evidence_change\(posterior, prior, reduced_prior\)"):
        evidence_change(Normal(0.0, 1.0), PRIOR, spike(PRIOR))


@pytest.mark.parametrize(
    ("converges", "message"),
    [
        (torch.tensor(False), "posterior here: why,"),
        (torch.zeros(2, 3) > 0, r"6 of 6 elements, \(0, 0\), .*\.\.\.: why,"),
    ],
)
def test_divergence_names_the_elements(converges, message):
    with pytest.raises(DivergentIntegralError, match=message):
        check_convergence(converges, "why")
    check_convergence(~converges, "why")


@pytest.mark.parametrize("register", [register_evidence_change, register_reduced_posterior])
@pytest.mark.parametrize("wrong", [int, PRIOR, "LogUniform"], ids=["other type", "instance", "name"])
def test_only_distributions_are_registered(register, wrong):
    for triple in ((wrong, Normal, Normal), (Normal, wrong, Normal), (Normal, Normal, wrong)):
        with pytest.raises(TypeError, match="Distribution"):
            register(*triple)


@pytest.mark.parametrize("question", [evidence_change, reduced_posterior])
def test_supports_must_lie_within_the_prior(question):
    q = TruncatedLogNormal(double(-3.0), double(0.5), -10.0, 0.0)
    narrow = LogUniform(double(-10.0), double(0.0))
    with pytest.raises(ValueError, match="posterior's support"):
        question(q, LogUniform(double(-5.0), double(0.0)), LogUniform(double(-5.0), double(0.0)))
    for reduced in (LogUniform(double(-10.0), double(1.0)), spike(LogUniform(double(-12.0), double(0.0)))):
        with pytest.raises(ValueError, match="reduced prior's support"):
            question(q, narrow, reduced)
    with pytest.raises(ValueError, match="within the posterior's"):
        question(q, PRIOR, PRIOR)
