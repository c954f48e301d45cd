"""How many of a kind are tried how often."""

import pytest


def thinned(values, keep):
    """Return ``values`` for ``parametrize``, those outside of ``keep`` marked exhaustive."""
    values = list(values)
    assert set(keep) <= set(values)
    return [each if each in keep else pytest.param(each, marks=pytest.mark.exhaustive) for each in values]
