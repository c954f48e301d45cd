"""What the truncated log-normal is held to: reference values, drawn parameters, quadrature, comparison.

``ROWS`` maps each key of ``truncated_log_normal.json`` to a float64 tensor over its rows. The values were computed
with 60 to 140 digits; ``loc`` and ``log_scale`` are the posterior's, on bounds of log(theta) ``LOW`` and ``HIGH``.
"""

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from hypothesis import strategies as st

from pyro_bmrs import LogUniform, TruncatedLogNormal

_DATA = json.loads(Path(__file__).with_name("truncated_log_normal.json").read_text())
LOW, HIGH = _DATA["log_low"], _DATA["log_high"]
ROWS = {key: torch.tensor([float(row[key]) for row in _DATA["rows"]], dtype=torch.float64) for key in _DATA["rows"][0]}


def double(values):
    return torch.tensor(values, dtype=torch.float64)


class Case(NamedTuple):
    """Parameters of a batch of posteriors, one tensor each."""

    loc: torch.Tensor
    log_scale: torch.Tensor
    low: torch.Tensor
    high: torch.Tensor

    @property
    def q(self):
        return TruncatedLogNormal(self.loc, self.log_scale.exp(), self.low, self.high)

    @property
    def p(self):
        return LogUniform(self.low, self.high)

    def requires_grad(self):
        """Return a copy with ``loc`` and ``log_scale`` as leaves."""
        return self._replace(
            loc=self.loc.detach().clone().requires_grad_(), log_scale=self.log_scale.detach().clone().requires_grad_()
        )

    def shifted(self, by):
        return self._replace(loc=self.loc + by, low=self.low + by, high=self.high + by)

    def reflected(self):
        return self._replace(loc=self.low + self.high - self.loc)

    def on_grid(self):
        """Return a copy with locations rounded to 1/64, which shifts and reflections then move without rounding."""
        return Case(*(torch.round(value * 64) / 64 for value in self))


def rows(dtype=torch.float64):
    """Return the oracle's rows as a ``Case``."""
    return Case(ROWS["loc"].to(dtype), ROWS["log_scale"].to(dtype), double(LOW).to(dtype), double(HIGH).to(dtype))


def rounded_to_float32():
    """Return the oracle's rows in float32, and in float64 the very numbers that they were rounded to."""
    single = rows(torch.float32)
    log_scale = single.log_scale.exp().double().log()
    return single, Case(single.loc.double(), log_scale, single.low.double(), single.high.double())


@st.composite
def cases(draw):
    """Draw a batch of posteriors, far outside and inside of bounds wide and narrow."""
    loc, log_scale = st.floats(-60, 20), st.floats(-20, 6)
    low, width = st.floats(-40, -1), st.floats(0.1, 60)
    columns = zip(*draw(st.lists(st.tuples(loc, log_scale, low, width), min_size=1, max_size=16)), strict=True)
    loc, log_scale, low, width = (double(column) for column in columns)
    return Case(loc, log_scale, low, low + width)


def moderate(loc, log_scale, low=LOW, high=HIGH):
    """Return one posterior as a ``Case``."""
    return Case(double(loc), double(log_scale), double(low), double(high))


# One of each kind that quadrature can follow: inside, near a bound, beyond either, nearly flat, on other bounds.
MODERATE = [
    moderate(-3.0, -0.5),
    moderate(-19.6, -1.0),
    moderate(-23.0, 0.5),
    moderate(2.0, 0.2),
    moderate(-8.0, 4.0),
    moderate(0.7, -0.3, low=-4.0, high=2.5),
]


def integrate(function, low, high, panels=200):
    """Return the integral of ``function`` by Gauss-Legendre quadrature in panels."""
    nodes, weights = (torch.as_tensor(values) for values in np.polynomial.legendre.leggauss(20))
    edges = torch.linspace(0, 1, panels + 1, dtype=torch.float64) * (high - low) + low
    half = 0.5 * edges.diff().unsqueeze(-1)
    return (function(edges[:-1, None] + half * (1 + nodes)) * half * weights).sum()


def midpoints(count):
    """Return equidistant probabilities, which stand for draws without their noise."""
    return (torch.arange(count, dtype=torch.float64) + 0.5) / count


def assert_close(actual, expected, tolerance, floor=1.0):
    """Assert that errors are within ``tolerance``, relative to what is expected above ``floor`` and absolute below."""
    actual, expected = torch.broadcast_tensors(actual.detach().double(), expected.detach().double())
    error = (actual - expected).abs() / expected.abs().clamp(min=floor)
    wrong = ~((error <= tolerance) | (actual == expected))  # NaN is wrong
    assert not wrong.any(), (
        f"{int(wrong.sum())} of {wrong.numel()} beyond {tolerance}: got {actual[wrong][:3]}, expected "
        f"{expected[wrong][:3]} at flat index {wrong.flatten().nonzero().flatten()[:3].tolist()}"
    )


def assert_finite(**values):
    for name, value in values.items():
        assert torch.isfinite(value).all(), f"{name} is {value}"
