"""Odd arguments give a right answer or one clear error; ``tests/fuzzing.py`` tries many more."""

import pytest
from fuzzing import campaign


@pytest.mark.parametrize("first", [0, 100, 200])
def test_odd_arguments_are_right_or_refused(first):
    counts, surprises = campaign(first, 100)
    assert surprises == {}
    assert sum(counts.values()) == 100
    assert counts["right"] > 0
