import functools
import math
from itertools import pairwise

import processes
import pyro
import pyro.distributions as dist
import pytest
import torch
from nets import blobs, small_classifier
from processes import data
from torch import nn

import pyro_bmrs as bmrs
from pyro_bmrs.svi.compiled import CompiledStep
from pyro_bmrs.svi.devices import resolve_device

QUICK = {"epochs": 6, "fine_tune_epochs": 2, "batch_size": 50, "lr": 1e-2, "seed": 0, "progress": False}


@pytest.mark.slow
def test_prunes_what_is_irrelevant_and_keeps_accuracy():
    x, y = blobs(600)
    model, guide = small_classifier(hidden=32)
    result = bmrs.fit(
        model, guide, (x[:500], y[:500]), (x[500:], y[500:]), **{**QUICK, "epochs": 40, "fine_tune_epochs": 20}
    )
    assert result.compression > 0.4
    assert result.history[-1]["accuracy_validation"] > 0.9
    assert model.num_data is None


@pytest.mark.slow
def test_history_and_masks_agree_with_the_surgery():
    x, y = blobs()
    model, guide = small_classifier()
    seen = []

    class Seen(bmrs.Callback):
        def on_epoch_end(self, record):
            seen.append(record)

    result = bmrs.fit(model, guide, (x, y), (x, y), callbacks=[Seen()], **{**QUICK, "epochs": 30})
    small = bmrs.compact(model, guide, result.masks, x[:4])
    assert result.history == seen
    assert [entry["phase"] for entry in seen] == ["noisy"] * 30 + ["fine-tune"] * 2
    assert seen[-1]["parameters"] == bmrs.count_parameters(small)
    assert result.compression == pytest.approx(1 - seen[-1]["parameters"] / bmrs.count_parameters(model.net))
    for site, mask in result.masks.items():
        assert torch.equal(mask, result.scores[site] < 0)
    assert all(later["structures"] <= earlier["structures"] for earlier, later in pairwise(seen))


def test_a_seed_repeats_the_run_and_leaves_the_callers_random_state_alone():
    x, y = blobs()
    runs = []
    for _ in range(2):
        model, guide = small_classifier()
        torch.manual_seed(5)
        bmrs.fit(model, guide, (x, y), **QUICK)
        runs.append([*(p.detach() for p in (*model.parameters(), *guide.parameters())), torch.rand(3)])
    torch.testing.assert_close(runs[0], runs[1], rtol=0, atol=0)
    torch.manual_seed(5)
    assert torch.equal(runs[0][-1], torch.rand(3))


@pytest.mark.slow
def test_removed_structures_keep_the_posterior_they_were_removed_for():
    x, y = blobs()
    model, guide = small_classifier()
    result = bmrs.fit(
        model, guide, (x, y), criterion=bmrs.BMRS_N(prior_log_odds=math.log(3)), **{**QUICK, "epochs": 30}
    )
    site = "2.theta"
    removed = ~result.masks[site]
    assert removed.any()
    now = bmrs.evidence_changes(guide)[site] + math.log(3)
    torch.testing.assert_close(now[removed], result.scores[site][removed])


@pytest.mark.slow
@pytest.mark.parametrize("granularity", ["shared", "example", "batch", "element"])
def test_all_granularities_train(granularity):
    x, y = blobs()
    model, guide = small_classifier()
    result = bmrs.fit(model, guide, (x, y), (x, y), granularity=granularity, **{**QUICK, "epochs": 40})
    assert result.history[-1]["accuracy_validation"] > 0.8


def test_learning_rates_are_separate_and_decay():
    x, y = blobs()
    model, guide = small_classifier()
    weights = [p.detach().clone() for p in model.net.parameters()]
    posterior = guide.loc.detach().clone()
    bmrs.fit(model, guide, (x, y), criterion=None, posterior_lr=1e-12, **QUICK)
    assert torch.allclose(guide.loc, posterior, atol=1e-8)
    assert not any(torch.allclose(old, new) for old, new in zip(weights, model.net.parameters(), strict=True))


def test_kl_warm_up_ends_at_the_models_weight():
    x, y = blobs()

    def first_kl(warmup):
        model, guide = small_classifier(kl_weight=5.0)
        result = bmrs.fit(model, guide, (x, y), criterion=None, kl_warmup_epochs=warmup, **QUICK)
        assert model.kl_weight == 5.0
        return result.history[0]["kl"]

    assert first_kl(warmup=6) > first_kl(warmup=0)


def test_fine_tuning_leaves_the_posterior_alone():
    x, y = blobs()
    model, guide = small_classifier()
    before = guide.loc.detach().clone()
    bmrs.fit(model, guide, (x, y), **{**QUICK, "epochs": 0})
    assert torch.equal(guide.loc, before)


def test_continuous_pruning_keeps_its_schedule():
    x, y = blobs()
    model, guide = small_classifier()

    class Everything(bmrs.Criterion):
        def scores(self, context):
            return {site: torch.ones(size) for site, size in context.model.sizes.items()}

    with pytest.warns(RuntimeWarning, match="'2.theta' has lost all its structures"):
        result = bmrs.fit(model, guide, (x, y), criterion=Everything(), pruning=bmrs.Continuous(start=3), **QUICK)
    assert [entry["structures"] for entry in result.history] == [16, 16] + [0] * 6
    assert [epoch for epoch in range(1, 10) if bmrs.Continuous(start=3, every=4).is_due(epoch)] == [3, 7]
    assert [epoch for epoch in range(1, 10) if bmrs.Continuous(start=3, every=2, stop=6).is_due(epoch)] == [3, 5]
    assert [epoch for epoch in range(1, 6) if bmrs.Continuous().is_due(epoch, kl_warmup_epochs=3)] == [4, 5]


@pytest.mark.slow
def test_shrinking_while_training_is_masking():
    x, y = data()
    fits = []
    for shrink in (False, True):
        model, guide = processes.build(processes.MedianGuide)
        pruning = bmrs.Continuous(start=2, shrink=shrink)
        seen = Diary()
        result = bmrs.fit(
            model, guide, (x, y), (x, y), criterion=LowestMean(), pruning=pruning, callbacks=[seen], **QUICK
        )
        small = bmrs.compact(model, guide, None, x[:4])
        history = [{k: v for k, v in entry.items() if k != "seconds"} for entry in result.history]
        fits.append((small(x), result.masks, history, seen.removed))
        assert sum(p.numel() for p in small.parameters()) == result.history[-1]["parameters"]
        if shrink:
            assert bmrs.count_parameters(model.net) == result.history[-1]["parameters"]
    torch.testing.assert_close(*(each[:2] for each in fits), rtol=0, atol=1e-9)
    for masked, shrunk in zip(fits[0][2], fits[1][2], strict=True):
        for name in ("phase", "recall_validation"):
            assert masked.pop(name) == shrunk.pop(name)
        assert masked == pytest.approx(shrunk, rel=1e-9)
    assert fits[0][3] == fits[1][3]
    assert sum(count for _, removed in fits[0][3] for count in removed.values()) > 10


@pytest.mark.slow
def test_compiled_fits_prune_and_end_as_others_do(monkeypatch):
    """With the graph run as it is: what inductor makes of it is tested on its own."""
    monkeypatch.setattr("pyro_bmrs.svi.compiled.CompiledStep", functools.partial(CompiledStep, backend="eager"))
    x, y = data()
    fits = []
    for compiled in (False, True):
        model, guide = processes.build(processes.MedianGuide)
        result = bmrs.fit(model, guide, (x, y), (x, y), criterion=LowestMean(), compile=compiled, **QUICK)
        fits.append((bmrs.predict(model, guide, x), result.masks, result.scores))
    torch.testing.assert_close(*fits, rtol=0, atol=1e-9)
    assert not all(mask.all() for mask in result.masks.values())


def test_what_is_not_compiled_says_so():
    x, y = blobs()
    model, guide = small_classifier()
    with pytest.warns(RuntimeWarning, match="going on uncompiled: a compiled step runs in one process"):
        bmrs.fit(model, guide, (x, y), precision="bf16-mixed", compile=True, **QUICK)
    with pytest.raises(ValueError, match="compile and shrink exclude each other"):
        bmrs.fit(model, guide, (x, y), pruning=bmrs.Continuous(shrink=True), compile=True, **QUICK)


class LowestMean(bmrs.Criterion):
    """Removes two structures of each site at every pruning, those with the smallest noise."""

    def scores(self, context):
        means = {
            site: mean.masked_fill(~context.model.masks[site], math.inf) for site, mean in context.guide.mean().items()
        }
        return {site: mean.topk(2, largest=False).values[-1] - mean for site, mean in means.items()}


class Diary(bmrs.Callback):
    def __init__(self):
        self.removed = []

    def on_pruning(self, epoch, removed):
        self.removed.append((epoch, removed))


@pytest.mark.parametrize("stop", [True, False])
def test_post_training_pruning_removes_by_score_level_by_level(stop):
    x, y = blobs()
    model, guide = small_classifier()
    schedule = bmrs.PostTraining(levels=(0.25, 0.5, 0.75, 1.0), stop=stop)

    class FirstTen(bmrs.Criterion):
        def scores(self, context):
            return {site: 9.5 - torch.arange(size) for site, size in context.model.sizes.items()}

    if stop:
        result = bmrs.fit(model, guide, (x, y), criterion=FirstTen(), pruning=schedule, **QUICK)
    else:
        with pytest.warns(RuntimeWarning, match="lost all"):
            result = bmrs.fit(model, guide, (x, y), criterion=FirstTen(), pruning=schedule, **QUICK)
    levels = [entry["structures"] for entry in result.history if entry["phase"] == "post-training"]
    assert levels == ([12, 8, 6] if stop else [12, 8, 4, 0])
    if stop:
        assert result.masks["2.theta"].tolist() == [False] * 10 + [True] * 6


@pytest.mark.slow
def test_a_normal_regression():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(400, 5, generator=generator)
    y = torch.sin(2 * x[:, 0]) + x[:, 1] + 0.1 * torch.randn(400, generator=generator)

    class NormalLikelihood(nn.Module):
        def __init__(self):
            super().__init__()
            self.log_scale = nn.Parameter(torch.zeros(()))

        def forward(self, output):
            return dist.Normal(output.squeeze(-1), self.log_scale.exp())

    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 32), nn.Tanh(), bmrs.MultiplicativeNoise(32), nn.Linear(32, 1))
    model = bmrs.NoisyNetwork(net, likelihood=NormalLikelihood())
    guide = bmrs.TruncatedLogNormalGuide(model)
    settings = {**QUICK, "epochs": 60, "fine_tune_epochs": 20}
    result = bmrs.fit(model, guide, (x[:300], y[:300]), (x[300:], y[300:]), **settings)
    small = bmrs.compact(model, guide, result.masks, x[:3])
    residual = small(x[300:]).squeeze(-1) - y[300:]
    assert residual.square().mean() < 0.1 * y[300:].var()
    assert result.compression > 0.2
    assert model.likelihood.log_scale.exp() < 0.5
    assert "accuracy_validation" not in result.history[-1]
    assert result.history[-1]["log_likelihood_validation"] > -1


def test_global_settings_are_left_alone():
    x, y = blobs()
    model, guide = small_classifier()
    pyro.settings.set(validate_distributions_pyro=True)
    before = pyro.settings.get()
    bmrs.fit(model, guide, (x, y), **QUICK)
    assert pyro.settings.get() == before
    assert len(pyro.get_param_store()) == 0


def test_weights_that_explode_stop_the_run():
    model, guide = small_classifier()
    with pytest.raises(FloatingPointError, match=r"at step \d+: .* not finite\. Lower lr"):
        bmrs.fit(model, guide, blobs(), **{**QUICK, "lr": 1e30})


def test_activations_that_overflow_stop_the_run_and_name_the_site():
    x, y = blobs()
    model, guide = small_classifier()
    with torch.no_grad():
        model.net[0].weight.mul_(1e30)
    with pytest.raises(FloatingPointError, match=r"at step 0: the input of site '2.theta' is not finite"):
        bmrs.fit(model, guide, (x * 1e20, y), **QUICK)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"batch_size": 0}, ValueError, "batch_size must be a positive integer, but got 0"),
        ({"epochs": -1}, ValueError, "epochs must not be negative"),
        ({"lr": 0.0}, ValueError, "lr must be a positive number"),
        ({"posterior_lr": math.nan}, ValueError, "posterior_lr must be a positive number"),
        ({"granularity": "pixel"}, ValueError, "'pixel'"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(change, error, message):
    x, y = blobs()
    model, guide = small_classifier()
    with pytest.raises(error, match=message):
        bmrs.fit(model, guide, (x, y), **{**QUICK, **change})


def test_the_device_is_chosen():
    expected = "cuda" if torch.cuda.is_available() else "cpu"
    assert resolve_device("auto").type == expected
    assert resolve_device("cpu").type == "cpu"


@pytest.mark.gpu
def test_everything_runs_on_a_gpu():
    x, y = blobs()
    model, guide = small_classifier()
    result = bmrs.fit(model, guide, (x, y), (x, y), device="cuda", **{**QUICK, "epochs": 15})
    small = bmrs.compact(model, guide, result.masks, x[:4])
    assert next(small.parameters()).is_cuda
    torch.testing.assert_close(small(x.cuda()), bmrs.predict(model, guide, x.cuda(), result.masks), rtol=0, atol=1e-5)
    assert bmrs.to_arviz(guide) is not None
    for criterion in (bmrs.BMRS_N(), bmrs.BMRS_U(8), bmrs.SNR(), bmrs.WeightNorm(), bmrs.GradientWeightNorm()):
        model, guide = small_classifier()
        bmrs.fit(model, guide, (x, y), criterion=criterion, device="cuda", **QUICK)


@pytest.mark.gpu
def test_figures_and_surgery_take_what_a_gpu_fitted():
    x, y = blobs()
    model, guide = small_classifier()
    result = bmrs.fit(model, guide, (x, y), device="cuda", **QUICK)
    site, posterior = next(iter(guide.posterior().items()))
    q = bmrs.TruncatedLogNormal(*(getattr(posterior, name)[0].detach() for name in posterior.arg_constraints))
    p = bmrs.LogUniform(torch.tensor(-20.0, device="cuda"), torch.tensor(0.0, device="cuda"))
    delta_f = bmrs.evidence_changes(guide)
    assert bmrs.plot_reduction(q, p, bmrs.spike(p)) is not None
    assert bmrs.plot_forest(guide) is not None
    assert bmrs.plot_evidence(delta_f, result.masks) is not None
    assert bmrs.plot_evidence_snr(delta_f, {site: posterior.snr}) is not None
    assert bmrs.predict(model, guide, x).is_cuda
    assert bmrs.reduce(guide, model, {site: bmrs.spike(p)}).delta_f[site].is_cuda
