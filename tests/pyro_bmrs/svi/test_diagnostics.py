"""What a fit says of its posterior: whether it has moved, come to rest, and left the prior."""

import pytest
import torch
from nets import blobs, small_classifier

import pyro_bmrs as bmrs
from pyro_bmrs.svi.diagnostics import PosteriorWatch

FEW = {"batch_size": 30, "lr": 1e-2, "progress": False, "seed": 0}


def fitted(epochs=40, posterior_lr=0.2, fine_tune_epochs=2, **settings):
    torch.manual_seed(0)
    model, guide = small_classifier()
    settings = {"epochs": epochs, "posterior_lr": posterior_lr, "fine_tune_epochs": fine_tune_epochs, **FEW, **settings}
    return bmrs.fit(model, guide, blobs(150), **settings), guide


@pytest.mark.filterwarnings("ignore::pyro_bmrs.FitWarning")
def test_a_posterior_that_has_hardly_been_trained_is_where_it_began():
    result, _ = fitted(epochs=2, posterior_lr=1e-5)
    found = result.diagnostics
    assert all(mask.all() for mask in found.unmoved.values())
    assert not any(mask.any() for mask in found.moving.values())
    assert "initial value: 16 of 16 structures (2: 16)" in str(found)


@pytest.mark.slow
def test_a_posterior_that_has_come_to_rest_and_one_that_has_not():
    rest, _ = fitted(epochs=60)
    assert not any(mask.any() for mask in rest.diagnostics.unmoved.values())
    assert float(torch.cat(list(rest.diagnostics.moving.values())).float().mean()) < 0.1
    on_its_way, _ = fitted(epochs=10, posterior_lr=0.05, decay=False, kl_warmup_epochs=0)
    assert float(torch.cat(list(on_its_way.diagnostics.moving.values())).float().mean()) > 0.5


@pytest.mark.slow
def test_overlap_is_that_of_the_densities():
    """By quadrature over log theta."""
    result, guide = fitted()
    site, posterior = next(iter(guide.posterior().items()))
    prior = guide.prior()[site]
    x = torch.linspace(-20 + 1e-4, -1e-4, 200_001, dtype=torch.float64)[:, None]
    with torch.no_grad():
        q, p = ((each.log_prob(x.exp().float()).double() + x).exp() for each in (posterior, prior))
    expected = torch.trapezoid(torch.minimum(q, p), x.squeeze(-1), dim=0)
    error = (result.diagnostics.overlap[site].double() - expected).abs()
    assert error.max() < 4 * 0.5 / 200**0.5


def test_bounds_of_the_range_are_seen():
    model, guide = small_classifier()
    with torch.no_grad():
        guide.loc[:3] = 1000.0
        guide.log_scale[5] = -20.0
    found = PosteriorWatch(guide, 1).diagnostics()
    (mask,) = found.at_bound.values()
    assert mask.nonzero().flatten().tolist() == [0, 1, 2, 5]
    assert "at a bound of its range: 4 of" in str(found)
    assert model.sizes.keys() == found.overlap.keys()


@pytest.mark.slow
def test_they_are_in_the_original_numbering_and_three_lines():
    result, guide = fitted(pruning=bmrs.Continuous(start=12, shrink=True), criterion=bmrs.BMRS_N(prior_log_odds=1.1))
    ((site, layer),) = guide.noise.items()
    found = result.diagnostics
    assert layer.size < layer.original_size
    cut = torch.ones(layer.original_size, dtype=torch.bool)
    cut[layer.index] = False
    for each in (found.unmoved, found.moving, found.at_bound, found.overlap):
        assert each[site].shape == (layer.original_size,)
    assert found.overlap[site][cut].isnan().all()
    assert found.overlap[site][~cut].isfinite().all()
    assert not found.moving[site][cut].any()
    assert len(str(found).splitlines()) == 3


@pytest.mark.exhaustive
def test_a_resumed_fit_says_the_same(tmp_path):
    class Stop(bmrs.Callback):
        def __init__(self, after):
            self.after = after

        def on_epoch_end(self, record):
            if record["epoch"] == self.after:
                raise KeyboardInterrupt

    whole, _ = fitted()
    for after in (20, 38, 41):
        folder = tmp_path / str(after)
        with pytest.raises(KeyboardInterrupt):
            fitted(folder=folder, checkpoint_every=1, callbacks=[Stop(after)])
        again, _ = fitted(folder=folder, resume=True)
        for name in ("unmoved", "moving", "at_bound", "overlap"):
            torch.testing.assert_close(
                getattr(again.diagnostics, name), getattr(whole.diagnostics, name), rtol=0, atol=0, equal_nan=True
            )


def test_replicas_have_theirs():
    def make():
        return small_classifier()

    replicas = bmrs.fit_ensemble(make, blobs(150), seeds=(0, 1), epochs=5, fine_tune_epochs=1, progress=False)
    for replica in replicas:
        assert replica.result.diagnostics.overlap.keys() == replica.model.sizes.keys()


@pytest.mark.slow
def test_importance_ratios_are_those_of_the_posterior_when_its_noise_ended(tmp_path):
    result, guide = fitted(epochs=90, fine_tune_epochs=0)
    data = bmrs.to_arviz(guide.model, guide, blobs(150), draws=25)
    assert result.diagnostics.pareto_k == pytest.approx(data.attrs["pareto_k"], abs=1e-3)
    assert f"k-hat of importance ratios {result.diagnostics.pareto_k:.2f}" in str(result.diagnostics)
    tuned, _ = fitted(epochs=90, fine_tune_epochs=2, folder=tmp_path)
    again, _ = fitted(epochs=90, fine_tune_epochs=2, folder=tmp_path, resume=True)
    assert tuned.diagnostics.pareto_k == again.diagnostics.pareto_k
    short, _ = fitted(epochs=30)
    assert short.diagnostics.pareto_k is None
    assert "k-hat" not in str(short.diagnostics)


@pytest.mark.slow
def test_removed_structures_do_not_count_in_importance_ratios():
    """Whatever their posterior is."""
    _, guide = fitted(epochs=40, fine_tune_epochs=0)
    layer = next(iter(guide.noise.values()))
    layer.remove(torch.arange(layer.size) < 3)
    expected = bmrs.to_arviz(guide.model, guide, blobs(150), draws=30).attrs["pareto_k"]
    with torch.no_grad():
        guide.loc[:3] += 5.0
    assert bmrs.to_arviz(guide.model, guide, blobs(150), draws=30).attrs["pareto_k"] == pytest.approx(expected)


def test_few_steps_that_have_removed_something_are_enough():
    class Half(bmrs.Criterion):
        def scores(self, context):
            return {site: torch.arange(size) - size / 2 for site, size in context.model.sizes.items()}

    with pytest.warns(
        bmrs.FitWarning, match=r"none of 16 .*; its posterior could travel 30 nats at most, of the 10 to"
    ):
        fitted(epochs=60, criterion=bmrs.PosteriorMean(1e-9))
    result, _ = fitted(epochs=60, criterion=Half())
    assert result.masks["2.theta"].sum() == 8


@pytest.mark.parametrize(
    ("scores", "pruning", "message"),
    [
        (
            -0.5,
            bmrs.Continuous(),
            r"closest scores -0.5, .* evidence for 16 of them is not positive\. Give it prior_",
        ),
        (0.5, bmrs.ToSize(0.01), r"none of 16 .* though 16 could be: size or levels are too small for any of them\. "),
        (-9.0, bmrs.Continuous(), r"closest scores -9, and 0 removes\)\. Train for more steps"),
    ],
)
def test_nothing_removed_has_its_reason(scores, pruning, message):
    class Fixed(bmrs.EvidenceCriterion):
        def scores(self, context):
            return {site: torch.full((size,), scores) for site, size in context.model.sizes.items()}

    with pytest.warns(bmrs.FitWarning, match=message):
        fitted(epochs=100, criterion=Fixed(), pruning=pruning)


def test_many_removed_at_no_loss_is_no_alarm():
    class Nearly(bmrs.Criterion):
        def scores(self, context):
            return {site: torch.arange(size) - 0.5 for site, size in context.model.sizes.items()}

    model, guide = small_classifier(hidden=60)
    x = torch.randn(150, 6)
    data = x, (x[:, 0] > 0).long()
    settings = {**FEW, "epochs": 100, "fine_tune_epochs": 40, "posterior_lr": 0.2, "criterion": Nearly()}
    result = bmrs.fit(model, guide, data, data, **settings)  # a warning would be an error
    assert result.masks["2.theta"].sum() == 1
    assert result.history[-1]["accuracy_validation"] > 0.9
