"""Odd arguments give a right answer or one clear error; ``tests/fuzzing.py`` tries many more."""

import pytest
from fuzzing import campaign
from marks import thinned


@pytest.mark.slow
@pytest.mark.parametrize("first", thinned([0, 100, 200], keep=[200]))
def test_odd_arguments_are_right_or_refused(first):
    counts, surprises = campaign(first, 100)
    assert surprises == {}
    assert sum(counts.values()) == 100
    assert counts["right"] > 0
