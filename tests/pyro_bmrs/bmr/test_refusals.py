"""What evidence is not asked of: each named in one line."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoDelta, AutoNormal

import pyro_bmrs as bmrs
from pyro_bmrs.bmr.latents import posterior_and_prior

PRIOR = bmrs.LogUniform()
POSTERIOR = bmrs.TruncatedLogNormal(torch.tensor(-1.0), torch.tensor(0.5))
SPIKE = bmrs.spike(PRIOR)
QUESTIONS = (bmrs.evidence_change, bmrs.reduced_posterior, bmrs.estimate_evidence_change)


@pytest.mark.parametrize("question", QUESTIONS)
def test_what_is_no_distribution_is_named(question):
    with pytest.raises(TypeError, match="posterior must be a distribution, but got None"):
        question(None, PRIOR, SPIKE)
    with pytest.raises(TypeError, match="reduced_prior must be a distribution, but got the class LogUniform"):
        question(POSTERIOR, PRIOR, bmrs.LogUniform)


@pytest.mark.parametrize("question", QUESTIONS)
def test_shapes_that_do_not_broadcast_are_named(question):
    three, two = bmrs.LogUniform(torch.full((3,), -9.0)), bmrs.LogUniform(torch.full((2,), -9.0))
    with pytest.raises(ValueError, match=r"batch_shapes that broadcast, but .* \(\(3,\), \(\)\), \(\(2,\)"):
        question(POSTERIOR, three, two)


@pytest.mark.parametrize("question", QUESTIONS)
def test_point_masses_have_no_posterior(question):
    for point in (dist.Delta(torch.tensor(0.5)), dist.Delta(torch.zeros(2)).to_event(1)):
        with pytest.raises(NotImplementedError, match="is a point mass, which leaves no posterior to reduce"):
            question(point, PRIOR, SPIKE)


def model():
    pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))


def test_a_point_estimate_is_no_posterior():
    guide = AutoDelta(model)
    guide()
    with pytest.raises(NotImplementedError, match="the guide's distribution of site 'w' is a point mass"):
        posterior_and_prior(guide, model, "w")


def test_results_keep_no_gradient():
    guide = AutoNormal(model)
    guide()
    reduction = bmrs.reduce(guide, model, {"w": dist.Delta(torch.zeros(2)).to_event(1)})
    assert not reduction.delta_f["w"].requires_grad
    assert not reduction.joint().requires_grad
    reduction = bmrs.reduce(guide, model, {"w": dist.Normal(torch.zeros(2), 0.5).to_event(1)})
    assert not reduction.reduced_posteriors["w"].mean.requires_grad


def test_arguments_of_reduce_and_search_are_named():
    guide = AutoNormal(model)
    guide()
    with pytest.raises(TypeError, match="guide must be a Pyro program, a function or module, but got None"):
        bmrs.reduce(None, model, {})
    with pytest.raises(TypeError, match="reduced_priors must map sites to distributions, but got a list"):
        bmrs.reduce(guide, model, [])
    with pytest.raises(TypeError, match="the reduced prior of site 'w' must be a distribution, but got 0"):
        bmrs.reduce(guide, model, {"w": 0})
    with pytest.raises(TypeError, match="do not run on the 1 arguments given for them"):
        bmrs.reduce(guide, model, {"w": dist.Normal(0.0, 1.0)}, 3)
    with pytest.raises(TypeError, match="delta_f_of must be a function"):
        bmrs.greedy_search(None, [])
    with pytest.raises(ValueError, match="prior_log_odds must be a finite number, but got nan"):
        bmrs.greedy_search(len, [], prior_log_odds=float("nan"))


@pytest.mark.parametrize("prior", [dist.Beta(1.0, 1.0), dist.Gamma(1.0, 1.0), dist.Normal(0.0, 1.0)])
def test_a_window_of_bits_needs_bounds(prior):
    with pytest.raises(NotImplementedError, match=f"no precision window is known for a {type(prior).__name__} prior"):
        bmrs.precision_window(prior, 8)


def test_priors_may_be_given_by_name():
    assert bmrs.spike(prior=PRIOR, scale=0.1).scale == 0.1
    assert bmrs.precision_window(prior=PRIOR, p1=8, p2=23).log_high < 0
    with pytest.raises(ValueError, match="scale must be a positive number, but got 0"):
        bmrs.spike(PRIOR, 0)
    with pytest.raises(TypeError, match="p1 must be a finite number, but got '8'"):
        bmrs.precision_window(PRIOR, "8")


@pytest.mark.parametrize("value", ["0", None, True, 1j, torch.zeros(2, dtype=torch.complex64)])
def test_parameters_of_distributions_are_numbers(value):
    with pytest.raises(TypeError, match="log_low must be a number or a floating-point tensor"):
        bmrs.LogUniform(log_low=value)
    with pytest.raises(TypeError, match="scale must be a number or a floating-point tensor"):
        bmrs.TruncatedLogNormal(0.0, value)
