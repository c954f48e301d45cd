"""Greedy removal: its order, when it stops, and what the prior odds do."""

import pytest
import torch
from oracle import double

from pyro_bmrs.bmr.search import greedy_search

VALUES = {"a": 1.0, "b": -0.5, "c": 2.0, "d": -3.0}


def additive(removed):
    return sum(VALUES[each] for each in removed)


def test_removes_the_best_first():
    result = greedy_search(additive, VALUES)
    assert result.removed == ("c", "a")
    assert result.delta_f == (2.0, 3.0)


@pytest.mark.parametrize(("prior_log_odds", "removed"), [(-1.5, "c"), (0.0, "ca"), (0.5, "cab"), (4.0, "cabd")])
def test_prior_odds_count_for_each(prior_log_odds, removed):
    assert "".join(greedy_search(additive, VALUES, prior_log_odds).removed) == removed


def test_takes_tensors():
    assert greedy_search(lambda removed: double(additive(removed)), VALUES).delta_f == (2.0, 3.0)


def test_notices_what_is_only_redundant_together():
    """Of two features that say the same either may go, but not both."""
    result = greedy_search(lambda removed: torch.tensor([0.0, 2.0, -50.0])[len(removed)], [0, 1])
    assert result.removed == (0,)


def test_stops_at_nothing_and_at_an_undefined_change():
    assert greedy_search(additive, []).removed == ()
    assert greedy_search(lambda removed: float("nan"), VALUES).removed == ()
