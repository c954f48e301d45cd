"""A small part of ``tests/campaign.py``, which runs at length by hand."""

import pytest
from campaign import check
from marks import thinned

FINE = ("exact", "refused", "nothing offered", "nothing removed")


@pytest.mark.slow
@pytest.mark.parametrize("first", thinned(range(0, 120, 20), keep=[20]))
def test_random_networks_are_compacted_exactly_or_refused(first):
    outcomes = {seed: check(seed, noise=bool(seed % 2)) for seed in range(first, first + 20)}
    wrong = {seed: each for seed, each in outcomes.items() if each[0] not in FINE}
    assert not wrong
    assert sum(outcome == "exact" for outcome, _ in outcomes.values()) >= 10
