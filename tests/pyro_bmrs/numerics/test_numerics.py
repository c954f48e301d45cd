"""The Gaussian on an interval, against mpmath with digits to spare and against numerical derivatives."""

import math

import mpmath
import pytest
import torch
from oracle import assert_close, double

from pyro_bmrs import numerics

# (distance, width), away from the borders of the regimes, where numerical derivatives may step.
NARROW = [(-0.3, 0.7), (0.4, 0.5), (30.0, 0.01), (-1e-4, 3e-4)]
INTERIOR = [(-3.0, 8.0), (-0.6, 1.3), (-5.0, 10.0), (-0.02, 6.0)]
TAIL = [(0.3, 4.0), (2.0, 1.5), (3.5, 0.4), (20.0, 3.0)]
REGIMES = NARROW + INTERIOR + TAIL
BORDERS = [(1e-9, 5.0), (-1e-9, 5.0), (-0.45, 0.999), (-0.45, 1.001), (2.9999, 0.5), (3.0001, 0.5), (10.0, 0.0945)]
FAR = [(100.0, 1e-3), (1e6, 1.0), (4e10, 1e10), (-5e9, 1e10), (-20.0, 1e6), (3e-9, 1e-8)]


@pytest.fixture(autouse=True)
def _precision():
    with mpmath.workdps(60):
        yield


def points(pairs):
    distance, width = double(pairs).unbind(-1)
    return distance.requires_grad_(), width.requires_grad_()


def reference(distance, width):
    """Return log integral, mean displacement, variance and KL from uniform, by the recurrences of the normal."""
    # The recurrences cancel digits: as many as width and distance have zeros, twice, and some.
    digits = 60 + 8 * int(abs(math.log10(width))) + 4 * int(math.log10(1 + abs(distance)))
    with mpmath.workdps(digits):
        low, high, mode = mpmath.mpf(distance), mpmath.mpf(distance) + mpmath.mpf(width), max(distance, 0)
        # Heights are measured from the mode, with the tail (erfc) where the interval lies in one.
        mass = mpmath.erfc(low / mpmath.sqrt(2)) - mpmath.erfc(high / mpmath.sqrt(2))
        mass = mpmath.sqrt(mpmath.pi / 2) * mass
        near, far = mpmath.exp(-(low**2) / 2) / mass, mpmath.exp(-(high**2) / 2) / mass
        mean = near - far
        variance = 1 + low * near - high * far - mean**2
        kl = mpmath.log(mpmath.mpf(width)) - mpmath.log(mass) - (mean**2 + variance) / 2
        values = mpmath.log(mass) + mpmath.mpf(mode) ** 2 / 2, mean - mode, variance, kl
        return [float(value) for value in values]


@pytest.mark.parametrize(("distance", "width"), REGIMES + BORDERS + FAR)
def test_matches_mpmath(distance, width):
    d, w = double(distance), double(width)
    log_integral, mean, variance, kl = map(double, reference(distance, width))
    assert_close(numerics.log_integral(d, w), log_integral, 1e-12)
    assert_close(numerics.mean_displacement(d, w), mean, 1e-11, floor=0 if distance > 0 else width)
    assert_close(numerics.variance(d, w), variance, 1e-9, floor=0)
    assert_close(numerics.kl_from_uniform(d, w), kl, 1e-12)


def test_narrow_interval_of_a_very_distant_gaussian():
    """About exp(-t d) over a width of 1/d, however large d is: (1 - exp(-d w)) / d."""
    distance, width = double(877484.8542478775), double(1.1342092536761511e-06)
    slope = distance * width
    assert_close(numerics.log_integral(distance, width), torch.log(-torch.expm1(-slope) / distance), 1e-12)
    kl = torch.log(slope / -torch.expm1(-slope)) - 1 + slope / torch.expm1(slope)
    assert_close(numerics.kl_from_uniform(distance, width), kl, 1e-10)


def test_far_tail_is_exponential():
    distance, width = double([1e4, 1e8]), double([1e4, 1e8])
    assert_close(numerics.log_integral(distance, width), -torch.log(distance), 1e-7)
    assert_close(numerics.mean_displacement(distance, width), 1 / distance, 1e-7, floor=0)
    assert_close(numerics.variance(distance, width), 1 / distance**2, 1e-7, floor=0)
    assert_close(numerics.kl_from_uniform(distance, width), torch.log(width * distance) - 1, 1e-7)


@pytest.mark.parametrize(("loc", "scale", "x"), [(-60.0, 2e-9, -19.5), (3.0, 1.0, -4.0), (-7.0, 1e3, -7.5)])
def test_excess_is_the_drop_of_the_log_density(loc, scale, x):
    m, s, t = mpmath.mpf(loc), mpmath.mpf(scale), mpmath.mpf(x)
    mode = min(max(m, -20), 0)
    expected = ((t - m) ** 2 - (mode - m) ** 2) / (2 * s**2)
    actual = numerics.relative_energy(*map(double, (x, loc, scale, -20.0, 0.0)))
    assert_close(actual, double(float(expected)), 1e-12, floor=0)


@pytest.mark.parametrize("regime", [NARROW, INTERIOR, TAIL], ids=["narrow", "interior", "tail"])
@pytest.mark.parametrize("name", ["log_integral", "mean_displacement", "variance", "kl_from_uniform"])
def test_gradients(name, regime):
    assert torch.autograd.gradcheck(getattr(numerics, name), points(regime), eps=1e-6, atol=1e-6, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["log_integral", "mean_displacement"])
def test_second_gradients(name):
    regimes = [pair for pair in REGIMES if pair[1] > 0.1]  # differences of the differences need some width
    assert torch.autograd.gradgradcheck(getattr(numerics, name), points(regimes), eps=1e-5, atol=1e-5, rtol=1e-4)


QUANTILE_CASES = {
    "narrow": (-8.0, 60.0),
    "interior": (-7.0, 1.5),
    "near the bound": (-20.5, 2.0),
    "tail below": (-40.0, 3.0),
    "tail above": (15.0, 2.0),
    "flat": (3.0, 1e9),
}


@pytest.mark.parametrize(("loc", "scale"), QUANTILE_CASES.values(), ids=QUANTILE_CASES)
def test_quantile_inverts_the_cdf(loc, scale):
    probability = double([1e-9, 1e-3, 0.3, 0.5, 0.9, 1 - 1e-6])
    x = numerics.quantile(probability, *map(double, (loc, scale, -20.0, 0.0)))
    # the mirrored half axis where the interval lies above loc, for erfc's sake
    sign = -1 if loc < -10 else 1
    low, high, *at = (sign * (mpmath.mpf(v) - loc) / mpmath.mpf(scale) for v in (-20, 0, *x.tolist()))
    with mpmath.workdps(150):
        mass = mpmath.ncdf(high) - mpmath.ncdf(low)
        reached = [float((mpmath.ncdf(v) - mpmath.ncdf(low)) / mass) for v in at]
    assert_close(double(reached), probability, 1e-11)


@pytest.mark.parametrize(("loc", "scale"), QUANTILE_CASES.values(), ids=QUANTILE_CASES)
def test_quantile_reaches_exactly_the_bounds(loc, scale):
    x = numerics.quantile(double([0.0, 1.0]), *map(double, (loc, scale, -20.0, 0.0)))
    assert_close(x, double([-20.0, 0.0]), 1e-12)
    assert (x >= -20).all()
    assert (x <= 0).all()


@pytest.mark.parametrize(("loc", "scale"), QUANTILE_CASES.values(), ids=QUANTILE_CASES)
def test_quantile_gradients(loc, scale):
    inputs = [double([value] * 4).requires_grad_() for value in (loc, scale, -20.0, 0.0)]
    probability = double([0.05, 0.3, 0.6, 0.95]).requires_grad_()
    assert torch.autograd.gradcheck(numerics.quantile, (probability, *inputs), eps=1e-6, atol=1e-6, rtol=1e-4)


def test_quantile_sums_gradients_over_draws():
    loc, scale, low, high = (double([value] * 3).requires_grad_() for value in (-7.0, 1.5, -20.0, 0.0))
    x = numerics.quantile(torch.rand(5, 3, dtype=torch.float64), loc, scale, low, high)
    assert x.shape == (5, 3)
    for gradient in torch.autograd.grad(x.sum(), [loc, scale, low, high]):
        assert gradient.shape == (3,)


def test_vmap_maps_values_and_gradients():
    distance, width = (value.detach() for value in points(REGIMES))
    for function in (numerics.log_integral, numerics.variance, numerics.kl_from_uniform):
        per_point = torch.func.vmap(torch.func.grad(function))(distance, width)
        leaf = distance.clone().requires_grad_()
        (together,) = torch.autograd.grad(function(leaf, width).sum(), leaf)
        assert_close(per_point, together, 1e-12)


DRAWN = {**QUANTILE_CASES, "at the bound": (0.0, 0.0067), "at the crossover": (0.0133, 0.0067), "far": (0.5, 0.0067)}


@pytest.mark.parametrize(("loc", "scale"), DRAWN.values(), ids=DRAWN)
def test_draws_are_quantiles(loc, scale):
    """To 1e-4 of the deviation on average, and 1e-2 for the rarest of 2000; and so are their gradients."""
    uniform, weights = torch.rand(2000), torch.rand(2000)
    single = [torch.tensor(float(value), requires_grad=True) for value in (loc, scale, -20.0, 0.0)]
    exact = [value.detach().double().requires_grad_() for value in single]
    theta = numerics.sample(uniform, *single)
    from_high = loc > -10
    probability = 1 - uniform.double() if from_high else uniform.double()
    expected = numerics.quantile(probability, *exact).exp()
    error = (theta.double() - expected).abs() / expected.std()
    rounding = 1e-7 / expected.std()
    assert error.mean() <= 1e-4 + rounding
    assert error.max() <= 1e-2 + rounding
    gradients = torch.autograd.grad((weights * theta).sum(), single)
    references = torch.autograd.grad((weights * expected).sum(), exact)
    for found, reference in zip(gradients, references, strict=True):
        assert_close(found, reference, 1e-3, floor=1e-2)


def test_one_draw_of_each_has_the_gradients_of_a_batch_of_one():
    """Sums over draws may be the very tensors that are summed: nothing of them may change."""
    values = [torch.linspace(-22, 3, 50), torch.logspace(-3, 2, 50), torch.full((50,), -20.0), torch.zeros(50)]
    uniform, weights = torch.rand(50), torch.rand(50)
    gradients = []
    for shape in ((50,), (1, 50)):
        parameters = [value.clone().requires_grad_() for value in values]
        theta = numerics.sample(uniform.view(shape), *parameters)
        gradients.append(torch.autograd.grad((weights * theta).sum(), parameters))
    torch.testing.assert_close(*gradients, rtol=1e-6, atol=0)


@pytest.mark.parametrize("loc", [-1e4, -30.0, -20.0, -10.0, 0.0, 0.02, 5.0, 1e4])
@pytest.mark.parametrize("scale", [2e-9, 1e-3, 1.0, 150.0, 1e9])
@pytest.mark.parametrize("uniform", [0.0, 2**-24, 0.5, 1 - 2**-24])
def test_draws_are_finite_within_bounds_with_finite_gradients(loc, scale, uniform):
    parameters = [torch.tensor(value, requires_grad=True) for value in (loc, scale, -20.0, 0.0)]
    theta = numerics.sample(torch.tensor(uniform), *parameters)
    assert torch.tensor(-20.0).exp() <= theta <= 1
    for gradient in torch.autograd.grad(theta, parameters):
        assert torch.isfinite(gradient)
