"""Fits that are killed and resumed end as if they had not been; ``tests/kills.py`` does so at length."""

import pytest
from kills import CASES, campaign
from marks import thinned


@pytest.mark.slow
@pytest.mark.parametrize("case", thinned(CASES, keep=["plain"]))
def test_killed_fits_resume_to_the_bit(case):
    counts, wrong = campaign(first=0, count=2, per_case=2, cases=(case,))
    assert sum(counts.values()) == 2
    assert wrong == []
