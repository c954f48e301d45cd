import warnings

import pytest
import torch
from nets import build, random_masks
from torch import nn

import pyro_bmrs as bmrs
from pyro_bmrs.svi.compiled import CompiledStep
from pyro_bmrs.svi.objective import FixedNoiseObjective, NoisyObjective


def objective_of(name, dtype=torch.float64, batch=6, **elbo):
    model, guide, x = build(name, dtype=dtype, batch=batch)
    classes = model.net(x).shape[-1]
    y = torch.arange(batch) % classes
    return NoisyObjective(model, guide, bmrs.MeanFieldELBO(**elbo)), x, y


def eager(objective, x, y, kl_weight, batch_weight=1.0):
    loss = objective(x, y, kl_weight, batch_weight)
    loss.backward()
    return loss.detach()


def outcome(step, objective, *args, seed=3):
    """Return loss, gradients and buffers after one step from the same state and random stream."""
    objective.zero_grad()
    torch.manual_seed(seed)
    loss = step(*args)
    return loss, [p.grad for p in objective.parameters()], [b.clone() for b in objective.buffers()]


@pytest.mark.slow
@pytest.mark.parametrize("granularity", ["shared", "example", "batch", "element"])
@pytest.mark.parametrize("name", ["mlp", "lenet5", "batch_norm"])
def test_loss_gradients_and_buffers_are_those_of_forward_and_backward(name, granularity):
    objective, x, y = objective_of(name, granularity=granularity)
    before = [b.clone() for b in objective.buffers()]
    expected = outcome(lambda *args: eager(objective, *args), objective, x, y, 0.7, 1.1)
    for buffer, value in zip(objective.buffers(), before, strict=True):
        buffer.copy_(value)
    found = outcome(CompiledStep(objective, backend="eager"), objective, x, y, 0.7, 1.1)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert not found[0].requires_grad


@pytest.mark.slow
def test_noise_is_fresh_at_each_call_and_a_seed_repeats_it():
    objective, x, y = objective_of("mlp")
    step = CompiledStep(objective, backend="eager")
    torch.manual_seed(0)
    losses = [float(step(x, y, 1.0)) for _ in range(4)]
    assert len(set(losses)) == 4
    torch.manual_seed(0)
    assert losses == [float(step(x, y, 1.0)) for _ in range(4)]


@pytest.mark.slow
def test_tracing_leaves_random_stream_and_buffers_alone():
    objective, x, y = objective_of("batch_norm")
    step = CompiledStep(objective, backend="eager")
    step(x, y, 1.0)
    tracked = [b.clone() for b in objective.buffers()]
    torch.manual_seed(0)
    with_trace = step(x[:4], y[:4], 1.0), torch.rand(3)
    for buffer, value in zip(objective.buffers(), tracked, strict=True):
        buffer.copy_(value)
    torch.manual_seed(0)
    assert step.traces == 2
    torch.testing.assert_close((step(x[:4], y[:4], 1.0), torch.rand(3)), with_trace, rtol=0, atol=0)
    assert step.traces == 2


@pytest.mark.slow
def test_nothing_but_another_layout_or_mode_traces_again():
    objective, x, y = objective_of("batch_norm")
    step = CompiledStep(objective, backend="eager")
    for kl_weight in (0.1, 0.5, 1.0):
        step(x, y, kl_weight)
    removed = {site: ~keep for site, keep in random_masks(objective.model).items()}
    for site, layer in objective.model.noise.items():
        layer.remove(removed[site])
    step(torch.randn_like(x), y, 1.0, 0.9)
    assert step.traces == 1
    step(x[:5], y[:5], 1.0)
    step(x, y, 1.0)
    step(x[:5], y[:5], 1.0)
    assert step.traces == 2
    objective.model.net[1].eval()
    step(x, y, 1.0)
    assert step.traces == 3
    objective.model.net[1].train()
    step(x, y, 1.0)
    assert step.traces == 3


@pytest.mark.slow
def test_masks_and_weights_of_the_kl_that_change_are_followed():
    objective, x, y = objective_of("mlp")
    step = CompiledStep(objective, backend="eager")
    step(x, y, 1.0)
    for site, layer in objective.model.noise.items():
        layer.remove(~random_masks(objective.model)[site])
    with torch.no_grad():
        objective.guide.loc.add_(0.3)
    found = outcome(step, objective, x, y, 0.2)
    assert step.traces == 1
    expected = outcome(lambda *args: eager(objective, *args), objective, x, y, 0.2)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    removed = ~objective.guide.keep
    assert removed.any()
    assert not objective.guide.loc.grad[removed].any()


@pytest.mark.slow
def test_a_smaller_network_in_the_same_objective_gets_its_own_graph():
    objective, x, y = objective_of("mlp")
    step = CompiledStep(objective, backend="eager")
    step(x, y, 1.0)
    objective.model.net.output = nn.Linear(12, 4, dtype=torch.float64).requires_grad_(False)
    objective.zero_grad()
    step(x, y, 1.0)
    assert step.traces == 2
    assert objective.model.net.output.weight.grad is None
    assert objective.model.net.fc1.weight.grad is not None


def test_gradients_accumulate_and_own_their_memory():
    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.unused = (nn.Parameter(torch.ones(3)) for _ in range(3))

        def forward(self, x, y, kl_weight, batch_weight):
            return kl_weight * (self.a + self.b).sum()

    objective = Sum()
    step = CompiledStep(objective, backend="eager")
    assert step(torch.zeros(1), torch.zeros(1), 2.0) == 12.0
    step(torch.zeros(1), torch.zeros(1), 3.0)
    assert objective.unused.grad is None
    objective.a.grad.mul_(10)
    assert objective.a.grad.tolist() == [50.0] * 3
    assert objective.b.grad.tolist() == [5.0] * 3


def test_fixed_noise_is_an_objective_too():
    objective, x, y = objective_of("batch_norm")
    fixed = FixedNoiseObjective(objective.model, objective.guide.mean())
    found = outcome(CompiledStep(fixed, backend="eager"), fixed, x, y, 1.0)
    expected = outcome(lambda *args: eager(fixed, *args), fixed, x, y, 1.0)
    torch.testing.assert_close(found[:2], expected[:2], rtol=1e-12, atol=1e-12)


def test_what_depends_on_data_falls_back_with_one_warning_that_says_why():
    class Branching(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(()))

        def forward(self, x, y, kl_weight, batch_weight):
            return self.weight * (2 if bool(x.sum() > 0) else 3)

    objective = Branching()
    step = CompiledStep(objective, backend="eager")
    with pytest.warns(RuntimeWarning, match=r"cannot be compiled and runs as usual.*Error"):
        assert step(torch.ones(2), torch.ones(2), 1.0) == 2.0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert step(-torch.ones(2), torch.ones(2), 1.0) == 3.0
    assert objective.weight.grad == 5.0


def test_a_compiler_that_fails_falls_back(monkeypatch):
    objective, x, y = objective_of("mlp")
    step = CompiledStep(objective)

    def no_compiler(*args, **kwargs):
        raise RuntimeError("no working C++ compiler found")

    monkeypatch.setattr("torch._inductor.compile", no_compiler)
    with pytest.warns(RuntimeWarning, match="no working C"):
        found = outcome(step, objective, x, y, 1.0)
    expected = outcome(lambda *args: eager(objective, *args), objective, x, y, 1.0)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_a_mistake_in_the_arguments_stays_an_error():
    objective, x, y = objective_of("mlp")
    with pytest.raises(RuntimeError, match="shape"):
        CompiledStep(objective, backend="eager")(x[:, :3], y, 1.0)
    with pytest.raises(ValueError, match="'fast'"):
        CompiledStep(objective, backend="fast")


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
def test_inductor_agrees_with_forward_and_backward(dtype, tolerance):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Tanh(), bmrs.MultiplicativeNoise(6), nn.Linear(6, 3))
    model = bmrs.NoisyNetwork(net, num_data=100).to(dtype)
    guide = bmrs.TruncatedLogNormalGuide(model, init_loc=-1.0, init_log_scale=-1.0).to(dtype)
    objective = NoisyObjective(model, guide, bmrs.MeanFieldELBO())
    x, y = torch.randn(4, 5, dtype=dtype), torch.tensor([0, 1, 2, 0])
    step = CompiledStep(objective)
    step(x, y, 1.0)
    state = [b.clone() for b in objective.buffers()]
    model.noise["3.theta"].remove(torch.arange(6) == 2)
    found = outcome(step, objective, x, y, 0.5)
    assert step.traces == 1
    for buffer, value in zip(objective.buffers(), state, strict=True):
        if buffer.dtype != torch.bool:
            buffer.copy_(value)
    expected = outcome(lambda *args: eager(objective, *args), objective, x, y, 0.5)
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    torch.manual_seed(0)
    assert step(x, y, 1.0) != step(x, y, 1.0)
