import json
import math

import pyro.distributions as dist
import pytest
import torch
from marks import thinned
from nets import NETWORKS, blobs
from torch import nn

import pyro_bmrs as bmrs
from pyro_bmrs.svi.callbacks import JSONLines
from pyro_bmrs.svi.replicas import Stack

SEEDS = (3, 0, 7)
QUICK = {"epochs": 8, "fine_tune_epochs": 3, "batch_size": 37, "lr": 1e-2, "progress": False}


class _Median(bmrs.TruncatedLogNormal):
    """Every draw is the median, so that fits can be compared."""

    def rsample(self, sample_shape=()):
        return self.icdf(torch.full_like(self.loc, 0.5)).expand(*sample_shape, -1)


class MedianGuide(bmrs.TruncatedLogNormalGuide):
    def family(self, index=slice(None)):
        q = super().family(index)
        return _Median(q.loc, q.scale, q.log_low, q.log_high, validate_args=False)


def make(guide=MedianGuide, net=None, dtype=torch.float64, kl_weight=0.1):
    """Return a maker of models and guides."""

    def made():
        layers = net() if net else _layers()
        model = bmrs.NoisyNetwork(layers, kl_weight=kl_weight).to(dtype)
        return model, guide(model).to(dtype)

    return made


def _layers():
    first = [nn.Linear(6, 16), nn.ReLU(), bmrs.MultiplicativeNoise(16)]
    return nn.Sequential(*first, nn.Linear(16, 12), nn.Tanh(), bmrs.MultiplicativeNoise(12), nn.Linear(12, 3))


def problem(n=200, dtype=torch.float64, **arguments):
    x, y = blobs(n, **arguments)
    return x.to(dtype), y


def apart(made, seeds, *data, **settings):
    """Return what fits one by one come to."""
    replicas = []
    for seed in seeds:
        torch.manual_seed(seed)
        model, guide = made()
        replicas.append(bmrs.EnsembleMember(seed, model, guide, bmrs.fit(model, guide, *data, seed=seed, **settings)))
    return replicas


def tensors(replica):
    """Return everything that two equal fits have in common."""
    scores = {f"score {site}": score for site, score in replica.result.scores.items()}
    masks = {f"mask {site}": mask for site, mask in replica.result.masks.items()}
    return {**replica.model.state_dict(), **replica.guide.state_dict(), **scores, **masks}


def assert_same(together, alone):
    for one, other in zip(together, alone, strict=True):
        assert one.seed == other.seed
        torch.testing.assert_close(tensors(one), tensors(other), rtol=1e-10, atol=1e-10)
        for record, expected in zip(one.result.history, other.result.history, strict=True):
            now, then = (
                {k: v for k, v in each.items() if k not in ("phase", "seconds", "recall_validation")}
                for each in (record, expected)
            )
            assert record.get("recall_validation") == expected.get("recall_validation")
            assert record["phase"] == expected["phase"]
            assert now == pytest.approx(then, rel=1e-10, abs=1e-10)


@pytest.mark.slow
@pytest.mark.parametrize("granularity", thinned(["shared", "example", "batch", "element"], keep=["shared", "batch"]))
def test_replicas_are_what_fits_one_by_one_come_to(granularity):
    data = (problem(), problem(50, seed=1))
    settings = {**QUICK, "granularity": granularity, "kl_warmup_epochs": 2}
    made = make()
    together = bmrs.fit_ensemble(made, *data, seeds=SEEDS, **settings)
    alone = apart(made, SEEDS, *data, **settings)
    assert_same(together, alone)
    masks = [torch.cat(list(replica.result.masks.values())) for replica in together]
    assert not any(mask.all() for mask in masks)
    assert not torch.equal(masks[0], masks[1])


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", thinned([200, 60, 7], keep=[60]))
def test_batches_of_any_size(batch_size):
    settings = {**QUICK, "batch_size": batch_size, "epochs": 2, "fine_tune_epochs": 1, "lr": 1e-3, "posterior_lr": 0.05}
    together = bmrs.fit_ensemble(make(), problem(), seeds=SEEDS[:2], **settings)
    assert_same(together, apart(make(), SEEDS[:2], problem(), **settings))


@pytest.mark.slow
@pytest.mark.parametrize("granularity", ["shared", "example", "element"])
def test_a_network_with_batch_norm_and_images_of_bytes(granularity):
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(256, (60, 2, 8, 8), generator=generator, dtype=torch.uint8)
    y = torch.randint(3, (60,), generator=generator)
    made = make(net=NETWORKS["batch_norm"][0])
    settings = {**QUICK, "epochs": 3, "fine_tune_epochs": 1, "batch_size": 25, "granularity": granularity}
    data = ((x, y), (x, y))
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        together = bmrs.fit_ensemble(made, *data, seeds=SEEDS, **settings)
        alone = apart(made, SEEDS, *data, **settings)
    finally:
        torch.set_default_dtype(before)
    assert together[0].model.net[1].num_batches_tracked == 12
    assert_same(together, alone)


@pytest.mark.parametrize(("guide", "same"), [(bmrs.TruncatedLogNormalGuide, False), (MedianGuide, True)])
def test_every_replica_draws_its_own_noise(guide, same):
    def same_start():
        torch.manual_seed(0)
        return make(guide)()

    settings = {**QUICK, "batch_size": 200, "epochs": 3, "fine_tune_epochs": 0}
    one, other = bmrs.fit_ensemble(same_start, problem(), seeds=(1, 2), criterion=None, **settings)
    assert torch.allclose(one.model.net[0].weight, other.model.net[0].weight) == same


@pytest.mark.exhaustive
def test_a_float32_ensemble_prunes_and_keeps_accuracy():
    x, y = problem(600, torch.float32)
    made = make(bmrs.TruncatedLogNormalGuide, dtype=torch.float32, kl_weight=1.0)
    settings = {**QUICK, "epochs": 40, "fine_tune_epochs": 20, "batch_size": 50}
    replicas = bmrs.fit_ensemble(made, (x[:500], y[:500]), (x[500:], y[500:]), seeds=range(3), **settings)
    for replica in replicas:
        assert replica.result.compression > 0.3
        assert replica.result.history[-1]["accuracy_validation"] > 0.9
        small = bmrs.compact(replica.model, replica.guide, replica.result.masks, x[:4])
        expected = bmrs.predict(replica.model, replica.guide, x)
        torch.testing.assert_close(small(x), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_seeds_repeat_the_run_and_leave_the_callers_random_state_alone():
    runs = []
    for _ in range(2):
        torch.manual_seed(5)
        replicas = bmrs.fit_ensemble(make(bmrs.TruncatedLogNormalGuide), problem(), seeds=SEEDS, **QUICK)
        runs.append([*(tensors(replica) for replica in replicas), torch.rand(3)])
    torch.testing.assert_close(runs[0], runs[1], rtol=0, atol=0, equal_nan=True)
    torch.manual_seed(5)
    assert torch.equal(runs[0][-1], torch.rand(3))


@pytest.mark.slow
def test_replicas_own_their_tensors():
    one, other = bmrs.fit_ensemble(make(), problem(), seeds=(0, 1), **QUICK)
    weight = one.model.net[0].weight
    assert weight.untyped_storage().nbytes() == weight.numel() * weight.element_size()
    before = tensors(other)["net.0.weight"].clone()
    with pytest.warns(bmrs.FitWarning, match="the model has been fitted before"):
        bmrs.fit(one.model, one.guide, problem(), **QUICK)
    assert torch.equal(other.model.net[0].weight, before)


@pytest.mark.slow
def test_callbacks_hear_of_their_own_replica(tmp_path):
    heard = {}

    class Heard(bmrs.Callback):
        def __init__(self, seed):
            self.events = heard.setdefault(seed, [])

        def on_start(self, epochs, history):
            self.events.append(epochs)

        def on_pruning(self, epoch, removed):
            self.events.append(removed)

        def on_end(self, result):
            self.events.append(result)

        def close(self):
            self.events.append("closed")

    def callbacks(seed):
        return [Heard(seed), JSONLines(tmp_path / f"{seed}.jsonl")]

    replicas = bmrs.fit_ensemble(make(), problem(), seeds=SEEDS, callbacks=callbacks, **QUICK)
    for replica in replicas:
        events = heard[replica.seed]
        assert events[0] == 11
        removed = sum(int((~mask).sum()) for mask in replica.result.masks.values())
        assert sum(sum(counts.values()) for counts in events[1:-2]) == removed
        assert events[-2] is replica.result
        assert events[-1] == "closed"
        lines = (tmp_path / f"{replica.seed}.jsonl").read_text().splitlines()
        assert [json.loads(line) for line in lines] == replica.result.history


@pytest.mark.slow
def test_the_progress_bar_shows_means(capsys):
    bmrs.fit_ensemble(make(), problem(), problem(50), seeds=(0, 1), **{**QUICK, "progress": True})
    assert "11/11" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("epochs", [(0, 2), (2, 0), (0, 0)])
def test_either_phase_may_be_left_out(epochs):
    settings = {**QUICK, "epochs": epochs[0], "fine_tune_epochs": epochs[1]}
    together = bmrs.fit_ensemble(make(), problem(), seeds=(0, 1), **settings)
    assert_same(together, apart(make(), (0, 1), problem(), **settings))


@pytest.mark.slow
def test_frozen_weights_and_a_likelihood_with_parameters():
    class Gaussian(nn.Module):
        def __init__(self):
            super().__init__()
            self.log_scale = nn.Parameter(torch.zeros(()))

        def forward(self, output):
            return torch.distributions.Normal(output.squeeze(-1), self.log_scale.exp())

    def made():
        net = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), bmrs.MultiplicativeNoise(9), nn.Linear(9, 1))
        net[0].weight.requires_grad_(False)
        model = bmrs.NoisyNetwork(net, likelihood=Gaussian()).double()
        return model, MedianGuide(model).double()

    x, _ = problem()
    data = ((x, x[:, 0].sin()), (x, x[:, 0].sin()))
    together = bmrs.fit_ensemble(made, *data, seeds=SEEDS, **QUICK)
    assert_same(together, apart(made, SEEDS, *data, **QUICK))
    assert together[0].model.likelihood.log_scale != together[1].model.likelihood.log_scale


def test_bad_numbers_name_seed_and_step():
    def made():
        model, guide = make()()
        if torch.initial_seed() == 7:
            with torch.no_grad():
                model.net[3].bias[0] = math.inf
        return model, guide

    with pytest.raises(ValueError, match=r"seed 7: a fit cannot begin: weight '3\.bias' is not finite"):
        bmrs.fit_ensemble(made, problem(), seeds=SEEDS, **QUICK)
    with pytest.raises(
        FloatingPointError, match=r"seed 3 failed: the loss became (nan|inf) at step \d+: the (input|likelihood)"
    ):
        bmrs.fit_ensemble(make(dtype=torch.float32), problem(dtype=torch.float32), seeds=SEEDS, **{**QUICK, "lr": 1e37})


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"pruning": bmrs.PostTraining()}, TypeError, "pruning must be Continuous"),
        ({"pruning": bmrs.Continuous(shrink=True)}, ValueError, "leave shrink out"),
        ({"seeds": ()}, ValueError, "seeds must be one or more"),
        ({"seeds": (1, 1)}, ValueError, "seeds must be one or more different"),
        ({"batch_size": 0}, ValueError, "batch_size must be a positive integer"),
        ({"lr": -1.0}, ValueError, "lr must be a positive number"),
        ({"fine_tune_epochs": -1}, ValueError, "fine_tune_epochs must not be negative"),
    ],
)
def test_errors(changes, error, message):
    with pytest.raises(error, match=message):
        bmrs.fit_ensemble(make(), problem(), **{"seeds": SEEDS, **QUICK, **changes})


def test_replicas_must_be_alike():
    sizes = iter((8, 9))

    def growing():
        size = next(sizes)
        net = nn.Sequential(nn.Linear(6, size), bmrs.MultiplicativeNoise(size), nn.Linear(size, 3))
        model = bmrs.NoisyNetwork(net)
        return model, bmrs.TruncatedLogNormalGuide(model)

    with pytest.raises(ValueError, match=r"'model.net.0.weight' is \(\(8, 6\).* in number 2"):
        bmrs.fit_ensemble(growing, problem(dtype=torch.float32), seeds=(0, 1), **QUICK)
    weights = iter((1.0, 2.0))

    def heavier():
        return make(kl_weight=next(weights))()

    with pytest.raises(ValueError, match="one kl_weight"):
        bmrs.fit_ensemble(heavier, problem(), seeds=(0, 1), **QUICK)


def test_a_stack_and_its_modules_share_tensors_until_released():
    modules = [nn.BatchNorm1d(4) for _ in range(3)]
    stack = Stack(modules)
    with torch.no_grad():
        stack.parameters["weight"][1] = 5
        modules[2].running_mean += 1
    assert (modules[1].weight == 5).all()
    assert (stack.constants["running_mean"][2] == 1).all()
    stack.release()
    with torch.no_grad():
        stack.parameters["weight"][1] = 6
    assert (modules[1].weight == 5).all()


@pytest.mark.gpu
@pytest.mark.parametrize("granularity", ["shared", "example", "batch", "element"])
def test_on_a_gpu(granularity):
    settings = {**QUICK, "granularity": granularity, "device": "cuda"}
    together = bmrs.fit_ensemble(make(), problem(), problem(50), seeds=SEEDS, **settings)
    alone = apart(make(), SEEDS, problem(), problem(50), **settings)
    assert together[0].model.net[0].weight.is_cuda
    assert_same(together, alone)


@pytest.mark.gpu
def test_bad_numbers_on_a_gpu_name_seed_and_step():
    settings = {**QUICK, "device": "cuda", "lr": 1e37}
    with pytest.raises(FloatingPointError, match=r"the replica of seed \d failed: .* step \d+"):
        bmrs.fit_ensemble(make(dtype=torch.float32), problem(dtype=torch.float32), seeds=SEEDS, **settings)


def beta():
    noise = bmrs.MultiplicativeNoise(8, prior=dist.Beta(1.0, 1.0))
    model = bmrs.NoisyNetwork(nn.Sequential(nn.Linear(6, 8), nn.Tanh(), noise, nn.Linear(8, 3))).double()
    return model, bmrs.BetaGuide(model)


@pytest.mark.slow
@pytest.mark.parametrize("granularity", thinned(["shared", "example", "batch", "element"], keep=["shared"]))
def test_beta_noise_is_fitted_at_once_as_one_by_one(granularity):
    settings = {**QUICK, "epochs": 20, "granularity": granularity}
    alone = []
    for seed in range(3):
        torch.manual_seed(seed)
        alone.append(bmrs.fit(*beta(), problem(), seed=seed, **settings).history[-1]["loss"])
    together = [
        each.result.history[-1]["loss"] for each in bmrs.fit_ensemble(beta, problem(), seeds=range(3), **settings)
    ]
    assert together == pytest.approx(alone, rel=0.2)
