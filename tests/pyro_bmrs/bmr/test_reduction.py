"""Reduction of Pyro programs: every kind of guide against formulas and quadrature, joints, posteriors, refusals."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from nets import build
from oracle import assert_close, double, integrate
from pyro import poutine
from pyro.infer.autoguide import (
    AutoDelta,
    AutoDiagonalNormal,
    AutoIAFNormal,
    AutoLowRankMultivariateNormal,
    AutoMultivariateNormal,
    AutoNormal,
)
from torch.distributions import MultivariateNormal

import pyro_bmrs as bmrs
from pyro_bmrs.bmr.latents import posterior_and_prior
from pyro_bmrs.bmr.reduction import reduce
from pyro_bmrs.bmr.sampled import estimate_evidence_change
from pyro_bmrs.inspection.evidence import evidence_changes

LOC, SCALE = double([0.3, -0.8, 1.5]), double([0.2, 0.5, 0.1])


def quadrature(q, p, r, low, high):
    """log of the integral of q r / p, for each element."""

    def density(x):
        return torch.exp(q.log_prob(x.unsqueeze(-1)) + r.log_prob(x.unsqueeze(-1)) - p.log_prob(x.unsqueeze(-1)))

    columns = q.batch_shape[0]
    return torch.stack([integrate(lambda x, i=i: density(x)[..., i], low, high) for i in range(columns)]).log()


def normal(loc, scale, size=3):
    return dist.Normal(double([loc] * size), double([scale] * size))


def two_sites():
    """A site on the line within a plate, a positive one as an event, and an observation."""
    with pyro.plate("features", 3):
        w = pyro.sample("w", dist.Normal(double(0.0), double(2.0)))
    s = pyro.sample("s", dist.LogNormal(torch.zeros(2).double(), 1.5).to_event(1))
    pyro.sample("y", dist.Normal(w.sum() + s.sum(), double(1.0)), obs=double(0.4))


REDUCED = {"w": dist.Normal(double(0.1), double(0.5)), "s": dist.LogNormal(double([0.2, 0.4]), double(0.6)).to_event(1)}


def set_up(guide):
    """Give an autoguide of ``two_sites`` parameters of its own."""
    guide()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in guide.parameters():
            parameter.add_(0.5 * torch.randn(parameter.shape, generator=generator).to(parameter))
    return guide


# --- guides --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [AutoNormal, AutoDiagonalNormal])
def test_mean_field_autoguides(kind):
    guide = set_up(kind(two_sites, init_scale=0.3))
    reduction = reduce(guide, two_sites, REDUCED)
    q_w, q_s = ((reduction.sites[site].posterior) for site in ("w", "s"))
    quantiles = guide.quantiles([0.5, 0.975])
    assert_close(torch.stack([q_w.icdf(double(0.5)), q_w.icdf(double(0.975))]), torch.stack([*quantiles["w"]]), 1e-6)
    assert_close(torch.stack([q_s.icdf(double(0.5)), q_s.icdf(double(0.975))]), torch.stack([*quantiles["s"]]), 1e-6)
    exact_w = quadrature(q_w, normal(0.0, 2.0), normal(0.1, 0.5), -8, 8)
    logs = dist.Normal(q_s.loc, q_s.scale), normal(0.0, 1.5, 2), dist.Normal(double([0.2, 0.4]), double(0.6))
    assert_close(reduction.delta_f["w"], exact_w, 1e-9)
    assert_close(reduction.delta_f["s"], quadrature(*logs, -8, 8), 1e-9)
    assert_close(reduction.joint(), reduction.delta_f["w"].sum() + reduction.delta_f["s"].sum(), 1e-12)


def test_delta_f_is_the_same_in_the_logarithm():
    q, p, r = (
        dist.LogNormal(double([loc, -loc]), double(scale)) for loc, scale in ((0.3, 0.2), (0.0, 1.0), (0.1, 0.4))
    )
    reduction = reduce(lambda: pyro.sample("s", q), lambda: pyro.sample("s", p), {"s": r})
    logs = [each.base_dist for each in (q, p, r)]
    assert_close(reduction.delta_f["s"], quadrature(q, p, r, 1e-3, 12), 1e-9)
    assert_close(reduction.delta_f["s"], bmrs.evidence_change(*logs), 1e-12)


@pytest.mark.parametrize("kind", [AutoMultivariateNormal, AutoLowRankMultivariateNormal])
def test_correlated_autoguides(kind):
    guide = set_up(kind(two_sites))
    reduction = reduce(guide, two_sites, REDUCED)
    q = guide.get_posterior()
    sites = {"w": slice(0, 3), "s": slice(3, 5)}
    p_scale, r_loc = double([2, 2, 2, 1.5, 1.5]), double([0.1, 0.1, 0.1, 0.2, 0.4])
    r_scale = double([0.5, 0.5, 0.5, 0.6, 0.6])
    delta_f = bmrs.evidence_change(
        dist.Normal(q.loc, q.stddev), dist.Normal(torch.zeros(5).double(), p_scale), dist.Normal(r_loc, r_scale)
    )
    for site, where in sites.items():
        assert_close(reduction.delta_f[site], delta_f[where], 1e-12)
    # The expectation of r/p under q is a Gaussian integral: q's density times exp(-x'Ax/2 + b'x + c).
    a, b = torch.diag(r_scale**-2 - p_scale**-2), r_loc / r_scale**2
    c = torch.log(p_scale / r_scale) - 0.5 * (r_loc / r_scale) ** 2
    for index in ([0, 1, 2, 3, 4], [1, 3], [4]):
        some = torch.zeros(5, dtype=torch.bool)
        some[index] = True
        masks = {site: some[where] for site, where in sites.items()}
        cov, loc, a_s, b_s = q.covariance_matrix[index][:, index], q.loc[index], a[index][:, index], b[index]
        precision = cov.inverse() + a_s
        linear = torch.linalg.solve(cov, loc) + b_s
        exact = (
            c[index].sum() - 0.5 * torch.logdet(precision @ cov) + 0.5 * linear @ torch.linalg.solve(precision, linear)
        )
        assert_close(reduction.joint(masks), exact - 0.5 * loc @ torch.linalg.solve(cov, loc), 1e-9)
    # The reduced posterior's marginals, by the same completion of the square.
    precision = q.covariance_matrix.inverse() + a
    cov = precision.inverse()
    loc = cov @ (torch.linalg.solve(q.covariance_matrix, q.loc) + b)
    w, s = reduction.reduced_posteriors["w"], reduction.reduced_posteriors["s"].base_dist
    assert_close(torch.cat([w.loc, s.loc]), loc, 1e-9)
    assert_close(torch.cat([w.scale, s.scale]), cov.diagonal().sqrt(), 1e-9)


def test_correlated_sites_fixed_at_points():
    guide = set_up(AutoMultivariateNormal(two_sites))
    points = {"w": dist.Delta(double([0.0, 0.1, 0.2])), "s": dist.Delta(double([1.0, 0.5]), event_dim=1)}
    reduction = reduce(guide, two_sites, points)
    at = torch.cat([points["w"].v, torch.log(points["s"].v)])
    p = dist.Normal(torch.zeros(5).double(), double([2, 2, 2, 1.5, 1.5]))
    assert_close(reduction.joint(), guide.get_posterior().log_prob(at) - p.log_prob(at).sum(), 1e-9)
    assert_close(reduction.reduced_posteriors["s"].v, points["s"].v, 1e-12)
    mixed = reduce(guide, two_sites, {**REDUCED, "w": points["w"]})
    with pytest.raises(NotImplementedError, match="fixed at a point and some are not"):
        mixed.joint()


def test_our_guide_needs_no_data():
    model, guide, _ = build("mlp", dtype=torch.float64)
    reduced = {site: bmrs.spike(prior) for site, prior in guide.prior().items()}
    reduction = reduce(guide, model, reduced)
    assert reduction.delta_f.keys() == guide.sizes.keys()
    for site, expected in evidence_changes(guide).items():
        assert torch.equal(reduction.delta_f[site], expected)
    site = next(iter(guide.sizes))
    expected = bmrs.reduced_posterior(guide.posterior()[site], guide.prior()[site], reduced[site])
    assert_close(reduction.reduced_posteriors[site].log_prob(double(0.5)), expected.log_prob(double(0.5)), 1e-12)


def test_a_hand_written_guide_of_our_model():
    model, guide, x = build("mlp", dtype=torch.float64)
    site = next(iter(guide.sizes))
    model.noise[site].remove(torch.arange(guide.sizes[site]) < 2)  # a masked site

    def by_hand(*args):
        for name, q in guide.posterior().items():
            pyro.sample(name, model.noise[name].site_distribution(q))

    reduced = {site: bmrs.spike(guide.prior()[site])}
    assert torch.equal(
        reduce(by_hand, model, reduced, x, torch.zeros(len(x)).long()).delta_f[site],
        reduce(guide, model, reduced).delta_f[site],
    )


@pytest.mark.parametrize("reduced", [dist.Normal(double(0.0), 0.3), normal(0.0, 0.3), normal(0.0, 0.3).to_event(1)])
def test_plates_events_and_broadcasting_are_one_and_the_same(reduced):
    expected = bmrs.evidence_change(dist.Normal(LOC, SCALE), normal(0.0, 1.0), normal(0.0, 0.3))

    def with_plate(loc, scale):
        with pyro.plate("w_plate", 3):
            pyro.sample("w", dist.Normal(loc, scale))

    def with_event(loc, scale):
        pyro.sample("w", dist.Normal(loc, scale).expand([3]).to_event(1))

    for program in (with_plate, with_event):
        reduction = reduce(
            lambda program=program: program(LOC, SCALE),
            lambda program=program: program(double(0.0), double(1.0)),
            {"w": reduced},
        )
        assert_close(reduction.delta_f["w"], expected, 1e-12)
        posterior = reduction.reduced_posteriors["w"]
        assert len(posterior.event_shape) == (program is with_event)
        assert_close(posterior.mean, LOC / SCALE**2 / (SCALE**-2 - 1 + 0.3**-2), 1e-12)


def test_nested_plates_and_events():
    q = dist.Normal(torch.arange(24).double().reshape(2, 3, 4) / 24, 0.3)

    def program(d):
        with pyro.plate("outer", 2, dim=-2), pyro.plate("inner", 3, dim=-1):
            pyro.sample("w", d.to_event(1))

    reduction = reduce(
        lambda: program(q),
        lambda: program(dist.Normal(torch.zeros(4).double(), 1.0)),
        {"w": dist.Normal(torch.zeros(3, 1).double(), 0.2)},
    )
    expected = bmrs.evidence_change(q, dist.Normal(double(0.0), 1.0), dist.Normal(double(0.0), 0.2))
    assert_close(reduction.delta_f["w"], expected, 1e-12)
    assert reduction.reduced_posteriors["w"].batch_shape == (2, 3)


def test_masks_and_expansions_are_looked_through():
    base = dist.HalfNormal(double(1.0))
    prior = dist.ExpandedDistribution(base, [3]).mask(torch.tensor([True, False, True])).to_event(1)
    q, r = dist.HalfNormal(SCALE), dist.HalfNormal(double(0.4))
    with poutine.mask(mask=torch.tensor(False)), poutine.scale(scale=3.0):
        reduction = reduce(lambda: pyro.sample("s", q.to_event(1)), lambda: pyro.sample("s", prior), {"s": r})
    assert_close(reduction.delta_f["s"], bmrs.evidence_change(q, base, r), 1e-12)


def test_events_that_belong_together_stay_together():
    q, p, r = (dist.Dirichlet(double(each)) for each in ([[3.0, 1, 2], [1, 1, 5]], [1.0, 1, 1], [2.0, 1, 2]))

    def program(d):
        with pyro.plate("rows", 2):
            pyro.sample("probs", d)

    reduction = reduce(lambda: program(q), lambda: program(p), {"probs": r})
    assert_close(reduction.delta_f["probs"], bmrs.evidence_change(q, p, r), 1e-12)
    assert_close(reduction.reduced_posteriors["probs"].mean, bmrs.reduced_posterior(q, p, r).mean, 1e-12)
    uniform = reduce(lambda: program(q), lambda: program(p), {"probs": dist.Delta(double([0.3, 0.3, 0.4]))})
    assert_close(uniform.reduced_posteriors["probs"].mean, double([0.3, 0.3, 0.4]), 1e-12)
    assert_close(
        uniform.delta_f["probs"], q.log_prob(double([0.3, 0.3, 0.4])) - p.log_prob(double([0.3, 0.3, 0.4])), 1e-12
    )


# --- joints --------------------------------------------------------------------------------------------------

COVARIANCES = torch.stack(
    [
        double([[0.3, 0.1, 0.0], [0.1, 0.2, -0.05], [0.0, -0.05, 0.1]]),
        double([[0.1, 0.08, 0.02], [0.08, 0.2, 0.1], [0.02, 0.1, 0.3]]),
    ]
)
ROWS = MultivariateNormal(double([[0.1, 0.5, -0.2], [1.0, 0.0, 0.3]]), COVARIANCES)


def rows_guide():
    with pyro.plate("rows", 2):
        pyro.sample("w", dist.MultivariateNormal(ROWS.loc, COVARIANCES))


def rows_model():
    with pyro.plate("rows", 2):
        pyro.sample("w", dist.Normal(torch.zeros(3).double(), 1.0).to_event(1))


def test_rows_of_correlated_elements():
    r = dist.Normal(double([0.0, 0.1, 0.2]), double([0.3, 0.5, 0.7])).to_event(1)
    reduction = reduce(rows_guide, rows_model, {"w": r})
    p = MultivariateNormal(torch.zeros(3).double(), torch.eye(3).double())
    r_joint = MultivariateNormal(r.base_dist.loc, torch.diag(r.base_dist.scale**2))
    assert_close(reduction.joint(), bmrs.evidence_change(ROWS, p, r_joint).sum(), 1e-10)
    expected = bmrs.reduced_posterior(ROWS, p, r_joint)
    assert_close(reduction.reduced_posteriors["w"].covariance_matrix, expected.covariance_matrix, 1e-10)
    mask = torch.tensor([[True, False, True], [False, True, False]])
    first = bmrs.evidence_change(
        MultivariateNormal(ROWS.loc[0, [0, 2]], COVARIANCES[0][[0, 2]][:, [0, 2]]),
        MultivariateNormal(torch.zeros(2).double(), torch.eye(2).double()),
        MultivariateNormal(double([0.0, 0.2]), torch.diag(double([0.3, 0.7]) ** 2)),
    )
    assert_close(reduction.joint({"w": mask}), first + reduction.delta_f["w"][1, 1], 1e-10)


def test_joint_by_sampling():
    r = dist.Normal(torch.zeros(3).double(), 0.6).to_event(1)
    reduction = reduce(rows_guide, rows_model, {"w": r})
    q, p = posterior_and_prior(rows_guide, rows_model, "w")
    sampled = estimate_evidence_change(q, p.to_event(1), r, num_samples=40_000, seed=0)
    error = sampled.estimate.sum() - reduction.joint("w")
    assert error.abs() < 4 * sampled.standard_error.norm() < 0.2


def test_a_correlated_prior():
    prior = MultivariateNormal(torch.zeros(2).double(), double([[1.0, 0.7], [0.7, 1.0]]))
    q = dist.Normal(double([0.2, -0.1]), double([0.3, 0.4]))
    reduction = reduce(
        lambda: pyro.sample("w", q.to_event(1)),
        lambda: pyro.sample("w", dist.MultivariateNormal(prior.loc, prior.covariance_matrix)),
        {"w": dist.Delta(torch.zeros(2).double())},
    )
    zeros = torch.zeros(2).double()
    assert_close(reduction.joint(), q.log_prob(zeros).sum() - prior.log_prob(zeros), 1e-12)
    assert_close(reduction.delta_f["w"], q.log_prob(zeros) - normal(0.0, 1.0, 2).log_prob(zeros), 1e-12)


def test_joints_of_no_some_and_all_elements():
    guide = set_up(AutoNormal(two_sites))
    reduction = reduce(guide, two_sites, REDUCED)
    w, s = reduction.delta_f["w"], reduction.delta_f["s"]
    assert reduction.joint([]) == 0
    assert reduction.joint({"w": torch.zeros(3, dtype=torch.bool)}) == 0
    assert_close(reduction.joint({"w": torch.tensor([True, False, True])}), w[0] + w[2], 1e-12)
    assert_close(reduction.joint("s"), s.sum(), 1e-12)
    assert_close(reduction.joint(["w", "s"]), reduction.joint(), 1e-12)
    correlated = reduce(set_up(AutoMultivariateNormal(two_sites)), two_sites, REDUCED)
    assert correlated.joint({"w": torch.zeros(3, dtype=torch.bool)}) == 0


def test_joint_refuses_other_elements():
    reduction = reduce(set_up(AutoNormal(two_sites)), two_sites, {"w": REDUCED["w"]})
    with pytest.raises(ValueError, match=r"site 's' has no reduced prior; the sites that have are \['w'\]"):
        reduction.joint(["s"])
    with pytest.raises(ValueError, match=r"must be a bool tensor of shape \(3,\), .* of shape \(2,\)"):
        reduction.joint({"w": torch.tensor([True, False])})
    with pytest.raises(ValueError, match=r"got torch\.int64"):
        reduction.joint({"w": torch.tensor([0, 1, 2])})


# --- what it leaves alone ------------------------------------------------------------------------------------


def learnable_guide():
    with pyro.plate("features", 3):
        loc = pyro.param("loc", LOC.clone())
        pyro.sample("w", dist.Normal(loc, pyro.param("scale", SCALE.clone(), constraint=dist.constraints.positive)))


def one_site():
    with pyro.plate("features", 3):
        w = pyro.sample("w", dist.Normal(double(0.0), double(2.0)))
    pyro.sample("y", dist.Normal(w.sum(), double(1.0)), obs=double(0.4))


def test_leaves_random_state_and_parameters_alone():
    learnable_guide()
    before = {name: value.clone() for name, value in pyro.get_param_store().items()}
    state = torch.random.get_rng_state()
    reduction = reduce(learnable_guide, one_site, {"w": REDUCED["w"]})
    assert torch.equal(torch.random.get_rng_state(), state)
    after = dict(pyro.get_param_store().items())
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) and after[name].requires_grad for name in before)
    assert not reduction.delta_f["w"].requires_grad


def test_the_same_prior_changes_nothing():
    reduction = reduce(set_up(AutoMultivariateNormal(two_sites)), two_sites, {
        "w": dist.Normal(double(0.0), double(2.0)), "s": dist.LogNormal(torch.zeros(2).double(), 1.5)
    })  # fmt: skip
    assert_close(torch.cat([*reduction.delta_f.values()]), double(0.0), 1e-12)
    assert_close(reduction.joint(), double(0.0), 1e-12)


# --- refusals ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("site", "message"),
    [
        ("v", r"there is no latent site 'v'; the latent sites are 'w'"),
        ("features", r"there is no latent site 'features'"),
        ("y", r"site 'y' is observed and has no posterior; the latent sites are \['w'\]"),
    ],
)
def test_refuses_sites_that_are_not_latent(site, message):
    with pytest.raises(ValueError, match=message):
        reduce(learnable_guide, one_site, {site: REDUCED["w"]})


def test_our_guide_refuses_other_sites():
    model, guide, _ = build("mlp")
    with pytest.raises(ValueError, match=r"no latent site 'obs'; the latent sites are 'fc1_noise.theta'"):
        reduce(guide, model, {"obs": bmrs.LogUniform()})


def test_refuses_a_guide_without_the_site():
    with pytest.raises(ValueError, match=r"the guide has no site 's'.*add pyro.sample\('s', ...\)"):
        reduce(learnable_guide, two_sites, {"s": REDUCED["s"]})


@pytest.mark.parametrize("reduced", [normal(0.0, 1.0, 2), dist.Normal(torch.zeros(2, 3), 1.0)])
def test_refuses_a_reduced_prior_of_another_shape(reduced):
    with pytest.raises(ValueError, match=r"reduced prior of site 'w' has shape .* broadcast to the site's \(3,\)"):
        reduce(learnable_guide, one_site, {"w": reduced})


def test_refuses_a_guide_of_another_shape():
    with pytest.raises(ValueError, match=r"site 'w' has shape \(3,\) in the model but \(2,\) in the guide"):
        reduce(
            lambda: pyro.sample("w", normal(0.0, 1.0, 2)),
            lambda: pyro.sample("w", normal(0.0, 1.0)),
            {"w": REDUCED["w"]},
        )


def test_refuses_a_hierarchical_prior():
    def model():
        scale = pyro.sample("scale", dist.LogNormal(double(0.0), 1.0))
        pyro.sample("w", dist.Normal(double([0.0, 0.0]), scale).to_event(1))

    reduced = {"w": normal(0.0, 0.1, 2)}
    with pytest.raises(NotImplementedError, match="the prior of site 'w' depends on the draws of other sites"):
        reduce(set_up(AutoNormal(model)), model, reduced)
    conditioned = poutine.condition(model, {"scale": double(2.0)})
    assert reduce(set_up(AutoNormal(conditioned)), conditioned, reduced).delta_f["w"].shape == (2,)


def test_refuses_a_structured_guide():
    def guide():
        first = pyro.sample("a", dist.Normal(double(0.0), 1.0))
        pyro.sample("b", dist.Normal(first, 1.0))

    def model():
        pyro.sample("a", dist.Normal(double(0.0), 1.0))
        pyro.sample("b", dist.Normal(double(0.0), 1.0))

    with pytest.raises(NotImplementedError, match="the posterior of site 'b' depends on the draws of other sites"):
        reduce(guide, model, {"b": dist.Normal(double(0.0), 0.5)})
    assert reduce(guide, model, {"a": dist.Normal(double(0.0), 0.5)}).delta_f["a"].shape == ()


def test_names_the_sampled_estimate_where_there_is_no_rule():
    def model():
        with pyro.plate("rates", 3):
            pyro.sample("rate", dist.Gamma(double(2.0), double(1.0)))

    def guide():
        with pyro.plate("rates", 3):
            pyro.sample("rate", dist.Weibull(double(2.0), double(3.0)))

    reduced = dist.Gamma(double(2.0), double(2.0))
    with pytest.raises(
        NotImplementedError, match=r"site 'rate': no evidence_change .* estimate_evidence_change.* posterior_and_prior"
    ):
        reduce(guide, model, {"rate": reduced})
    q, p = posterior_and_prior(guide, model, "rate")
    sampled = estimate_evidence_change(q, p, reduced, seed=0)
    exact = quadrature(q, dist.Gamma(double([2.0] * 3), 1.0), dist.Gamma(double([2.0] * 3), 2.0), 1e-6, 40)
    assert ((sampled.estimate - exact).abs() < 4 * sampled.standard_error).all()


@pytest.mark.parametrize(
    ("prior", "reduced"),
    [
        (dist.Gamma(double(2.0), double(1.0)), dist.Gamma(double(2.0), double(2.0))),
        (dist.HalfNormal(double(2.0)), dist.HalfNormal(double(0.1))),
        (dist.HalfCauchy(double(1.0)), dist.HalfCauchy(double(0.2))),
    ],
)
def test_scale_sites_of_an_autoguide(prior, reduced):
    model = lambda: pyro.sample("scale", prior.expand([3]).to_event(1))  # noqa: E731
    guide = set_up(AutoNormal(model, init_scale=0.3))
    found = reduce(guide, model, {"scale": reduced}).delta_f["scale"]
    q, p = posterior_and_prior(guide, model, "scale")
    assert_close(found, quadrature(q, p, reduced.expand([3]), 1e-4, 40), 1e-5)


def test_bounded_support_has_a_sampled_estimate():
    def model():
        pyro.sample("p", dist.Beta(double([1.0, 2.0]), double(2.0)).to_event(1))

    guide, reduced = set_up(AutoDiagonalNormal(model, init_scale=0.3)), dist.Beta(double([2.0, 2.0]), double(3.0))
    q, p = posterior_and_prior(guide, model, "p")
    sampled = estimate_evidence_change(q, p, reduced, seed=0)
    exact = quadrature(q, p, reduced, 1e-9, 1 - 1e-9)
    assert ((sampled.estimate - exact).abs() < 4 * sampled.standard_error).all()
    assert_close(reduce(guide, model, {"p": reduced}).delta_f["p"], exact, 1e-5)
    point = reduce(guide, model, {"p": dist.Delta(double([0.5, 0.4]))})
    assert_close(point.delta_f["p"], q.log_prob(double([0.5, 0.4])) - p.log_prob(double([0.5, 0.4])), 1e-12)


@pytest.mark.parametrize(
    ("kind", "message"),
    [(AutoDelta, "site 'w' is a point mass"), (AutoIAFNormal, "use AutoNormal, AutoDiagonalNormal")],
)
def test_refuses_guides_without_a_known_posterior(kind, message):
    def model():
        pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))

    guide = kind(model)
    with pytest.raises(NotImplementedError, match=message):
        reduce(guide, model, {"w": dist.Normal(torch.zeros(3), 0.5).to_event(1)})
