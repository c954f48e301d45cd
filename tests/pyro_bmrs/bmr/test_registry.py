"""Look-up of rules by three types: which one wins, what Independent means, and honest refusals."""

import pytest
import torch
from oracle import assert_close, double
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
from pyro_bmrs.bmr import registry

PRIOR = LogUniform(double(-20.0), double(0.0))
Q = TruncatedLogNormal(double([[-18.0, -0.5, -6.0], [-25.0, 1.0, -3.0]]), double([1.0, 0.1, 3.0]))


@pytest.fixture
def fresh_registry(monkeypatch):
    """Let a test register rules that are forgotten after it."""
    for table in ("_EVIDENCE_CHANGES", "_REDUCED_POSTERIORS"):
        monkeypatch.setattr(registry, table, dict(getattr(registry, table)))
    yield
    registry._find_rule.cache_clear()


class Special(TruncatedLogNormal):
    """A subclass, to have rules of its own."""


def special():
    return Special(double([-3.0, -9.0]), double(0.5))


# --- which rule ----------------------------------------------------------------------------------------------


def test_a_rule_serves_subclasses():
    plain = TruncatedLogNormal(double([-3.0, -9.0]), double(0.5))
    assert_close(evidence_change(special(), PRIOR, spike(PRIOR)), evidence_change(plain, PRIOR, spike(PRIOR)), 0)


@pytest.mark.usefixtures("fresh_registry")
def test_the_most_specific_rule_wins():
    before = evidence_change(special(), PRIOR, PRIOR)  # and is in the cache of look-ups

    @register_evidence_change(Special, LogUniform, LogUniform)
    def constant(q, p, reduced):
        return torch.full(q.batch_shape, 7.0)

    assert_close(before, double(0.0), 1e-12)
    assert_close(evidence_change(special(), PRIOR, PRIOR), double(7.0), 0)
    assert_close(evidence_change(Q, PRIOR, PRIOR), double(0.0), 1e-12)


@pytest.mark.usefixtures("fresh_registry")
def test_the_posterior_decides_before_the_priors():
    class SpecialPrior(LogUniform):
        pass

    register_evidence_change(TruncatedLogNormal, SpecialPrior, LogUniform)(lambda q, p, reduced: double(1.0))
    register_evidence_change(Special, LogUniform, LogUniform)(lambda q, p, reduced: double(2.0))
    assert evidence_change(special(), SpecialPrior(), PRIOR) == 2
    assert evidence_change(Q, SpecialPrior(), PRIOR) == 1


@pytest.mark.usefixtures("fresh_registry")
def test_registering_returns_the_function():
    def rule(q, p, reduced):
        return q

    assert register_reduced_posterior(Normal, Normal, Normal)(rule) is rule
    q = Normal(0.0, 1.0)
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


# --- refusals ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("question", [evidence_change, reduced_posterior])
def test_a_missing_rule_names_the_three_types(question):
    with pytest.raises(NotImplementedError, match=r"Normal.*LogUniform.*TruncatedLogNormal"):
        question(Normal(0.0, 1.0), PRIOR, spike(PRIOR))


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
