"""What a fit leaves behind: nothing but fitted weights, whether it ends well or not."""

import copy
import math
import signal
import threading
import warnings

import pyro
import pytest
import torch
from nets import blobs, small_classifier
from torch import nn

import pyro_bmrs as bmrs

QUICK = {"epochs": 3, "fine_tune_epochs": 1, "batch_size": 50, "lr": 1e-2, "progress": False}


def around(model, guide):
    """Return everything around weights and posterior that a fit might change."""
    return (
        [module.training for module in (*model.modules(), *guide.modules())],
        [p.requires_grad for p in (*model.parameters(), *guide.parameters())],
        model.num_data,
        torch.get_rng_state().tolist(),
        list(pyro.poutine.runtime._PYRO_STACK),
        torch.is_grad_enabled(),
        torch.distributions.Distribution._validate_args,
        torch.backends.mha.get_fastpath_enabled(),
        pyro.infer.is_validation_enabled(),
        pyro.poutine.is_validation_enabled(),
    )


class Interrupt(bmrs.Callback):
    def __init__(self, where, error=KeyboardInterrupt):
        self.where, self.error = where, error

    def on_start(self, epochs, history):
        self.stop("start")

    def on_pruning(self, epoch, removed):
        self.stop("pruning")

    def on_epoch_end(self, record):
        self.stop(f"epoch {record['epoch']}")

    def on_end(self, result):
        self.stop("end")

    def stop(self, where):
        if where == self.where:
            raise self.error


@pytest.mark.parametrize("where", ["start", "pruning", "epoch 1", "epoch 4", "end"])
@pytest.mark.parametrize("seed", [None, 3])
def test_an_interruption_leaves_modes_gradients_and_random_state_as_they_were(where, seed):
    x, y = blobs()
    model, guide = small_classifier()
    model.train()
    model.net[1].eval()
    model.net[0].bias.requires_grad_(False)
    before = around(model, guide)
    with pytest.raises(KeyboardInterrupt):
        bmrs.fit(model, guide, (x, y), callbacks=[Interrupt(where)], seed=seed, **QUICK)
    assert around(model, guide) == before


class Switches(bmrs.Callback):
    """Is interrupted while it throws every switch that there is."""

    def on_epoch_end(self, record):
        torch.set_grad_enabled(False)
        torch.backends.mha.set_fastpath_enabled(not torch.backends.mha.get_fastpath_enabled())
        pyro.enable_validation(not pyro.infer.is_validation_enabled())
        raise KeyboardInterrupt


def test_an_interruption_while_a_switch_is_thrown_leaves_it_as_it_was():
    model, guide = small_classifier()
    before = around(model, guide)
    with pytest.raises(KeyboardInterrupt):
        bmrs.fit(model, guide, blobs(), callbacks=[Switches()], **QUICK)
    assert around(model, guide) == before


class Interrupted(bmrs.TruncatedLogNormalGuide):
    """Is interrupted inside a step, below Pyro's handlers."""

    def draw(self, sample_shape=()):
        raise KeyboardInterrupt


def test_an_interruption_inside_a_step_poisons_nothing():
    x, y = blobs()
    model, _ = small_classifier()
    guide = Interrupted(model)
    before = around(model, guide)
    with pytest.raises(KeyboardInterrupt):
        bmrs.fit(model, guide, (x, y), **QUICK)
    assert around(model, guide) == before
    fresh, posterior = small_classifier()
    assert math.isfinite(bmrs.fit(fresh, posterior, (x, y), **QUICK).history[-1]["loss"])


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="needs the system's timer")
@pytest.mark.parametrize("seconds", [0.005, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3])
def test_an_interruption_at_any_moment_leaves_everything_as_it_was(seconds):
    def interrupt(*_):
        raise KeyboardInterrupt

    bmrs.fit(*small_classifier(), blobs(), **QUICK)  # what is imported on first use would leave files open
    model, guide = small_classifier()
    before, handler = around(model, guide), signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, seconds, 5)  # and again: Python drops what a finalizer raises
    try:
        with pytest.raises(KeyboardInterrupt):
            bmrs.fit(model, guide, blobs(), **{**QUICK, "epochs": 10**6})
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
    assert around(model, guide) == before


REFUSED = {
    "data": {"train": (torch.zeros(3, 6), torch.zeros(4))},
    "criterion": {"criterion": "BMRS_N"},
    "labels": {"train": (torch.zeros(3, 6), torch.tensor([0, 1, 7]))},
    "device": {"device": "tpu"},
}


@pytest.mark.parametrize("change", REFUSED.values(), ids=REFUSED)
def test_a_refused_fit_changes_nothing(change, tmp_path):
    model, guide = small_classifier()
    before, weights = around(model, guide), copy.deepcopy((model.state_dict(), guide.state_dict()))
    with pytest.raises((TypeError, ValueError)):
        bmrs.fit(model, guide, **{"train": blobs(), "folder": tmp_path / "run", **QUICK, **change})
    assert around(model, guide) == before
    torch.testing.assert_close((model.state_dict(), guide.state_dict()), weights, rtol=0, atol=0)
    assert not model.fitted
    assert not list(tmp_path.iterdir())


def fitted(num_data=None, train=None, **changes):
    model, guide = small_classifier(num_data=num_data)
    result = bmrs.fit(model, guide, train or blobs(), **{**QUICK, "seed": 0, **changes})
    return model, guide, result


def test_the_number_of_examples_leaves_with_the_fit():
    model, _, result = fitted()
    assert model.num_data is None
    again, guide = small_classifier()
    with pytest.raises(ValueError, match="outside the 3 classes"):  # of 2,000 examples
        bmrs.fit(again, guide, (torch.randn(2000, 6), torch.full((2000,), 9)), **QUICK)
    after = bmrs.fit(again, guide, blobs(), seed=0, **QUICK)
    assert [each["loss"] for each in after.history] == [each["loss"] for each in result.history]


def test_a_number_of_examples_of_ones_own_counts_and_is_said():
    with pytest.warns(bmrs.FitWarning, match="num_data of the model is 17, but train has 200 examples"):
        model, _, _ = fitted(num_data=17)
    assert model.num_data == 17
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "the fit has ended")
        fitted(num_data=200)


@pytest.mark.slow
def test_a_fit_of_a_fitted_model_says_that_it_goes_on():
    model, guide, _ = fitted()
    with pytest.warns(bmrs.FitWarning, match="fitted before: this fit goes on from there"):
        bmrs.fit(model, guide, blobs(), **QUICK)
    model, guide = small_classifier()
    with pytest.raises(KeyboardInterrupt):
        bmrs.fit(model, guide, blobs(), callbacks=[Interrupt("epoch 1")], **QUICK)
    with pytest.warns(bmrs.FitWarning, match="fitted before"):
        bmrs.fit(model, guide, blobs(), **QUICK)


@pytest.mark.slow
def test_fits_in_threads_are_those_one_after_the_other():
    pairs = [small_classifier() for _ in range(3)]
    threads = [
        threading.Thread(target=bmrs.fit, args=(*pair, blobs()), kwargs={**QUICK, "seed": seed})
        for seed, pair in enumerate(pairs)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed, (_, guide) in enumerate(pairs):
        assert torch.equal(guide.loc, fitted(seed=seed)[1].loc)


class FitAgain(bmrs.Callback):
    def __init__(self, model, guide):
        self.pair = model, guide

    def on_epoch_end(self, record):
        bmrs.fit(*self.pair, blobs(), seed=5, **QUICK)


@pytest.mark.slow
def test_a_fit_inside_a_callback_is_right_and_of_the_same_model_refused():
    expected = fitted()[1].loc
    model, guide = small_classifier()
    other = small_classifier()
    with pytest.warns(bmrs.FitWarning, match="fitted before"):  # the other one, from its second fit on
        bmrs.fit(model, guide, blobs(), seed=0, callbacks=[FitAgain(*other)], **QUICK)
    assert torch.equal(guide.loc, expected)
    model, guide = small_classifier()
    with pytest.raises(RuntimeError, match="this model is being fitted already"):
        bmrs.fit(model, guide, blobs(), callbacks=[FitAgain(model, guide)], **QUICK)


def ended(**changes):
    """Return what a fit says at its end."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fitted(**changes)
    found = [str(each.message) for each in caught if str(each.message).startswith("the fit has ended")]
    assert len(found) <= 1
    return found[0] if found else ""


@pytest.mark.slow
def test_a_fit_that_prunes_well_says_nothing():
    assert ended(epochs=60, fine_tune_epochs=20, batch_size=20) == ""


def test_nothing_pruned_is_said_with_what_to_turn():
    text = ended()
    assert "none of 16 structures was removed (the closest scores -" in text
    assert "Train for at least 160 steps with noise (now 12), raise posterior_lr (now 0.5) or kl_weight (now 1)" in text
    assert text.count("Train for") == 1
    assert "the criterion was never asked" in ended(kl_warmup_epochs=10)
    assert "structures was removed" not in ended(criterion=None)


class Everything(bmrs.Criterion):
    def scores(self, context):
        return {site: torch.ones(size) for site, size in context.model.sizes.items()}


@pytest.mark.filterwarnings("ignore:.* has lost all its structures")
def test_everything_pruned_is_said():
    text = ended(criterion=Everything())
    assert "only 0 of 16 structures are left, none of '2.theta'" in text
    assert "Lower kl_weight (now 1)" in text


@pytest.mark.parametrize("validation", [None, blobs(100, seed=1)])
def test_an_accuracy_below_the_largest_class_is_said(validation):
    x, _ = blobs()
    y = torch.zeros(200, dtype=torch.long)
    y[:20] = 1
    text = ended(
        train=(x, y), validation=validation and (validation[0], y[100:]), epochs=1, fine_tune_epochs=0, lr=1e-9
    )
    assert "is below the" in text
    assert "% of always naming the most frequent class" in text


def test_a_posterior_that_has_hardly_moved_is_said():
    text = ended(posterior_lr=1e-4)
    assert "the posterior has hardly moved from where it began (median change: loc " in text
    assert "hardly moved" not in ended()


def test_an_ensemble_gives_one_warning():
    with pytest.warns(bmrs.FitWarning, match=r"2 of 2 replicas \(0, 1\) there is little to show, .* seed 0"):
        bmrs.fit_ensemble(small_classifier, blobs(), seeds=(0, 1), **QUICK)


def test_all_weights_frozen():
    model, guide = small_classifier()
    model.requires_grad_(False)
    before = copy.deepcopy(model.net[0].weight)
    with pytest.raises(ValueError, match="all weights of the model are frozen, so 1 epochs without noise"):
        bmrs.fit(model, guide, blobs(), **QUICK)
    bmrs.fit(model, guide, blobs(), **{**QUICK, "fine_tune_epochs": 0})
    assert torch.equal(model.net[0].weight, before)
    guide.loc.requires_grad_(False)
    with pytest.raises(ValueError, match="parameters of the guide are frozen"):
        bmrs.fit(model, guide, blobs(), **{**QUICK, "fine_tune_epochs": 0})


def test_a_network_without_weights_is_fitted():
    model = bmrs.NoisyNetwork(nn.Sequential(bmrs.MultiplicativeNoise(6)))
    settings = {**QUICK, "fine_tune_epochs": 0, "unremovable": "mask"}
    result = bmrs.fit(model, bmrs.TruncatedLogNormalGuide(model), blobs(), **settings)
    assert result.compression == 0.0


class Unused(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.noise, self.spare = nn.Linear(6, 3), bmrs.MultiplicativeNoise(3), bmrs.MultiplicativeNoise(3)

    def forward(self, x):
        return self.noise(self.layer(x))


def test_noise_that_is_never_used_is_refused():
    model = bmrs.NoisyNetwork(Unused())
    with pytest.raises(ValueError, match=r"noise layer of 'spare.theta' does not run in a forward pass"):
        bmrs.fit(model, bmrs.TruncatedLogNormalGuide(model), blobs(), **QUICK)


def test_weights_that_are_not_finite_are_refused_before_training():
    model, guide = small_classifier()
    model.net[0].weight.data[0, 0] = math.nan
    with pytest.raises(ValueError, match=r"a fit cannot begin: weight '0.weight' is not finite"):
        bmrs.fit(model, guide, blobs(), **QUICK)
    model, guide = small_classifier()
    guide.loc.data[3] = math.inf
    with pytest.raises(ValueError, match=r"a fit cannot begin: posterior loc of site '2.theta'"):
        bmrs.fit(model, guide, blobs(), **QUICK)
