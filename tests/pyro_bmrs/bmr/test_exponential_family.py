"""Evidence changes of exponential families: digits against mpmath, torch's own log-normalisers, conjugate models."""

import itertools
import math
import random
from typing import NamedTuple

import mpmath
import pyro.distributions as dist
import pytest
import torch
from oracle import assert_close, double
from torch import distributions as td

from pyro_bmrs.bmr import (
    DivergentIntegralError,
    evidence_change,
    reduced_posterior,
    register_exponential_family,
)
from pyro_bmrs.bmr.exponential_family import Family, bregman
from pyro_bmrs.bmr.log_gamma import log_gamma_second_difference, subtract_prior

TRIL = double([[1.0, 0.0], [0.5, 0.8]])
SPREAD = 0.4 * TRIL + double([[0.1, 0.0], [0.0, -0.05]])


class Example(NamedTuple):
    """Arguments of posterior, prior and reduced prior of one type, for which the integral converges."""

    kind: type
    q: dict
    p: dict
    reduced: dict

    def distributions(self, dtype=torch.float64, kind=None):
        return tuple((kind or self.kind)(**tensors(each, dtype)) for each in (self.q, self.p, self.reduced))


def tensors(arguments, dtype=torch.float64):
    return {name: torch.as_tensor(value, dtype=dtype) for name, value in arguments.items()}


def assert_all_finite(*values):
    assert all(torch.isfinite(value).all() for value in values), values


EXAMPLES = [
    Example(dist.Normal, {"loc": 0.7, "scale": 0.4}, {"loc": 0.1, "scale": 1.0}, {"loc": -0.2, "scale": 0.3}),
    Example(dist.LogNormal, {"loc": 0.7, "scale": 0.4}, {"loc": 0.1, "scale": 1.0}, {"loc": -0.2, "scale": 0.3}),
    Example(dist.HalfNormal, {"scale": 0.4}, {"scale": 1.0}, {"scale": 0.3}),
    Example(
        dist.Gamma,
        {"concentration": 7.0, "rate": 3.0},
        {"concentration": 1.5, "rate": 1.0},
        {"concentration": 2, "rate": 4},
    ),
    Example(
        dist.InverseGamma,
        {"concentration": 7.0, "rate": 3.0},
        {"concentration": 1.5, "rate": 1.0},
        {"concentration": 2, "rate": 4},
    ),
    Example(dist.Exponential, {"rate": 3.0}, {"rate": 1.0}, {"rate": 2.5}),
    Example(
        dist.Beta,
        {"concentration1": 7.0, "concentration0": 3.0},
        {"concentration1": 1.0, "concentration0": 1.5},
        {"concentration1": 4.0, "concentration0": 9.0},
    ),
    Example(
        dist.Dirichlet,
        {"concentration": [7.0, 3.0, 2.5]},
        {"concentration": [1.0, 1.5, 0.5]},
        {"concentration": [4.0, 0.9, 3.0]},
    ),
    Example(dist.Bernoulli, {"probs": 0.9}, {"probs": 0.4}, {"probs": 0.2}),
    Example(dist.Bernoulli, {"logits": 2.0}, {"logits": -0.5}, {"logits": 0.3}),
    Example(dist.Categorical, {"probs": [0.7, 0.2, 0.1]}, {"probs": [0.4, 0.3, 0.3]}, {"probs": [0.1, 0.8, 0.1]}),
    Example(dist.Categorical, {"logits": [0.7, 0.2, 0.1]}, {"logits": [0.4, 0.3, 0.3]}, {"logits": [0.1, 0.8, 0.1]}),
    Example(
        dist.MultivariateNormal,
        {"loc": [0.7, -0.3], "scale_tril": SPREAD.tolist()},
        {"loc": [0.1, 0.2], "scale_tril": TRIL.tolist()},
        {"loc": [-0.2, 0.4], "scale_tril": (0.7 * TRIL).tolist()},
    ),
]
NAMES = [f"{each.kind.__name__} by {next(iter(each.q))}" for each in EXAMPLES]
over_examples = pytest.mark.parametrize("example", EXAMPLES, ids=NAMES)


# --- what the numbers mean ------------------------------------------------------------------------------------


@over_examples
def test_it_is_the_expectation_of_the_ratio(example):
    q, p, reduced = example.distributions()
    draws = q.sample((200_000,))
    ratio = torch.exp(reduced.log_prob(draws) - p.log_prob(draws))
    estimate, error = ratio.mean(), ratio.std() / math.sqrt(len(ratio))
    assert abs(torch.exp(evidence_change(q, p, reduced)) - estimate) < 4 * error + 1e-12


@over_examples
def test_the_reduced_posterior_is_bayes_rule(example):
    q, p, reduced = example.distributions()
    value = p.sample((5,))
    expected = q.log_prob(value) + reduced.log_prob(value) - p.log_prob(value) - evidence_change(q, p, reduced)
    assert_close(reduced_posterior(q, p, reduced).log_prob(value), expected, 1e-12)


@over_examples
@pytest.mark.parametrize("package", [dist, td], ids=["pyro", "torch"])
def test_an_unchanged_prior_changes_nothing(example, package):
    q, p, _ = example.distributions(kind=getattr(package, example.kind.__name__))
    assert_close(evidence_change(q, p, p), torch.zeros(()).double(), 1e-15)
    value = p.sample((5,))
    assert_close(reduced_posterior(q, p, p).log_prob(value), q.log_prob(value), 1e-13)


@over_examples
def test_data_that_say_nothing_favour_no_prior(example):
    _, p, reduced = example.distributions()
    assert_close(evidence_change(p, p, reduced), torch.zeros(()).double(), 1e-14)
    value = p.sample((5,))
    assert_close(reduced_posterior(p, p, reduced).log_prob(value), reduced.log_prob(value), 1e-12)


@over_examples
def test_going_back_undoes_it(example):
    q, p, reduced = example.distributions()
    back = evidence_change(reduced_posterior(q, p, reduced), reduced, p)
    assert_close(back, -evidence_change(q, p, reduced), 1e-12)


# --- torch's own log-normalisers, by Bregman divergences ------------------------------------------------------


def torch_natural(distribution):
    return [value.double() for value in distribution._natural_params]


@pytest.mark.parametrize("name", ["Normal", "Gamma", "Exponential", "Beta", "Dirichlet", "Bernoulli"])
def test_torch_log_normalizer(name):
    q, p, reduced = next(each for each in EXAMPLES if each.kind.__name__ == name).distributions()
    eta_q, eta_p, eta_r = (torch_natural(each) for each in (q, p, reduced))
    eta = [a + c - b for a, b, c in zip(eta_q, eta_p, eta_r, strict=True)]
    total = sum(sign * q._log_normalizer(*each) for sign, each in ((1, eta), (1, eta_p), (-1, eta_q), (-1, eta_r)))
    assert_close(evidence_change(q, p, reduced), total, 1e-12)


@pytest.mark.parametrize("name", ["Normal", "Gamma", "Exponential", "Beta", "Dirichlet", "Bernoulli"])
def test_bregman_form_by_autograd(name):
    """G(n) - G(q) - <grad G(q), n - q> is KL(q || n): with it the second difference is one of KLs and a gradient."""
    q, p, reduced = next(each for each in EXAMPLES if each.kind.__name__ == name).distributions()
    eta_q = [value.detach().requires_grad_() for value in torch_natural(q)]
    mean = torch.autograd.grad(q._log_normalizer(*eta_q).sum(), eta_q)
    step = [r - b for b, r in zip(torch_natural(p), torch_natural(reduced), strict=True)]
    first_order = sum((m * s).sum() for m, s in zip(mean, step, strict=True))
    kl = td.kl_divergence(q, reduced_posterior(q, p, reduced))
    normalizers = p._log_normalizer(*torch_natural(p)) - p._log_normalizer(*torch_natural(reduced))
    assert_close(evidence_change(q, p, reduced), kl + first_order + normalizers, 1e-11)


# --- conjugate models, of which the evidence is known ---------------------------------------------------------


def test_normal_means():
    data, noise = double([0.3, 1.4, -0.2, 0.9]), 0.7

    def posterior(loc, scale):
        precision = 1 / scale**2 + len(data) / noise**2
        return td.Normal((loc / scale**2 + data.sum() / noise**2) / precision, precision**-0.5)

    def log_evidence(loc, scale):
        covariance = noise**2 * torch.eye(len(data)).double() + scale**2
        return td.MultivariateNormal(loc.expand(len(data)), covariance).log_prob(data)

    prior, other = (double(0.1), double(1.3)), (double(-0.4), double(0.2))
    q, p, reduced = posterior(*prior), td.Normal(*prior), td.Normal(*other)
    assert_close(evidence_change(q, p, reduced), log_evidence(*other) - log_evidence(*prior), 1e-12)
    expected, found = posterior(*other), reduced_posterior(q, p, reduced)
    assert_close(found.loc, expected.loc, 1e-14)
    assert_close(found.scale, expected.scale, 1e-14)


@pytest.mark.parametrize("many", [10, 1_000_000])
def test_coin_tosses(many):
    heads = 0.3 * many
    prior, other = double([1.5, 0.5]), double([20.0, 30.0])
    tosses = double([heads, many - heads])

    def log_beta(c):
        return sum(mpmath.loggamma(v) for v in c) - mpmath.loggamma(mpmath.fsum(c))

    def exact(a):
        with mpmath.workdps(40):
            a = [mpmath.mpf(v) for v in a.tolist()]
            return log_beta([x + mpmath.mpf(y) for x, y in zip(a, tosses.tolist(), strict=True)]) - log_beta(a)

    with mpmath.workdps(40):
        expected = double(float(exact(other) - exact(prior)))
    for kind in (lambda c: td.Beta(*c), td.Dirichlet):
        found = evidence_change(kind(prior + tosses), kind(prior), kind(other))
        assert_close(found, expected, 1e-10)


def test_counts_under_gamma_and_exponential_priors():
    data = double([3.0, 0.0, 2.0, 5.0])

    def log_evidence(a, b):
        total, n = data.sum(), len(data)
        return torch.lgamma(a + total) - torch.lgamma(a) + a * torch.log(b) - (a + total) * torch.log(b + n)

    priors = {(2.0, 1.0): td.Gamma, (1.0, 0.5): td.Exponential, (1.0, 3.0): td.Exponential, (4.0, 2.0): dist.Gamma}
    for prior, other in itertools.product(priors, repeat=2):
        a, b = (double(value) for value in prior)
        p, reduced = (
            priors[each](double(each[1])) if each[0] == 1 else priors[each](*map(double, each))
            for each in (prior, other)
        )
        found = evidence_change(td.Gamma(a + data.sum(), b + len(data)), p, reduced)
        assert_close(found, log_evidence(*map(double, other)) - log_evidence(a, b), 1e-12)


def test_linear_regression():
    inputs, noise = torch.randn(6, 2).double(), 0.5
    data = inputs @ double([0.8, -0.1]) + noise * torch.randn(6).double()

    def log_evidence(p):
        covariance = inputs @ p.covariance_matrix @ inputs.mT + noise**2 * torch.eye(6).double()
        return td.MultivariateNormal(inputs @ p.loc, covariance).log_prob(data)

    def posterior(p):
        precision = p.precision_matrix + inputs.mT @ inputs / noise**2
        moment = p.precision_matrix @ p.loc + inputs.mT @ data / noise**2
        return td.MultivariateNormal(torch.linalg.solve(precision, moment), precision_matrix=precision)

    p = td.MultivariateNormal(double([0.0, 0.3]), scale_tril=TRIL)
    reduced = td.MultivariateNormal(double([0.0, 0.0]), scale_tril=torch.diag(double([1.0, 1e-3])))
    found = evidence_change(posterior(p), p, reduced)
    assert_close(found, log_evidence(reduced) - log_evidence(p), 1e-11)
    expected, reduced_q = posterior(reduced), reduced_posterior(posterior(p), p, reduced)
    assert_close(reduced_q.loc, expected.loc, 1e-12)
    assert_close(reduced_q.covariance_matrix, expected.covariance_matrix, 1e-12)


# --- digits ---------------------------------------------------------------------------------------------------


def exact_normal(locs, scales):
    """Return Delta F, location and scale of the reduced posterior by natural parameters, with 80 digits."""
    with mpmath.workdps(80):
        precision = [1 / mpmath.mpf(s) ** 2 for s in scales]
        moment = [mpmath.mpf(m) * v for m, v in zip(locs, precision, strict=True)]
        for values in (precision, moment):
            values.append(values[0] + values[2] - values[1])
        if precision[3] <= 0:
            return (math.inf, *locs[:2])
        q, p, r, n = (e**2 / (2 * v) - mpmath.log(v) / 2 for e, v in zip(moment, precision, strict=True))
        return float(n + p - q - r), float(moment[3] / precision[3]), float(1 / mpmath.sqrt(precision[3]))


def draw_normals(rng):
    """Draw locations and scales over 16 orders of magnitude, often in each other's reach."""
    scales = [10 ** rng.uniform(-8, 8) for _ in range(3)]
    case = rng.randrange(4)
    if case == 0:
        scales[1] = max(scales)
    elif case == 1:
        scales = [scales[0] * 10 ** rng.uniform(-3, 0) for _ in scales]
    locs = [rng.uniform(-1, 1) * 10 ** rng.uniform(-3, 3) for _ in range(3)]
    if rng.random() < 0.4:
        locs[2] = locs[1] + scales[1] * rng.gauss(0, 1)
    if rng.random() < 0.4:
        locs[0] = locs[2] + scales[2] * rng.gauss(0, 1)
    if rng.random() < 0.3:
        scales[2] = scales[1] * rng.choice([1, 1 + 1e-6, 1 - 1e-9])
    return locs, scales


@pytest.fixture(scope="module")
def normals():
    rng = random.Random(0)
    drawn = [draw_normals(rng) for _ in range(400)]
    drawn += [([1e3, 1e3, 1e3 + 1e-8], [1e-2, 1.0, 1e-8]), ([1e3 + 1e-8, 0.0, 1e3], [1e-8, 1.0, 1e-8])]
    exact = [exact_normal(*each) for each in drawn]
    locs, scales = (double(values).unbind(1) for values in zip(*drawn, strict=True))
    return locs, scales, *double(exact).unbind(1)


def test_digits_of_normals(normals):
    locs, scales, delta_f, loc, scale = normals
    three = [td.Normal(*each) for each in zip(locs, scales, strict=True)]
    assert_close(evidence_change(*three), delta_f, 1e-10)
    ok = delta_f < math.inf
    assert 100 < ok.sum() < len(ok)
    found = reduced_posterior(*(td.Normal(each.loc[ok], each.scale[ok]) for each in three))
    size = torch.stack([*locs, loc])[:, ok].abs().amax(0)
    assert_close(found.loc / size, loc[ok] / size, 1e-13)
    assert_close(found.scale / scale[ok], torch.ones_like(scale[ok]), 1e-12)


def test_digits_of_one_dimensional_multivariate_normals(normals):
    locs, scales, delta_f, *_ = normals
    three = (td.MultivariateNormal(m[:, None], scale_tril=s[:, None, None]) for m, s in zip(locs, scales, strict=True))
    assert_close(evidence_change(*three), delta_f, 1e-10)


@pytest.mark.parametrize("name", ["Gamma", "Beta", "InverseGamma"])
def test_digits_of_large_and_small_concentrations(name):
    rng = random.Random(0)
    drawn = [[[10 ** rng.uniform(-3, 6) for _ in range(3)] for _ in range(2)] for _ in range(300)]
    for i, (a, b) in enumerate(drawn):
        if i % 3 == 0:
            a[1], b[1] = min(a), min(b)
        elif i % 3 == 1:
            a[:] = [a[0] * rng.uniform(0.9999, 1) for _ in a]

    def log_normalizer(a, b):
        log_gamma = mpmath.loggamma
        return log_gamma(a) + log_gamma(b) - log_gamma(a + b) if name == "Beta" else log_gamma(a) - a * mpmath.log(b)

    def exact(a, b):
        q, p, r = zip(map(mpmath.mpf, a), map(mpmath.mpf, b), strict=True)
        n = [x + z - y for x, y, z in zip(q, p, r, strict=True)]
        if min(n) <= 0:
            return math.inf
        return float(log_normalizer(*n) + log_normalizer(*p) - log_normalizer(*q) - log_normalizer(*r))

    with mpmath.workdps(40):
        expected = double([exact(*each) for each in drawn])
    arguments = double(drawn).permute(2, 1, 0)
    found = evidence_change(*(getattr(td, name)(*each) for each in arguments))
    assert_close(found, expected, 1e-8 if name == "Beta" else 1e-11)
    assert 100 < torch.isfinite(found).sum() < len(found)


def test_small_changes_of_large_concentrations_keep_relative_digits():
    p, step = double(1e6), double(1e-3)
    found = log_gamma_second_difference(p + step, p, p + step, p + 2 * step)
    taken = float((p + step) - p)
    with mpmath.workdps(40):
        expected = float(mpmath.polygamma(1, 1e6 + taken)) * taken**2
    assert abs(found / expected - 1) < 1e-8


def test_subtracting_the_prior_rounds_once():
    q, p, r = double(1e6), double(1e6 + 1e-3), double(1.5e-3)
    with mpmath.workdps(40):
        exact = float(mpmath.mpf(q.item()) + mpmath.mpf(r.item()) - mpmath.mpf(p.item()))
    assert subtract_prior(q, p, r) == exact
    assert subtract_prior(q, double(2.0), double(math.inf)) == math.inf


def test_diagonal_covariances_are_sums_of_normals():
    locs = torch.randn(3, 5, 4).double()
    scales = (
        torch.rand(3, 5, 4).double() * double([0.5, 1.0, 0.5])[:, None, None] + double([0.1, 1.0, 0.1])[:, None, None]
    )
    scales[2, 0] = 1e-8
    joint = [td.MultivariateNormal(m, scale_tril=torch.diag_embed(s)) for m, s in zip(locs, scales, strict=True)]
    apart = [td.Normal(m, s) for m, s in zip(locs, scales, strict=True)]
    assert_close(evidence_change(*joint), evidence_change(*apart).sum(-1), 1e-12)
    assert_close(reduced_posterior(*joint).loc, reduced_posterior(*apart).loc, 1e-12)
    assert_close(reduced_posterior(*joint).stddev, reduced_posterior(*apart).scale, 1e-12)


def test_rotations_leave_it_alone():
    three = next(each for each in EXAMPLES if each.kind is dist.MultivariateNormal).distributions()
    turn = torch.linalg.qr(torch.randn(2, 2).double()).Q
    turned = [td.MultivariateNormal(turn @ d.loc, turn @ d.covariance_matrix @ turn.mT) for d in three]
    assert_close(evidence_change(*turned), evidence_change(*three), 1e-13)


# --- finite sets ----------------------------------------------------------------------------------------------


def test_bernoulli_is_a_categorical():
    probs = double([0.9, 0.4, 0.2])
    tosses = evidence_change(*(td.Bernoulli(v) for v in probs))
    assert_close(tosses, evidence_change(*(td.Categorical(torch.stack([1 - v, v])) for v in probs)), 1e-15)


def test_impossible_outcomes():
    certain, fair, impossible = (dist.Bernoulli(probs=double(v)) for v in (1.0, 0.5, 0.0))
    assert_close(evidence_change(fair, fair, certain), double(0.0), 1e-15)
    assert_close(evidence_change(certain, fair, fair), double(0.0), 1e-15)
    assert_close(evidence_change(certain, fair, certain), double(math.log(2)), 1e-15)
    assert evidence_change(certain, fair, impossible) == -math.inf
    assert_close(evidence_change(certain, certain, certain), double(0.0), 1e-15)
    assert reduced_posterior(fair, fair, certain).probs == 1
    with pytest.raises(ValueError, match="rules out all"):
        reduced_posterior(certain, fair, impossible)
    for question in (evidence_change, reduced_posterior):
        with pytest.raises(ValueError, match="reduced prior's support"):
            question(certain, certain, fair)
        with pytest.raises(ValueError, match="posterior's support"):
            question(fair, certain, certain)


def test_logits_beyond_the_rounding_of_probabilities():
    q, p, reduced = (dist.Bernoulli(logits=double(v)) for v in (60.0, -50.0, -300.0))
    with mpmath.workdps(400):
        q1, p1, r1 = (1 / (1 + mpmath.exp(-v)) for v in (60, -50, -300))
        expected = float(mpmath.log(q1 * r1 / p1 + (1 - q1) * (1 - r1) / (1 - p1)))
    assert_close(evidence_change(q, p, reduced), double(expected), 1e-13)


# --- divergence -----------------------------------------------------------------------------------------------

DIVERGENT = [
    (td.Normal, [(0.0, 0.9), (0.0, 0.5), (0.0, 2.0)]),
    (td.LogNormal, [(0.0, 0.9), (0.0, 0.5), (0.0, 2.0)]),
    (td.HalfNormal, [(0.9,), (0.5,), (2.0,)]),
    (td.Gamma, [(2.0, 3.0), (3.0, 1.0), (1.0, 1.0)]),
    (td.Gamma, [(2.0, 3.0), (3.0, 5.0), (5.0, 2.0)]),
    (td.InverseGamma, [(2.0, 3.0), (3.0, 5.0), (5.0, 2.0)]),
    (td.Exponential, [(1.0,), (3.0,), (2.0,)]),
    (td.Beta, [(2.0, 2.0), (3.0, 1.0), (0.5, 1.0)]),
    (td.Beta, [(2.0, 2.0), (1.0, 3.0), (1.0, 0.5)]),
    (td.Dirichlet, [([2.0, 2.0, 1.0],), ([1.0, 3.0, 1.0],), ([1.0, 0.5, 1.0],)]),
    (lambda s: td.MultivariateNormal(torch.zeros(2).double(), scale_tril=s), [(TRIL,), (0.5 * TRIL,), (2 * TRIL,)]),
]


@pytest.mark.parametrize(("kind", "arguments"), DIVERGENT)
def test_divergent_integrals(kind, arguments):
    three = [kind(*(torch.as_tensor(value).double() for value in each)) for each in arguments]
    assert evidence_change(*three) == math.inf
    with pytest.raises(DivergentIntegralError, match="does not integrate"):
        reduced_posterior(*three)


def test_divergence_is_told_by_element():
    q = td.Normal(double([0.0, 0.0, 0.0]).requires_grad_(), double([0.5, 0.9, 0.5]).requires_grad_())
    p = td.Normal(double(0.0), double([1.0, 0.5, 1.0]))
    reduced = td.Normal(double(0.2), double([0.5, 2.0, 0.5]))
    found = evidence_change(q, p, reduced)
    assert torch.isfinite(found).tolist() == [True, False, True]
    assert_all_finite(*torch.autograd.grad(found[[0, 2]].sum(), (q.loc, q.scale)))
    with pytest.raises(DivergentIntegralError, match=r"1 of 3 elements, \(1,\): the precision"):
        reduced_posterior(q, p, reduced)
    with pytest.raises(DivergentIntegralError, match=r"concentration > 0 and rate > 0"):
        reduced_posterior(*(td.Gamma(double(a), double(1.0)) for a in (1.0, 3.0, 1.0)))


# --- shapes, dtypes, gradients --------------------------------------------------------------------------------


@over_examples
def test_batch_shapes_broadcast(example):
    q, p, reduced = example.distributions()
    single = evidence_change(q, p, reduced)
    q, reduced = q.expand([2, 1]), reduced.expand([3])
    assert evidence_change(q, p, reduced).shape == (2, 3)
    assert_close(evidence_change(q, p, reduced), single.expand(2, 3), 1e-14)
    result = reduced_posterior(q, p, reduced)
    assert (result.batch_shape, result.event_shape) == ((2, 3), q.event_shape)
    assert isinstance(result, example.kind)


@over_examples
def test_independent_dimensions(example):
    three = [each.expand([2, 3]) for each in example.distributions()]
    total = evidence_change(*(each.to_event(1) for each in three))
    assert_close(total, evidence_change(*three).sum(-1), 1e-14)


@over_examples
def test_float32(example):
    single = example.distributions(torch.float32)
    exact = [type(d)(**{name: getattr(d, name).double() for name in example.q}) for d in single]
    found = evidence_change(*single)
    assert found.dtype == torch.float32
    assert_close(found, evidence_change(*exact), 1e-6)
    assert reduced_posterior(*single).sample().dtype in (torch.float32, torch.int64)
    parameter = getattr(reduced_posterior(*single), next(iter(example.q)))
    assert parameter.dtype == torch.float32


@over_examples
def test_gradients(example):
    arguments = [tensors(each) for each in (example.q, example.p, example.reduced)]
    leaves = [value.requires_grad_() for each in arguments for value in each.values()]

    def change(*values):
        values = iter(values)
        made = [example.kind(**{name: next(values) for name in each}, validate_args=False) for each in arguments]
        return evidence_change(*made)

    if example.kind is dist.Categorical or example.kind is dist.MultivariateNormal:
        assert_all_finite(*torch.autograd.grad(change(*leaves), leaves))
    else:
        assert torch.autograd.gradcheck(change, leaves)


@over_examples
def test_gradients_where_nothing_changes(example):
    arguments = [tensors(each) for each in (example.q, example.p, example.p)]
    leaves = [value.requires_grad_() for each in arguments for value in each.values()]
    found = evidence_change(*(example.kind(**each) for each in arguments))
    assert_all_finite(*torch.autograd.grad(found, leaves))


# --- another family -------------------------------------------------------------------------------------------


def test_a_family_of_ones_own():
    class Count(dist.Poisson):
        pass

    family = Family(
        natural_parameters=lambda q: torch.log(q.rate.double()).unsqueeze(-1),
        in_domain=lambda eta: torch.isfinite(eta).all(-1),
        domain="0 < rate < inf",
        second_difference=bregman(lambda eta: torch.exp(eta).squeeze(-1)),
        from_natural_parameters=lambda eta: Count(torch.exp(eta.squeeze(-1))),
    )
    register_exponential_family((Count, Count, Count), family)
    q, p, reduced = (Count(double(rate)) for rate in (3.0, 1.0, 2.5))
    assert_close(evidence_change(q, p, reduced), double((3 - 1) * (2.5 - 1) / 1), 1e-14)
    assert_close(reduced_posterior(q, p, reduced).rate, double(7.5), 1e-14)


def test_chi2_is_a_gamma():
    q, p, reduced = (dist.Chi2(double(df)) for df in (9.0, 3.0, 4.0))
    expected = evidence_change(*(td.Gamma(each.concentration, each.rate) for each in (q, p, reduced)))
    assert_close(evidence_change(q, p, reduced), expected, 0)
    assert_close(reduced_posterior(q, p, reduced).concentration, double(5.0), 1e-15)
