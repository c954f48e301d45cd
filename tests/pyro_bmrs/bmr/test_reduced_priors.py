"""The paper's two reduced priors: what they are, and what they refuse."""

import math

import pytest
import torch
from oracle import assert_close, double

from pyro_bmrs import LogUniform, precision_window, spike


def prior(*batch_shape):
    return LogUniform(double(-20.0), double(0.0)).expand(batch_shape)


def test_spike_holds_its_mass_at_the_lower_bound():
    reduced = spike(prior(3), scale=1e-6)
    assert reduced.batch_shape == (3,)
    assert_close(reduced.loc, double(-20.0), 0)
    assert_close(reduced.scale, double(1e-6), 1e-15, floor=0)
    assert_close(reduced.log_theta_mean, double(-20 + 1e-6 * math.sqrt(2 / math.pi)), 1e-14)
    assert (reduced.log_low == -20).all()
    assert (reduced.log_high == 0).all()


@pytest.mark.parametrize("scale", [0.0, -1.0, math.inf, math.nan])
def test_spike_refuses(scale):
    with pytest.raises(ValueError, match="scale"):
        spike(prior(), scale)


def test_window_is_the_precision_of_the_paper():
    window = precision_window(prior(2), p1=8, p2=23)
    assert isinstance(window, LogUniform)
    assert window.batch_shape == (2,)
    assert_close(window.support.lower_bound, double(2.0**-23), 1e-14, floor=0)
    assert_close(window.support.upper_bound, double(2.0**-8), 1e-14, floor=0)


def test_window_without_p2_reaches_down_to_the_prior():
    wider = LogUniform(double([-20.0, -40.0]), double(0.0))
    window = precision_window(wider, p1=4, p2=None)
    assert_close(window.log_low, wider.log_low, 0)
    assert_close(window.log_high, double(-4 * math.log(2)), 1e-15)


def test_window_may_be_the_whole_support():
    window = precision_window(LogUniform(-4 * math.log(2), 0.0), p1=0, p2=4)
    assert_close(window.log_width, torch.tensor(4 * math.log(2)), 1e-6)


@pytest.mark.parametrize(
    ("p1", "p2"),
    [(23, 8), (8, 8), (-1, 23), (8, 40), (40, None)],
    ids=["reversed", "empty", "above the support", "below the support", "wholly below the support"],
)
def test_window_refuses(p1, p2):
    with pytest.raises(ValueError, match="window"):
        precision_window(prior(), p1, p2)


def test_window_refuses_if_one_of_a_batch_is_outside():
    with pytest.raises(ValueError, match="window"):
        precision_window(LogUniform(double([-20.0, -10.0]), double(0.0)), p1=8, p2=23)
