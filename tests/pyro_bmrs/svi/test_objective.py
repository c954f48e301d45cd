"""A step's loss and gradients as one traced graph, valid whatever the parameters and masks turn into."""

import pyro
import pytest
import torch
from nets import build
from torch.func import functional_call, grad_and_value
from torch.fx.experimental.proxy_tensor import make_fx

import pyro_bmrs as bmrs
from pyro_bmrs.svi.objective import NoisyObjective


@pytest.fixture
def fixed_draws(monkeypatch):
    """Give every draw of one shape the same uniforms, and validate nothing, as in a fit."""
    pyro.enable_validation(False)
    uniforms = {}

    def rand(shape, **kwargs):
        return uniforms.setdefault(tuple(shape), torch.empty(shape, **kwargs).uniform_())

    monkeypatch.setattr(torch, "rand", rand)


def loss_and_gradients(objective):
    def loss(parameters, buffers, x, y):
        return functional_call(objective, {**parameters, **buffers}, (x, y, 0.7))

    return grad_and_value(loss)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("granularity", ["shared", "example", "batch"])
def test_a_graph_traced_at_the_first_parameters_holds_for_all_others(granularity, dtype, fixed_draws):
    bmrs_model, _, x = build("mlp", batch=40, dtype=dtype)
    y = torch.arange(len(x)) % 4
    guide = bmrs.TruncatedLogNormalGuide(bmrs_model).to(dtype)
    objective = NoisyObjective(bmrs_model, guide, bmrs.MeanFieldELBO(granularity))
    step = loss_and_gradients(objective)
    parameters = {name: value.detach().clone() for name, value in objective.named_parameters()}
    buffers = {name: value.clone() for name, value in objective.named_buffers()}
    step(parameters, buffers, x, y)  # draws the uniforms, which a graph would draw again
    traced = make_fx(step, tracing_mode="real")(parameters, buffers, x, y)
    structures = len(guide.loc)
    generator = torch.Generator().manual_seed(1)
    for low, high, removed in ((0.0, 0.0, 0.0), (-30.0, 5.0, 0.3), (-3.0, 0.5, 0.0), (-19.0, -1.0, 0.6)):
        spread = torch.linspace(low, high, structures, dtype=dtype)
        parameters["guide.loc"] = spread[torch.randperm(structures, generator=generator)]
        if high > low:
            parameters["guide.log_scale"] = torch.linspace(-10, 4, structures, dtype=dtype)
        for name, value in buffers.items():
            if name.endswith("keep"):
                buffers[name] = torch.rand_like(value, dtype=torch.float64) >= removed
        torch.testing.assert_close(
            traced(parameters, buffers, x, y), step(parameters, buffers, x, y), rtol=1e-5, atol=1e-6
        )


def test_replicas_under_vmap_equal_each_alone(fixed_draws):
    model, guide, x = build("mlp", batch=8)
    y = torch.arange(len(x)) % 4
    objective = NoisyObjective(model, guide, bmrs.MeanFieldELBO("example"))
    step = loss_and_gradients(objective)
    parameters = {name: value.detach() for name, value in objective.named_parameters()}
    buffers = dict(objective.named_buffers())
    replicas = {name: torch.stack([value, 1.5 * value, value - 1]) for name, value in parameters.items()}
    together = torch.func.vmap(step, in_dims=(0, None, None, None), randomness="same")(replicas, buffers, x, y)
    for i in range(3):
        alone = step({name: value[i] for name, value in replicas.items()}, buffers, x, y)
        found = torch.utils._pytree.tree_map(lambda value, i=i: value[i], together)
        torch.testing.assert_close(found, alone, rtol=1e-4, atol=1e-5)
