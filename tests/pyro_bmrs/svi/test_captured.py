import pyro
import pytest
import torch
from nets import build
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import pyro_bmrs as bmrs
from pyro_bmrs.svi.captured import CapturedStep
from pyro_bmrs.svi.objective import NoisyObjective


class NoTransfers(TorchDispatchMode):
    """Forbid copies from the host to the "device", which is torch's meta device and refuses all the others itself."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default):
            devices = {each.device.type for each in tree_leaves((args, kwargs, out)) if isinstance(each, torch.Tensor)}
            assert devices == {"meta"}, f"{func} copies between {devices}"
        return out


def objective_of(name, device="cpu", **elbo):
    model, guide, x = build(name)
    y = torch.arange(len(x)) % model.net(x).shape[-1]
    return NoisyObjective(model, guide, bmrs.MeanFieldELBO(**elbo)).to(device), x.to(device), y.to(device)


@pytest.mark.slow
@pytest.mark.parametrize("granularity", ["shared", "example", "batch", "element"])
@pytest.mark.parametrize("name", ["mlp", "lenet5", "batch_norm"])
def test_the_host_waits_for_nothing_inside_a_step(name, granularity):
    objective, x, y = objective_of(name, "meta", granularity=granularity)
    kl_weight = torch.ones((), device="meta")
    with pyro.validation_enabled(False):
        objective(x, y, kl_weight).backward()  # fills caches of constants
        with NoTransfers():
            loss = objective(x, y, kl_weight)
            loss.backward()
    assert loss.is_meta
    assert objective.guide.loc.grad.is_meta


def test_a_cpu_is_refused():
    objective, _, _ = objective_of("mlp")
    with pytest.raises(ValueError, match="captured on a CUDA device, but the parameters are on cpu"):
        CapturedStep(objective, torch.optim.Adam(objective.parameters()))


def adam(objective, rate=1e-2):
    rate = torch.tensor(rate, device="cuda")
    return torch.optim.Adam(objective.parameters(), rate, fused=True, capturable=True)


class FixedUniforms(bmrs.TruncatedLogNormalGuide):
    """Its draws are quantiles at fixed probabilities."""

    def draw(self, sample_shape=()):
        posterior = self.flat_posterior()
        probability = torch.linspace(0.1, 0.9, posterior.batch_shape[0], device=self.device)
        return self.split(posterior.icdf(probability.expand(*sample_shape, -1)))


@pytest.mark.gpu
def test_an_optimiser_that_cannot_be_captured_is_refused():
    objective, _, _ = objective_of("mlp", "cuda")
    with pytest.raises(ValueError, match=r"capturable=True and lr=torch.tensor"):
        CapturedStep(objective, torch.optim.Adam(objective.parameters(), fused=True))


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["mlp", "batch_norm"])
def test_captured_training_is_eager_training(name):
    def trained(captured):
        objective, x, y = objective_of(name, "cuda")
        objective.guide.__class__ = FixedUniforms
        optimizer = adam(objective)
        step = CapturedStep(objective, optimizer) if captured else None
        losses = []
        for i in range(24):
            batch = slice(0, 6 if i % 3 else 4)  # a shorter batch now and then
            optimizer.param_groups[0]["lr"].fill_(1e-2 / (1 + i))
            if i == 14:
                for layer in objective.model.noise.values():
                    layer.remove(torch.arange(layer.size) == 1)
            if step is None:
                optimizer.zero_grad()
                loss = objective(x[batch], y[batch], torch.tensor(0.1 * i, device="cuda"))
                loss.backward()
                optimizer.step()
            else:
                loss = step(x[batch], y[batch], 0.1 * i)
            losses.append(loss.detach())
        if step is not None:
            assert step.captures >= 3
        return losses, [p.detach() for p in objective.parameters()], list(objective.buffers())

    torch.testing.assert_close(trained(True), trained(False), rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
def test_noise_is_fresh_at_each_replay_and_a_seed_repeats_it():
    objective, x, y = objective_of("mlp", "cuda")
    step = CapturedStep(objective, adam(objective, rate=0.0))
    for _ in range(5):
        step(x, y, 1.0)
    assert step.captures == 1
    torch.manual_seed(0)
    losses = [float(step(x, y, 1.0)) for _ in range(4)]
    assert len(set(losses)) == 4
    torch.manual_seed(0)
    assert losses == [float(step(x, y, 1.0)) for _ in range(4)]
    assert step.captures == 1


@pytest.mark.gpu
def test_masks_that_change_further_are_seen_without_a_new_graph():
    objective, x, y = objective_of("mlp", "cuda")
    for layer in objective.model.noise.values():
        layer.remove(torch.arange(layer.size) == 0)
    step = CapturedStep(objective, adam(objective, rate=0.0))
    for _ in range(5):
        step(x, y, 1.0)
    for layer in objective.model.noise.values():
        layer.remove(torch.arange(layer.size) < 5)
    step(x, y, 1.0)
    assert step.captures == 1
    assert not objective.guide.loc.grad[~objective.guide.keep].any()


@pytest.mark.gpu
def test_what_cannot_be_captured_falls_back():
    class Asking(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones((), device="cuda"))

        def forward(self, x, y, kl_weight, share):
            return self.weight * (2 if bool(x.sum() > 0) else 3)

    objective = Asking()
    step = CapturedStep(objective, adam(objective))
    x = torch.ones(2, device="cuda")
    for _ in range(3):
        step(x, x, 1.0)
    with pytest.warns(RuntimeWarning, match="cannot be captured"):
        step(x, x, 1.0)
    before = objective.weight.detach().clone()
    step(x, x, 1.0)
    assert objective.weight < before
