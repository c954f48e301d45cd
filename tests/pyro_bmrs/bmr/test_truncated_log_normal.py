"""Evidence changes and reduced posteriors in closed form: the oracle, quadrature, Bayes' rule, limits, symmetries."""

import math

import mpmath
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracle import (
    HIGH,
    LOW,
    MODERATE,
    ROWS,
    Case,
    assert_close,
    assert_finite,
    cases,
    double,
    midpoints,
    rounded_to_float32,
    rows,
)

from pyro_bmrs import LogUniform, TruncatedLogNormal, evidence_change, precision_window, reduced_posterior, spike

# The reduced priors of the oracle's keys, from the prior.
ORACLE = {
    "dF_N": spike,
    "dF_N_wide": lambda p: spike(p, scale=1.0),
    "dF_U8": lambda p: precision_window(p, p1=8),
    "dF_U4": lambda p: precision_window(p, p1=4),
}


def inner_window(p):
    """Return a reduced prior that fits any prior: the middle half of its support."""
    return LogUniform(p.log_low + 0.25 * p.log_width, p.log_high - 0.25 * p.log_width)


def inner_bump(p):
    """Return a reduced log-normal on that half, with its centre off the middle."""
    window = inner_window(p)
    width = p.log_width.double()
    return TruncatedLogNormal(p.log_low + 0.3 * width, 0.2 * width, window.log_low, window.log_high)


REDUCED = {"spike": spike, "wide spike": ORACLE["dF_N_wide"], "window": inner_window, "bump": inner_bump}
over_reduced = pytest.mark.parametrize("reduce", REDUCED.values(), ids=REDUCED)
# A grid of log(theta) cannot see the spike itself.
over_broad = pytest.mark.parametrize("reduce", list(REDUCED.values())[1:], ids=list(REDUCED)[1:])


def change(case, reduce):
    return evidence_change(case.q, case.p, reduce(case.p))


# --- reference values ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ORACLE)
def test_oracle(key):
    assert_close(change(rows(), ORACLE[key]), ROWS[key], 1e-10)


@pytest.mark.parametrize("key", ORACLE)
def test_oracle_in_float32(key):
    single, exact = (change(case, ORACLE[key]) for case in rounded_to_float32())
    assert single.dtype == torch.float32
    assert_close(single, exact, 1e-4)


@pytest.fixture
def _digits():
    with mpmath.workdps(25):
        yield


@pytest.mark.slow
@pytest.mark.usefixtures("_digits")
@over_reduced
@pytest.mark.parametrize("case", MODERATE)
def test_quadrature(case, reduce):
    """The definition: the log of E_q[reduced prior / prior], with nothing shared but the densities' formulas."""
    reduced = reduce(case.p)
    loc, log_scale, low, high = (mpmath.mpf(value.item()) for value in case)
    r_low, r_high = (mpmath.mpf(bound.item()) for bound in (reduced.log_low, reduced.log_high))
    q, r = bump(loc, mpmath.exp(log_scale)), lambda x: mpmath.mpf(1)
    if isinstance(reduced, TruncatedLogNormal):
        r = bump(mpmath.mpf(reduced.loc.item()), mpmath.mpf(reduced.scale.item()))
    product = integral(lambda x: q(x) * r(x), r_low, r_high)
    expected = mpmath.log(product * (high - low) / integral(q, low, high) / integral(r, r_low, r_high))
    assert_close(change(case, reduce), double(float(expected)), 1e-10)


def bump(loc, scale):
    return lambda x: mpmath.exp(-(((x - loc) / scale) ** 2) / 2)


def integral(function, low, high):
    """Return the integral by quadrature in panels that narrow towards the lower bound, where the spike is."""
    near = [mpmath.mpf(10) ** (mpmath.mpf(power) / 2) for power in range(-18, -3)]
    edges = [low + share * (high - low) for share in (0, *near, *(mpmath.mpf(k) / 50 for k in range(1, 51)))]
    highest = max(function(edge) for edge in edges)  # quad's tolerance is absolute
    return highest * mpmath.quad(lambda x: function(x) / highest, edges, method="gauss-legendre")


@pytest.mark.parametrize("reduce", [spike, inner_window, inner_bump])
@pytest.mark.parametrize("case", MODERATE)
def test_mean_ratio_over_draws(case, reduce):
    """E_q[p~ / p] is also E_p~[q / p], and draws of these reduced priors do not miss where the two meet."""
    lower, upper = case.p.support.lower_bound, case.p.support.upper_bound
    theta = reduce(case.p).icdf(midpoints(100_000)).clamp(lower, upper)
    log_ratio = case.q.log_prob(theta) - case.p.log_prob(theta)
    assert_close(change(case, reduce), torch.logsumexp(log_ratio, 0) - math.log(100_000), 1e-4)


# --- Bayes' rule ---------------------------------------------------------------------------------------------


@over_broad
@pytest.mark.parametrize("case", MODERATE)
def test_reduced_posterior_is_the_posterior_reweighted(case, reduce):
    """log q~ = log q + log p~ - log p - Delta F at every point: the right shape, and the right constant."""
    q, p, reduced = case.q, case.p, reduce(case.p)
    x = torch.linspace(0.05, 0.95, 10, dtype=torch.float64) * reduced_width(reduced) + reduced.log_low
    theta = x.exp()
    expected = q.log_prob(theta) + reduced.log_prob(theta) - p.log_prob(theta) - evidence_change(q, p, reduced)
    assert_close(reduced_posterior(q, p, reduced).log_prob(theta), expected, 1e-9)


def reduced_width(reduced):
    return reduced.log_high - reduced.log_low


@pytest.mark.parametrize("case", MODERATE)
def test_reduction_in_two_steps(case):
    """Evidence adds along a chain of priors, each step starting from the posterior that the last one gave."""
    p, window, bump_ = case.p, inner_window(case.p), inner_bump(case.p)
    between = reduced_posterior(case.q, p, window)
    stepwise = evidence_change(case.q, p, window) + evidence_change(between, window, bump_)
    assert_close(stepwise, evidence_change(case.q, p, bump_), 1e-11)
    one, two = reduced_posterior(case.q, p, bump_), reduced_posterior(between, window, bump_)
    for name in ("loc", "scale", "log_low", "log_high"):
        assert_close(getattr(one, name), getattr(two, name), 1e-12)


@over_reduced
def test_prior_wider_than_the_posterior(reduce):
    """The wider a prior, the less density it had to lose: the change grows by the log ratio of widths."""
    case = MODERATE[-1]
    reduced, wide = reduce(case.p), LogUniform(case.low - 5, case.high + 2)
    gained = torch.log(wide.log_width / case.p.log_width)
    assert_close(evidence_change(case.q, wide, reduced), evidence_change(case.q, case.p, reduced) + gained, 1e-13)


@given(cases())
def test_no_change_without_a_change(case):
    assert_close(change(case, lambda p: p), double(0.0), 1e-12)


@given(cases())
def test_a_very_wide_spike_changes_nothing(case):
    assert_close(change(case, lambda p: spike(p, scale=1e6)), double(0.0), 1e-8)


@given(cases())
def test_a_posterior_equal_to_the_prior_gives_no_evidence(case):
    """A likelihood that says nothing says nothing about any other prior either."""
    flat = case._replace(log_scale=torch.full_like(case.log_scale, 16.0))
    for reduce in REDUCED.values():
        assert_close(change(flat, reduce), double(0.0), 1e-9)


# --- the spike -----------------------------------------------------------------------------------------------


def test_the_limit_of_the_spike_is_the_savage_dickey_ratio():
    broad = ROWS["log_scale"] > -1  # where the density hardly changes over the spike
    case = Case(ROWS["loc"][broad], ROWS["log_scale"][broad], double(LOW), double(HIGH))
    lower = double(LOW).exp()
    ratio = case.q.log_prob(lower) - case.p.log_prob(lower)
    assert_close(change(case, lambda p: spike(p, scale=1e-9)), ratio, 1e-6)


@pytest.mark.parametrize("scale", [1e-8, 1e-4, 1e-2])
def test_a_spike_on_a_collapsed_posterior_gains_the_width_of_the_prior(scale):
    """Posterior and spike alike at the bound: E_q[p~/p] is the prior's width times the overlap of two half normals."""
    case = Case(double(LOW), double(math.log(scale)), double(LOW), double(HIGH))
    expected = math.log((HIGH - LOW) / (scale * math.sqrt(math.pi)))
    assert_close(change(case, lambda p: spike(p, scale)), double(expected), 1e-12)


# --- properties over the whole plane -------------------------------------------------------------------------


@pytest.mark.slow
@given(cases())
def test_finite_with_finite_gradients(case):
    case = case.requires_grad()
    for name, reduce in REDUCED.items():
        value = change(case, reduce)
        assert_finite(**{name: value})
        gradients = torch.autograd.grad(value.sum(), [case.loc, case.log_scale])
        assert_finite(**{f"d {name} / d {of}": g for of, g in zip(("loc", "log_scale"), gradients, strict=True)})


@given(cases())
def test_at_most_the_log_of_the_highest_ratio(case):
    """A mean is at most the maximum: of p~/p for a window, the ratio of widths."""
    assert (change(case, inner_window) <= math.log(2) + 1e-12).all()


@pytest.mark.slow
@given(cases())
def test_shift_of_log_theta(case):
    case = case.on_grid()
    for reduce in (ORACLE["dF_N_wide"], inner_window):
        assert_close(change(case.shifted(7.5), reduce), change(case, reduce), 1e-11)


@given(cases())
def test_reflection_of_log_theta(case):
    """A window in the middle cannot tell up from down."""
    case = case.on_grid()
    assert_close(change(case.reflected(), inner_window), change(case, inner_window), 1e-11)


@given(cases(), st.floats(-3, 3))
def test_reduced_posteriors_are_proper(case, log_scale):
    for reduce in (inner_window, lambda p: spike(p, math.exp(log_scale))):
        reduced = reduced_posterior(case.q, case.p, reduce(case.p))
        assert_finite(mean=reduced.mean, entropy=reduced.entropy())
        assert (reduced.scale <= case.q.scale * (1 + 1e-12)).all()


@pytest.mark.parametrize("case", MODERATE)
@pytest.mark.parametrize("reduce", [spike, inner_window, inner_bump])
def test_gradients(case, reduce):
    def by_parameters(loc, log_scale):
        return change(case._replace(loc=loc, log_scale=log_scale), reduce)

    case = case.requires_grad()
    assert torch.autograd.gradcheck(by_parameters, (case.loc, case.log_scale), eps=1e-6, atol=1e-6, rtol=1e-4)


# --- shapes --------------------------------------------------------------------------------------------------


def test_shapes_and_dtype():
    q = TruncatedLogNormal(torch.zeros(4, 3), torch.ones(3))
    prior = LogUniform()
    for reduced in (spike(prior), precision_window(prior)):
        assert evidence_change(q, prior, reduced).shape == (4, 3)
        assert evidence_change(q, prior, reduced).dtype == torch.float32
        posterior = reduced_posterior(q, prior, reduced)
        assert posterior.batch_shape == (4, 3)
        assert posterior.loc.dtype == torch.float32
