"""How many of a kind are tried how often."""

import pytest


def thinned(values, keep):
    """Return ``values`` for ``parametrize``, those outside of ``keep`` marked exhaustive."""
    values = list(values)
    assert set(keep) <= set(values)
    return [each if each in keep else _exhaustive(each) for each in values]


def _exhaustive(value):
    values = value if isinstance(value, tuple) else (value,)  # of several names at once
    return pytest.param(*values, marks=pytest.mark.exhaustive)
