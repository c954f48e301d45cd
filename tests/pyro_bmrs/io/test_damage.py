"""Damaged files are refused; ``tests/damage.py`` damages many more."""

import pytest
from damage import campaign


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:the fit has ended")
def test_damaged_files_are_refused():
    counts, wrong = campaign(first=10_000, count=200)
    assert wrong == []
    assert sum(counts.values()) > 150
