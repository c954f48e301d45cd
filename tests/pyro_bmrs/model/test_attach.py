"""Noise attached from outside: the network stays the user's own, and everything that trains noise trains it."""

import copy
import io
import math
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pyro
import pytest
import torch
from marks import thinned
from nets import random_masks
from processes import EveryThird, MedianGuide, Stop, state
from pyro import poutine
from pyro.infer import SVI, TraceMeanField_ELBO
from safetensors.torch import load_file
from torch import nn
from torch.utils.checkpoint import checkpoint

import pyro_bmrs as bmrs
from pyro_bmrs.svi.compiled import CompiledStep
from pyro_bmrs.svi.objective import NoisyObjective

ROOT = Path(__file__).parents[3]
QUICK = {"epochs": 2, "fine_tune_epochs": 1, "batch_size": 10, "lr": 1e-2, "seed": 0, "progress": False}
EXACT = {"rtol": 1e-10, "atol": 1e-10}


class Block(nn.Module):
    """A residual block; its activations are computed again in the backward pass if asked for."""

    def __init__(self, channels, inner, norm):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, inner, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(inner) if norm else nn.Identity()
        self.conv2 = nn.Conv2d(inner, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels) if norm else nn.Identity()
        self.reentrant = None

    def inside(self, x):
        return self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))

    def forward(self, x):
        h = self.inside(x) if self.reentrant is None else checkpoint(self.inside, x, use_reentrant=self.reentrant)
        return torch.relu(x + h)


class ResNet(nn.Module):
    """A small residual network on images."""

    def __init__(self, norm=True):
        super().__init__()
        self.note = "mine"
        self.stem = nn.Conv2d(2, 6, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(6) if norm else nn.Identity()
        self.first, self.second = Block(6, 5, norm), Block(6, 4, norm)
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        return self.head(self.second(self.first(torch.relu(self.bn(self.stem(x))))).mean((2, 3)))


class BatchFirst(nn.Module):
    """A transformer encoder."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(3, 8)
        layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.encoder(self.embed(x)).mean(1))


class TimeFirst(BatchFirst):
    """Works on (time, batch, width) inside."""

    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0)
        self.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)

    def forward(self, x):
        return self.head(self.encoder(self.embed(x).transpose(0, 1)).mean(0))


NETWORKS = {
    "residual": (ResNet, (2, 5, 5)),
    "without norms": (lambda: ResNet(norm=False), (2, 5, 5)),
    "batch first": (BatchFirst, (4, 3)),
    "time first": (TimeFirst, (4, 3)),
}
TRAINED = ["residual", "batch first", "time first"]


def plain(name, dtype=torch.float64, seed=0):
    """Return a network whose batch norms have statistics of their own."""
    torch.manual_seed(seed)
    net = NETWORKS[name][0]().to(dtype)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2)
    return net


def inputs(name, count=6, dtype=torch.float64, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, *NETWORKS[name][1], generator=generator, dtype=torch.float64).to(dtype)


def data(name, count=30, dtype=torch.float64):
    x = inputs(name, count, dtype)
    return x, x.flatten(1)[:, :3].argmax(1)


def attached(name, dtype=torch.float64, guide=bmrs.TruncatedLogNormalGuide, seed=0, prior=None, **select):
    """Return model and guide on a network with noise attached."""
    net = plain(name, dtype, seed)
    structures = bmrs.find_structures(net, inputs(name, 2, dtype))
    if select:
        structures = structures.select(**select)
    model = bmrs.NoisyNetwork(bmrs.attach_noise(net, structures, prior), num_data=30)
    return model, guide(model).to(dtype)


def scatter_posterior(guide, seed=2):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        guide.loc.uniform_(-2, 0, generator=generator)
        guide.log_scale.normal_(-1, 0.5, generator=generator)


def hooks(net):
    return [
        hook
        for module in net.modules()
        for each in (module._forward_pre_hooks, module._forward_hooks, module._forward_pre_hooks_with_kwargs)
        for hook in each
    ]


@pytest.mark.parametrize("name", NETWORKS)
def test_the_network_stays_what_it_was(name):
    net, x = plain(name), inputs(name)
    before, text, original = copy.deepcopy(net.state_dict()), repr(net), dict(vars(net))
    attention = [module for module in net.modules() if type(module) is nn.MultiheadAttention]
    modules, parameters = list(net.modules()), list(net.parameters())
    expected = net(x)
    noisy = bmrs.attach_noise(net, bmrs.find_structures(net, x[:2]))
    assert noisy.net is net
    assert vars(net) == original
    assert type(net).__name__ in ("ResNet", "BatchFirst", "TimeFirst")
    assert list(net.state_dict()) == list(before)
    assert repr(net).replace("HeadwiseAttention", "MultiheadAttention") == text
    assert all(now is then for now, then in zip(net.modules(), modules, strict=True))
    assert all(now is then for now, then in zip(net.parameters(), parameters, strict=True))
    assert all(isinstance(module, nn.MultiheadAttention) for module in attention)
    net.load_state_dict(before)
    torch.testing.assert_close(net(x), expected, **EXACT)  # masks keep all


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("used", [False, True])
def test_detach_gives_it_back(name, used):
    net, x = plain(name), inputs(name)
    twin = copy.deepcopy(net)
    structures = bmrs.find_structures(net, x[:2])
    noisy = bmrs.attach_noise(net, structures)
    if used:
        model = bmrs.NoisyNetwork(noisy, num_data=100)
        guide = bmrs.TruncatedLogNormalGuide(model).double()
        for layer in model.noise.values():
            layer.remove(torch.arange(layer.size) == 1)
        bmrs.MeanFieldELBO()(model.eval(), guide)(x, torch.zeros(6, dtype=torch.long)).backward()
        bmrs.compact(model, guide, random_masks(model), x)
        model.train()
    assert noisy.detach() is net
    assert not hooks(net)
    assert [type(module) for module in net.modules()] == [type(module) for module in twin.modules()]
    for (mine, a), (other, b) in zip(net.state_dict().items(), twin.state_dict().items(), strict=True):
        assert mine == other
        assert torch.equal(a, b)
    assert torch.equal(net(x), twin(x))
    assert torch.equal(net.eval()(x), twin.eval()(x))
    again = bmrs.NoisyNetwork(bmrs.attach_noise(net, structures))
    assert all(layer.keep.all() for layer in again.noise.values())


def test_hooks_of_the_users_own_stay():
    net, x = plain("residual"), inputs("residual")
    seen = []
    for module in (net.first.conv2, net.head):
        module.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape))
        module.register_forward_hook(lambda module, args, kwargs, output: 2 * output, with_kwargs=True)
    expected = net(x)
    noisy = bmrs.attach_noise(net, bmrs.find_structures(net, x[:2]))
    seen.clear()
    torch.testing.assert_close(noisy(x), expected, **EXACT)
    noisy.detach()
    assert torch.equal(net.eval()(x), net(x))
    assert len(seen) == 6
    assert len(hooks(net)) == 4


def pickled(module):
    return pickle.loads(pickle.dumps(module))


def saved(module):
    file = io.BytesIO()
    torch.save(module, file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=False)


@pytest.mark.slow
@pytest.mark.parametrize("copied", [copy.deepcopy, pickled, saved])
@pytest.mark.parametrize("name", TRAINED)
@pytest.mark.parametrize("whole", [False, True])
def test_a_copy_has_noise_of_its_own(name, copied, whole):
    model, guide = attached(name)
    scatter_posterior(guide)
    x = inputs(name)
    model.run(x, guide.draw((len(x),)))  # what the last pass drew is not copied
    twin = copied(model) if whole else bmrs.NoisyNetwork(copied(model.net), num_data=30)
    assert twin.sizes == model.sizes
    theta = {site: torch.rand(size, dtype=torch.float64) for site, size in model.sizes.items()}
    model.eval(), twin.eval()
    expected = model.run(x, theta)
    assert torch.equal(twin.run(x, theta), expected)
    for site, layer in twin.noise.items():
        assert layer is not model.noise[site]
        layer.remove(torch.arange(layer.size) < layer.size - 1)
    assert not torch.equal(twin.run(x, theta), expected)
    assert torch.equal(model.run(x, theta), expected)
    assert all(layer.keep.all() for layer in model.noise.values())
    for layer in model.noise.values():
        layer.remove(torch.ones(layer.size, dtype=torch.bool))
    assert not torch.equal(model.run(x, theta), expected)
    assert all(layer.keep.any() for layer in twin.noise.values())
    twin.net.detach()
    assert hooks(model.net.net)
    assert not hooks(twin.net.net)


@pytest.mark.slow
def test_a_copy_of_model_and_guide_trains_alike_and_apart():
    model, guide = attached("residual")
    other, posterior = copy.deepcopy((model, guide))
    x, y = data("residual")
    bmrs.fit(other, posterior, (x, y), **QUICK, precision="64-true")
    assert torch.equal(guide.loc, attached("residual")[1].loc)
    bmrs.fit(model, guide, (x, y), **QUICK, precision="64-true")
    torch.testing.assert_close(state(model, guide), state(other, posterior), rtol=0, atol=0)


def loss_and_gradients(elbo, model, guide, x, y, seed=1):
    torch.manual_seed(seed)
    module = elbo(model.eval(), guide)
    module.zero_grad()
    loss = module(x, y)
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in module.named_parameters()}


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("pruned", [False, True])
def test_loss_and_gradients_are_those_of_the_stock_elbo(name, pruned):
    model, guide = attached(name)
    scatter_posterior(guide)
    x, y = data(name, 6)
    if pruned:
        for layer in model.noise.values():
            layer.remove(torch.arange(layer.size) % 3 == 0)
    stock = loss_and_gradients(TraceMeanField_ELBO(), model, guide, x, y)
    ours = loss_and_gradients(bmrs.MeanFieldELBO("batch"), model, guide, x, y)
    torch.testing.assert_close(ours, stock, rtol=1e-10, atol=1e-10)


@pytest.mark.slow
def test_draws_for_each_example_leave_the_mean_of_the_loss():
    model, guide = attached("without norms")
    scatter_posterior(guide)
    x, y = data("without norms")
    model.eval()

    def losses(elbo):
        with torch.no_grad():
            return torch.tensor([float(elbo.loss(model, guide, x, y)) for _ in range(200)])

    stock = losses(TraceMeanField_ELBO())
    for granularity in ("shared", "example", "batch"):
        ours = losses(bmrs.MeanFieldELBO(granularity))
        error = math.sqrt(float((stock.var() + ours.var()) / 200))
        assert abs(float(stock.mean() - ours.mean())) < 4 * error


@pytest.mark.slow
@pytest.mark.parametrize("elbo", [TraceMeanField_ELBO, bmrs.MeanFieldELBO])
@pytest.mark.parametrize("name", TRAINED)
def test_svi(name, elbo):
    model, guide = attached(name, torch.float32)
    x, y = data(name, dtype=torch.float32)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), elbo())
    losses = [svi.step(x, y) for _ in range(20)]
    assert sum(losses[-5:]) < sum(losses[:5])


def test_the_program_has_one_site_a_group():
    model, _ = attached("residual")
    x, y = data("residual", 4)
    trace = poutine.trace(model).get_trace(x, y)
    assert [site for site in trace.stochastic_nodes if site in model.sizes] == list(model.sizes)
    assert list(model.sizes) == [f"{name}.theta" for name in model.net.structures]
    assert all(trace.nodes[site]["fn"].event_shape == (size,) for site, size in model.sizes.items())
    assert not poutine.trace(model.net).get_trace(x).stochastic_nodes  # outside of the model there is no noise


def test_structures_are_not_sought_behind_noise_that_is_attached():
    model, _ = attached("residual")
    for net in (model.net, nn.Sequential(model.net)):
        with pytest.raises(ValueError, match=r"has noise attached already, .* detach"):
            bmrs.find_structures(net, data("residual", 2)[0])


@pytest.mark.slow
@pytest.mark.parametrize("granularity", ["shared", "example", "batch", "element"])
@pytest.mark.parametrize("name", NETWORKS)
def test_gradients_at_every_granularity(name, granularity):
    model, guide = attached(name, torch.float32)
    x, y = data(name, 5, torch.float32)
    loss = bmrs.MeanFieldELBO(granularity).differentiable_loss(model.train(), guide, x, y)
    loss.backward()
    for parameter in (*model.parameters(), *guide.parameters()):
        assert parameter.grad is not None
        assert parameter.grad.isfinite().all()
    assert (guide.loc.grad != 0).all()


@pytest.mark.slow
@pytest.mark.parametrize("granularity", thinned(["shared", "example", "batch", "element"], keep=["shared", "element"]))
@pytest.mark.parametrize("name", TRAINED)
def test_a_fit_then_compact(name, granularity):
    model, guide = attached(name, torch.float32)
    x, y = data(name, dtype=torch.float32)
    result = bmrs.fit(model, guide, (x, y), (x, y), criterion=EveryThird(), granularity=granularity, **QUICK)
    assert len(result.history) == 3
    assert all(not mask.all() for mask in result.masks.values())
    small = bmrs.compact(model, guide, None, x[:2])
    assert type(small) is type(plain(name))
    new = inputs(name, 7, torch.float32, seed=5)
    torch.testing.assert_close(small(new), bmrs.predict(model, guide, new), rtol=1e-4, atol=1e-5)
    assert bmrs.count_parameters(small) < bmrs.count_parameters(model.net.net)


@pytest.mark.exhaustive
def test_a_compiled_fit_is_the_same():
    name, ends = "residual", []
    for compiled in (False, True):
        model, guide = attached(name, guide=MedianGuide)
        x, y = data(name)
        settings = {**QUICK, "fine_tune_epochs": 0, "criterion": None, "precision": "64-true", "compile": compiled}
        result = bmrs.fit(model, guide, (x, y), **settings)
        ends.append((state(model, guide), torch.tensor([entry["loss"] for entry in result.history])))
    torch.testing.assert_close(*ends, rtol=1e-6, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("granularity", thinned(["shared", "example", "batch", "element"], keep=["shared"]))
@pytest.mark.parametrize("name", TRAINED)
def test_a_traced_step_is_the_same(name, granularity):
    model, guide = attached(name)
    x, y = data(name, 5)
    objective = NoisyObjective(model.eval(), guide, bmrs.MeanFieldELBO(granularity))

    def outcome(step):
        objective.zero_grad()
        torch.manual_seed(3)
        loss = step(x, y, 0.7)
        return loss, [p.grad for p in objective.parameters()]

    def eager(*args):
        loss = objective(*args)
        loss.backward()
        return loss.detach()

    traced = CompiledStep(objective, backend="eager")
    torch.testing.assert_close(outcome(traced), outcome(eager), **EXACT)
    for layer in model.noise.values():
        layer.remove(torch.arange(layer.size) == 0)
    torch.testing.assert_close(outcome(traced), outcome(eager), **EXACT)
    assert traced.traces == 1


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:There is a performance drop")  # torch's attention on a CPU, over replicas
@pytest.mark.parametrize("name", TRAINED)
def test_an_ensemble_is_fits_one_by_one(name):
    x, y = data(name)
    settings = {**QUICK, "criterion": EveryThird()}
    del settings["seed"]

    def make():
        net = NETWORKS[name][0]().double()
        model = bmrs.NoisyNetwork(bmrs.attach_noise(net, bmrs.find_structures(net, x[:2])))
        return model, StackableMedianGuide(model).double()

    together = bmrs.fit_ensemble(make, (x, y), seeds=(3, 5), **settings)
    for replica in together:
        torch.manual_seed(replica.seed)
        model, guide = make()
        result = bmrs.fit(model, guide, (x, y), seed=replica.seed, precision="64-true", **settings)
        torch.testing.assert_close(state(replica.model, replica.guide), state(model, guide), rtol=1e-8, atol=1e-8)
        assert all(torch.equal(mask, result.masks[site]) for site, mask in replica.result.masks.items())
        small = bmrs.compact(replica.model, replica.guide, None, x[:2])
        with torch.no_grad():
            torch.testing.assert_close(small(x), bmrs.predict(replica.model, replica.guide, x), **EXACT)


class _Median(bmrs.TruncatedLogNormal):
    """Every draw is the median."""

    def rsample(self, sample_shape=()):
        return self.icdf(torch.full_like(self.loc, 0.5)).expand(*sample_shape, -1)


class StackableMedianGuide(bmrs.TruncatedLogNormalGuide):
    def family(self, index=slice(None)):
        q = super().family(index)
        return _Median(q.loc, q.scale, q.log_low, q.log_high, validate_args=False)


@pytest.mark.slow
@pytest.mark.parametrize("name", TRAINED)
def test_mixed_precision(name):
    model, guide = attached(name, torch.float32)
    x, y = data(name, dtype=torch.float32)
    dtypes = set()
    model.net.net.head.register_forward_hook(lambda *arguments: dtypes.add(arguments[2].dtype))
    bmrs.fit(model, guide, (x, y), (x, y), criterion=EveryThird(), precision="bf16-mixed", **QUICK)
    assert torch.bfloat16 in dtypes
    assert {p.dtype for p in (*model.parameters(), *guide.parameters())} == {torch.float32}
    small = bmrs.compact(model, guide, None, x[:2])
    with torch.no_grad():
        torch.testing.assert_close(small(x), bmrs.predict(model, guide, x), rtol=1e-4, atol=1e-5)


PROGRAM = """
import os, sys
import torch
from lightning_fabric import Fabric
from nets import blobs
from processes import EveryThird, MedianGuide, Stop, state
from safetensors.torch import save_file
from torch import nn

import pyro_bmrs as bmrs


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.i, self.b, self.o = nn.Linear(6, 12), nn.Linear(12, 12), nn.Linear(12, 3)

    def forward(self, x):
        h = self.i(x).relu()
        return self.o(h + self.b(h).tanh())


def fitted(fabric=None):
    torch.manual_seed(0)
    net = Net().double()
    x, y = blobs(100)
    x = x.double()
    model = bmrs.NoisyNetwork(bmrs.attach_noise(net, bmrs.find_structures(net, x[:2]))).double()
    guide = MedianGuide(model).double()
    settings = {"epochs": 3, "fine_tune_epochs": 1, "batch_size": 25, "lr": 1e-2, "seed": 3, "progress": False}
    settings |= {"fabric": fabric} if fabric else {"precision": "64-true"}
    bmrs.fit(model, guide, (x, y), criterion=EveryThird(), **settings)
    return state(model, guide)


torch.set_num_threads(1)
fabric = Fabric(accelerator="cpu", devices=2, strategy="ddp", precision="64-true")
fabric.launch()
save_file(fitted(fabric), f"rank{fabric.global_rank}.safetensors")
if fabric.global_rank == 0:
    save_file(fitted(), "alone.safetensors")
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes_train_to_the_parameters_of_one(tmp_path):
    (tmp_path / "program.py").write_text(PROGRAM)
    paths = os.pathsep.join(map(str, (ROOT, ROOT / "tests")))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "program.py"]
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr.decode()
    expected = load_file(tmp_path / "alone.safetensors")
    for rank in (0, 1):
        torch.testing.assert_close(load_file(tmp_path / f"rank{rank}.safetensors"), expected, rtol=0, atol=1e-9)


def checkpointed(reentrant):
    """Return model and guide on a network that computes its blocks again in the backward pass, unless ``None``."""
    model, guide = attached("residual")
    scatter_posterior(guide)
    model.net.net.first.reentrant = model.net.net.second.reentrant = reentrant
    return model, guide


@pytest.mark.slow
@pytest.mark.parametrize("granularity", ["shared", "example", "batch", "element"])
def test_activation_checkpointing_changes_no_gradient(granularity):
    x, y = data("residual", 5)
    elbo = bmrs.MeanFieldELBO(granularity)
    expected, found = (
        [loss_and_gradients(elbo, *pair, x, y, seed) for seed in (0, 1)]  # the noise of an earlier step is gone
        for pair in (checkpointed(None), checkpointed(False))
    )
    torch.testing.assert_close(found, expected, **EXACT)


def test_activation_checkpointing_of_several_passes_at_once_is_refused():
    x, y = data("residual", 5)
    with pytest.raises(RuntimeError, match="2 passes wait for their gradients: call backward after each of them"):
        loss_and_gradients(bmrs.MeanFieldELBO(num_particles=2), *checkpointed(False), x, y)


def test_activation_checkpointing_of_torchs_older_kind_fails_loudly():
    x, y = data("residual", 5)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss_and_gradients(bmrs.MeanFieldELBO(), *checkpointed(True), x, y)


def test_activation_checkpointing_in_a_fit_with_shrinking():
    ends = []
    for reentrant in (None, False):
        model, guide = attached("without norms")
        for block in (model.net.net.first, model.net.net.second):
            block.reentrant = reentrant
        x, y = data("without norms")
        settings = {**QUICK, "criterion": EveryThird(), "pruning": bmrs.Continuous(1, stop=1, shrink=True)}
        bmrs.fit(model, guide, (x, y), **settings, precision="64-true")
        ends.append(state(model, guide))
    torch.testing.assert_close(*ends, rtol=1e-8, atol=1e-8)


class OnlyOnce(EveryThird):
    """Removes every third structure of a site at the first pruning, and nothing more."""

    def __init__(self):
        self.asked = 0

    def scores(self, context):
        self.asked += 1
        scores = super().scores(context)
        return scores if self.asked == 1 else {site: score.abs().neg() for site, score in scores.items()}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["without norms", "residual", "batch first", "time first"])
def test_shrinking_while_training_is_masking(name):
    ends = []
    for shrink in (False, True):
        model, guide = attached(name, guide=MedianGuide)
        sizes = model.sizes
        x, y = data(name)
        pruning = bmrs.Continuous(start=2, shrink=shrink)
        settings = {**QUICK, "epochs": 4, "fine_tune_epochs": 2, "lr": 1e-3, "criterion": OnlyOnce()}
        result = bmrs.fit(model, guide, (x, y), (x, y), pruning=pruning, precision="64-true", **settings)
        losses = torch.tensor([[entry["loss"], entry["log_likelihood_validation"]] for entry in result.history])
        ends.append((losses, result.masks, bmrs.predict(model, guide, x)))
        if shrink:
            assert all(model.sizes[site] < size for site, size in sizes.items())
            assert {site: int(mask.sum()) for site, mask in result.masks.items()} == model.sizes
            small = bmrs.compact(model, guide, None, x[:2])
            with torch.no_grad():
                torch.testing.assert_close(small(x), bmrs.predict(model, guide, x), **EXACT)
            masked = bmrs.count_parameters(small)
            assert masked == bmrs.count_parameters(model.net.net)
            twin, its_guide = copy.deepcopy((model, guide))
            torch.testing.assert_close(bmrs.predict(twin, its_guide, x), bmrs.predict(model, guide, x), **EXACT)
    torch.testing.assert_close(*ends, rtol=1e-7, atol=1e-7)


def test_shrinking_again_and_again_and_detaching():
    model, guide = attached("batch first", torch.float32)
    x, y = data("batch first", dtype=torch.float32)
    optimizer = torch.optim.Adam([*model.parameters(), *guide.parameters()], lr=1e-2)
    for i in range(3):
        optimizer.zero_grad()
        bmrs.MeanFieldELBO().differentiable_loss(model.train(), guide, x, y).backward()
        optimizer.step()
        for layer in model.noise.values():
            if layer.size > 2:
                layer.remove(torch.arange(layer.size) == i)
        expected = bmrs.predict(model, guide, x)
        kept = bmrs.shrink(model, guide, optimizer, x[:2])
        assert all(len(kept[site]) == size for site, size in model.sizes.items())
        torch.testing.assert_close(bmrs.predict(model, guide, x), expected, rtol=1e-4, atol=1e-5)
    net = model.net.detach()
    assert not hooks(net)
    assert net.eval()(x).isfinite().all()
    assert net.encoder.layers[0].linear1.out_features == 9


@pytest.mark.slow
@pytest.mark.parametrize("name", ["residual", "batch first"])
@pytest.mark.parametrize("epoch", thinned([2, 3, 5], keep=[3]))
@pytest.mark.parametrize("shrink", [False, True])
def test_an_interrupted_fit_resumes_to_the_same_end(name, epoch, shrink, tmp_path):
    x, y = data(name)
    ends = []
    for interrupted in (False, True):
        settings = {**QUICK, "epochs": 4, "fine_tune_epochs": 2, "criterion": EveryThird(), "precision": "64-true"}
        settings |= {
            "pruning": bmrs.Continuous(start=1, stop=1 if shrink else None, shrink=shrink),
            "folder": tmp_path / str(interrupted),
        }
        model, guide = attached(name)
        if interrupted:
            with pytest.raises(KeyboardInterrupt):
                bmrs.fit(model, guide, (x, y), (x, y), callbacks=[Stop(epoch)], **settings)
            model, guide = attached(name, seed=1)
        result = bmrs.fit(model, guide, (x, y), (x, y), resume=interrupted, **settings)
        history = [{key: value for key, value in entry.items() if key != "seconds"} for entry in result.history]
        ends.append((state(model, guide), result.masks, result.scores, history, bmrs.predict(model, guide, x)))
    torch.testing.assert_close(*((*end[:3], end[4]) for end in ends), rtol=0, atol=0)
    assert ends[0][3] == ends[1][3]


@pytest.mark.slow
def test_priors_by_name():
    narrow = bmrs.LogUniform(-5.0, 0.0)
    _, guide = attached("residual", prior={"first.conv1": narrow})
    lows = {site: prior.log_low.unique().tolist() for site, prior in guide.prior().items()}
    assert lows.pop("first.conv1.theta") == [-5]
    assert set(map(tuple, lows.values())) == {(-20,)}
    assert len(lows) == 2
    _, guide = attached("residual", prior=narrow)
    assert all((prior.log_low == -5).all() for prior in guide.prior().values())
    one_each = bmrs.TruncatedLogNormal(torch.full((5,), -1.0), torch.ones(5), -torch.arange(5.0, 10.0), torch.zeros(5))
    _, guide = attached("residual", prior={"first.conv1": one_each})
    assert guide.prior()["first.conv1.theta"].log_low.tolist() == [-5, -6, -7, -8, -9]


def test_priors_that_fit_no_group_are_refused():
    net = plain("residual")
    structures = bmrs.find_structures(net, inputs("residual", 2))
    with pytest.raises(ValueError, match=r"first\.conv"):
        bmrs.attach_noise(net, structures, {"first.conv": bmrs.LogUniform(-5.0, 0.0)})
    with pytest.raises(ValueError, match=r"batch_shape"):
        bmrs.attach_noise(net, structures, bmrs.LogUniform(torch.full((5,), -5.0), torch.zeros(5)))
    assert not hooks(net)
    bmrs.attach_noise(net, structures)  # what has failed left nothing behind


def test_errors_leave_the_network_alone():
    net, x = plain("batch first"), inputs("batch first", 2)
    structures = bmrs.find_structures(net, x)
    with pytest.raises(ValueError, match=r"found in another network: there '.*' had .*, here its shape is None"):
        bmrs.attach_noise(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 3)), structures)
    wider = BatchFirst()
    wider.encoder.layers[0].linear1, wider.encoder.layers[0].linear2 = nn.Linear(8, 20), nn.Linear(20, 8)
    with pytest.raises(ValueError, match=r"had 12 positions along dimension .*, here its shape is "):
        bmrs.attach_noise(wider, structures)
    assert not hooks(wider)
    only = nn.Sequential(nn.Linear(3, 2))
    with pytest.raises(ValueError, match="there are no structures to attach noise to"):
        bmrs.attach_noise(only, bmrs.find_structures(only, torch.randn(2, 3)))
    noisy = bmrs.attach_noise(net, structures)
    with pytest.raises(ValueError, match="has noise attached already"):
        bmrs.attach_noise(net, structures)
    noisy.detach()
    first, second = (structures.select(names=pattern) for pattern in ("*.0.*", "*.1.*"))
    bmrs.attach_noise(net, first)
    with pytest.raises(ValueError, match=r"has noise attached already: detach\(\) that first, or attach all at once"):
        bmrs.attach_noise(net, second)
    with pytest.raises(ValueError, match="there are"):
        structures.select(names="nothing.like.this")


@pytest.mark.slow
@pytest.mark.parametrize(
    "criterion",
    [bmrs.BMRS_N(prior_log_odds=math.log(3)), bmrs.BMRS_U(), bmrs.SNR(), bmrs.PosteriorMean(), bmrs.WeightNorm(),
     bmrs.GradientWeightNorm(), bmrs.Random()],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:.*has lost all its structures")
@pytest.mark.parametrize("name", TRAINED)
def test_criteria(name, criterion):
    model, guide = attached(name)
    scatter_posterior(guide)
    x, y = data(name)
    context = bmrs.PruningContext(model.eval(), guide, model.net.structures, x, y)
    scores = criterion.scores(context)
    assert {site: tuple(score.shape) for site, score in scores.items()} == {s: (n,) for s, n in model.sizes.items()}
    assert all(score.isfinite().all() for score in scores.values())
    removable = criterion.removable(context, scores)
    for site, layer in model.noise.items():
        layer.remove(removable[site])
    bmrs.fit(model, guide, (x, y), criterion=criterion, **QUICK, precision="64-true")


def test_norms_of_weights_are_those_of_the_layers_that_make_a_structure():
    model, guide = attached("residual")
    net = model.net.net
    x, y = data("residual")
    scores = bmrs.WeightNorm().scores(bmrs.PruningContext(model, guide, model.net.structures, x, y))
    norms = net.first.conv1.weight.detach().square().sum((1, 2, 3)).sqrt()
    torch.testing.assert_close(scores["first.conv1.theta"], -norms, check_dtype=False)
    makers = [net.stem.weight, net.first.conv2.weight, net.second.conv2.weight]
    stream = sum(weight.detach().square().sum((1, 2, 3)) for weight in makers).sqrt()
    (site,) = (site for site, size in model.sizes.items() if size == 6)
    torch.testing.assert_close(scores[site], -stream, check_dtype=False)


def test_costs_of_attached_noise():
    model, guide = attached("residual")
    x = inputs("residual")
    odds = bmrs.cost_log_odds(model.net, x, math.log(3))
    weights = bmrs.cost_kl_weights(model.net, x, 2.0, cost="flops")
    assert {site: len(each) for site, each in odds.items()} == model.sizes
    assert weights.keys() == model.sizes.keys()
    again = bmrs.NoisyNetwork(model.net, num_data=30, kl_weight=weights)
    assert {site: layer.kl_weight for site, layer in again.noise.items()} == weights
    masks = random_masks(model)
    small = bmrs.compact(model, guide, masks, x)
    structures = model.net.structures
    assert bmrs.count_parameters(model.net, structures, masks) == bmrs.count_parameters(small)
    assert bmrs.count_flops(model.net, x, structures, masks) == bmrs.count_flops(small, x)


NORMS = ("bn", "first.bn1", "first.bn2", "second.bn1", "second.bn2")


def behind_norms():
    net = plain("residual")
    structures = bmrs.find_structures(net, inputs("residual", 2), outputs=NORMS)
    model = bmrs.NoisyNetwork(bmrs.attach_noise(net, structures.select(kinds="output")), num_data=30)
    guide = bmrs.TruncatedLogNormalGuide(model).double()
    scatter_posterior(guide)
    return model, guide


def test_the_papers_placement_has_noise_on_every_norms_output():
    model, _ = behind_norms()
    assert model.sizes == {"bn.theta": 6, "first.bn1.theta": 5, "first.bn2.theta": 6, "second.bn1.theta": 4,
                           "second.bn2.theta": 6}  # fmt: skip
    x = inputs("residual")
    theta = {site: torch.rand(size, dtype=torch.float64) for site, size in model.sizes.items()}
    net = model.eval().net.net
    with torch.no_grad():
        found = model.run(x, theta)

        def scaled(norm, h, site):
            return nn.functional.batch_norm(h, norm.running_mean, norm.running_var, norm.weight, norm.bias) * theta[
                f"{site}.theta"
            ].view(-1, 1, 1)

        h = scaled(net.bn, net.stem(x), "bn").relu()
        for name in ("first", "second"):
            block = getattr(net, name)
            inner = scaled(block.bn1, block.conv1(h), f"{name}.bn1").relu()
            h = (h + scaled(block.bn2, block.conv2(inner), f"{name}.bn2")).relu()
        torch.testing.assert_close(found, net.head(h.mean((2, 3))), **EXACT)


@pytest.mark.slow
def test_compacted_equals_masked_in_the_papers_placement():
    model, guide = behind_norms()
    example, new = inputs("residual", 2), inputs("residual", 7, seed=5)
    structures = model.net.structures
    trials = [random_masks(model, seed) for seed in range(4)]
    trials += [trials[0] | {site: torch.zeros(size, dtype=torch.bool)} for site, size in model.sizes.items()]
    trials.append({site: torch.zeros(size, dtype=torch.bool) for site, size in model.sizes.items()})
    for masks in trials:
        small = bmrs.compact(model, guide, masks, example)
        with torch.no_grad():
            torch.testing.assert_close(small(new), bmrs.predict(model, guide, new, masks), **EXACT)
        assert bmrs.count_parameters(model.net, structures, masks) == bmrs.count_parameters(small)
        assert bmrs.count_flops(model.net, example, structures, masks) == bmrs.count_flops(small, example)


def test_a_channel_goes_where_all_its_summands_have_lost_it():
    model, guide = behind_norms()
    x = inputs("residual", 2)
    everything = {site: torch.ones(size, dtype=torch.bool) for site, size in model.sizes.items()}
    four = torch.arange(6) < 4
    sums = ("bn.theta", "first.bn2.theta", "second.bn2.theta")

    def stem(masks):
        return bmrs.compact(model, guide, everything | masks, x).stem.out_channels

    assert stem({}) == 6
    assert stem(dict.fromkeys(sums, four)) == 4
    small = bmrs.compact(model, guide, everything | dict.fromkeys(sums, four), x)
    assert small.head.in_features == 4
    assert small.first.conv1.in_channels == 4
    apart = bmrs.compact(model, guide, everything | dict.fromkeys(sums[:2], four), x)
    assert apart.head.in_features == 6  # the last block still writes the other two
    assert apart.stem.out_channels == 4


def test_the_papers_placement_is_fitted_and_shrinks():
    model, guide = behind_norms()
    x, y = data("residual")
    before = model.sizes
    settings = {**QUICK, "criterion": EveryThird(), "pruning": bmrs.Continuous(1, stop=1, shrink=True)}
    bmrs.fit(model, guide, (x, y), (x, y), **settings, precision="64-true")
    assert model.sizes["first.bn1.theta"] < before["first.bn1.theta"]
    small = bmrs.compact(model, guide, None, x[:2])
    with torch.no_grad():
        torch.testing.assert_close(small(x), bmrs.predict(model, guide, x), **EXACT)
    net = model.net.detach()
    assert not hooks(net)


def test_noise_that_has_been_detached_is_missed():
    model, guide = attached("residual", torch.float32)
    x, y = data("residual", 8, torch.float32)
    model.net.detach()
    few = {"epochs": 1, "fine_tune_epochs": 0, "progress": False}
    for call in (
        lambda: bmrs.fit(model, guide, (x, y), **few),
        lambda: bmrs.predict(model, guide, x),
        lambda: bmrs.compact(model, guide, None, x),
    ):
        with pytest.raises(ValueError, match="the noise has been detached from this network: attach it again"):
            call()


def test_a_noise_layer_of_another_size_is_to_blame_itself():
    net = nn.Sequential(nn.Linear(5, 16), bmrs.MultiplicativeNoise(15), nn.Linear(16, 2))
    model = bmrs.NoisyNetwork(net)
    with pytest.raises(ValueError, match=r"^1\.theta is for 15 structures .*: give it the size of that dimension$"):
        bmrs.fit(model, bmrs.TruncatedLogNormalGuide(model), (torch.randn(6, 5), torch.arange(6) % 2), progress=False)
