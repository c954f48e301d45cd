"""Ridges, the map of a network, reliability: what is drawn is what was given."""

import matplotlib.pyplot as plt
import numpy as np
import pyro.distributions as dist
import pytest
import torch
from nets import blobs, build, small_classifier
from torch import nn

import pyro_bmrs as bmrs
from pyro_bmrs.inspection.evaluation import PredictiveScores


@pytest.fixture(autouse=True)
def _closed():
    yield
    plt.close("all")


def drawn(ax):
    ax.figure.canvas.draw()
    return [text.get_text() for text in ax.get_yticklabels()]


def test_ridges_are_sorted_by_evidence():
    model, guide, _ = build("mlp")
    site = "fc2_noise.theta"
    model.noise[site].remove(torch.arange(12) < 4)
    ax = bmrs.plot_ridge(guide, site)
    shown = [float(text.replace("\N{MINUS SIGN}", "-")) for text in drawn(ax)]
    expected = bmrs.evidence_changes(guide)[site].sort(descending=True).values
    np.testing.assert_allclose(shown, expected.numpy(), rtol=1e-2)
    assert len(ax.lines) == 12
    for line in ax.lines:  # a density each, 1.8 rows high
        assert np.ptp(line.get_ydata()) == pytest.approx(1.8, rel=2e-2)
    assert "8 of 12 kept" in ax.get_title("right")
    colours = {line.get_color() for line in ax.lines}
    assert len(colours) == 2


def test_a_ridge_is_highest_where_the_posterior_is():
    _, guide, _ = build("mlp")
    with torch.no_grad():
        guide.loc.copy_(torch.linspace(-15, -1, len(guide.loc)))
        guide.log_scale.fill_(-2.0)
    ax = bmrs.plot_ridge(guide)
    site = next(iter(guide.sizes))
    order = bmrs.evidence_changes(guide)[site].argsort(descending=True)
    peaks = [line.get_xdata()[line.get_ydata().argmax()] for line in ax.lines]
    np.testing.assert_allclose(peaks, guide.loc.detach()[: len(order)][order].numpy(), atol=0.1)


def test_large_layers_are_thinned_out_and_any_family_is_drawn():
    noise = bmrs.MultiplicativeNoise(200, dist.Beta(1.0, 1.0))
    guide = bmrs.BetaGuide(bmrs.NoisyNetwork(nn.Sequential(nn.Linear(3, 200), noise, nn.Linear(200, 2)), num_data=9))
    ax = bmrs.plot_ridge(guide)
    assert 30 <= len(ax.lines) <= 60
    assert "of 200 shown" in ax.get_title("right")


def test_the_map_has_a_cell_for_each_structure_and_a_cross_for_each_removed_one():
    delta_f = {"a.theta": torch.tensor([1.0, -5.0, 3.0]), "b_noise.theta": torch.tensor([-2.0, float("nan")])}
    masks = {"a.theta": torch.tensor([True, True, False]), "b_noise.theta": torch.tensor([True, False])}
    ax = bmrs.plot_network(delta_f, masks)
    first, second = (mesh.get_array() for mesh in ax.collections if hasattr(mesh, "get_coordinates"))
    assert first.ravel().tolist() == [3.0, 1.0, -5.0]
    assert second.ravel()[0] == -2.0
    assert second.mask.ravel()[1]
    crosses = [len(each.get_offsets()) for each in ax.collections if not hasattr(each, "get_coordinates")]
    assert crosses == [1, 1]
    assert [tick.get_text() for tick in ax.get_xticklabels()] == ["a", "b"]
    assert {"2 of 3", "1 of 2"} <= {text.get_text() for text in ax.texts}
    assert len(bmrs.plot_network(delta_f).collections) == 4


def test_reliability_is_drawn_bin_by_bin():
    model, guide = small_classifier()
    scores = bmrs.evaluate(model, guide, blobs(100), draws=3).over_draws
    ax = bmrs.plot_reliability(scores)
    known = scores.reliability.labels > 0
    np.testing.assert_allclose(ax.lines[1].get_xdata(), scores.reliability.confidence[known])
    np.testing.assert_allclose(ax.lines[1].get_ydata(), scores.reliability.accuracy[known])
    assert f"{100 * scores.ece:.1f} %" in ax.get_title("right")


@pytest.fixture
def seen():
    """Return what has been noted of a fit that shrinks the network, and its guide."""
    torch.manual_seed(0)
    model, guide = small_classifier()
    noted = bmrs.Trajectories(guide)
    settings = {"epochs": 12, "fine_tune_epochs": 2, "batch_size": 10, "lr": 1e-2, "posterior_lr": 0.5}
    few = {"pruning": bmrs.Continuous(start=4, shrink=True), "criterion": bmrs.BMRS_N(prior_log_odds=1.1)}
    bmrs.fit(model, guide, blobs(150), callbacks=[noted], progress=False, **settings, **few)
    return noted, guide


@pytest.mark.slow
def test_trajectories_are_those_of_the_guide(seen):
    noted, guide = seen
    assert noted.epochs == list(range(1, 13))
    assert set(noted.quantities) == {"delta_f", "loc", "log_scale"}
    site, layer = next(iter(guide.noise.items()))
    loc = noted.of("loc")[site]
    assert loc.shape == (12, layer.original_size)
    torch.testing.assert_close(loc[-1][layer.index], guide.loc.detach())
    cut = torch.ones(layer.original_size, dtype=torch.bool)
    cut[layer.index] = False
    assert cut.any()
    assert loc[-1][cut].isnan().all()
    assert loc[0].isfinite().all()
    ax = bmrs.plot_trajectories(noted, site, "log_scale")
    lines = [line for line in ax.lines if len(line.get_xdata()) == 12]
    assert len(lines) == layer.original_size
    np.testing.assert_array_equal(lines[3].get_ydata(), noted.of("log_scale")[site][:, 3].numpy())
    assert bmrs.plot_trajectories(noted).get_yscale() == "symlog"


def test_forests_stand_side_by_side_on_one_scale():
    guides = {name: small_classifier()[1] for name in ("first", "second")}
    with torch.no_grad():
        guides["second"].loc.fill_(-15.0)
    axes = bmrs.plot_forests(guides)
    assert [ax.get_title("right") for ax in axes] == ["first", "second"]
    assert axes[0].get_xlim() == axes[1].get_xlim()
    assert axes[0].get_xlim()[0] < -15
    with pytest.raises(ValueError, match="one of axes each"):
        bmrs.plot_forests(guides, axes=axes[:1])
    with pytest.raises(TypeError, match="map names to guides"):
        bmrs.plot_forests(3)


def test_they_draw_on_given_axes_and_refuse_nonsense():
    model, guide = small_classifier()
    _, ax = plt.subplots()
    assert bmrs.plot_ridge(guide, ax=ax) is ax
    for call, error, message in (
        (lambda: bmrs.plot_ridge(guide, "nowhere"), ValueError, "nowhere"),
        (lambda: bmrs.plot_ridge(model), TypeError, "guide must be"),
        (lambda: bmrs.plot_network(3), TypeError, "delta_f must map"),
        (lambda: bmrs.plot_network({"a": torch.ones(2)}, {"a": torch.ones(3, dtype=torch.bool)}), ValueError, "shape"),
        (lambda: bmrs.plot_trajectories(bmrs.Trajectories(guide)), ValueError, "noted nothing"),
        (lambda: bmrs.plot_trajectories(3), TypeError, "trajectories must be"),
        (lambda: bmrs.Trajectories(3), TypeError, "guide must be"),
        (lambda: bmrs.plot_reliability(3), TypeError, "scores must be"),
        (lambda: bmrs.plot_reliability(PredictiveScores(-1.0)), ValueError, "not labels"),
        (lambda: bmrs.plot_ridge(guide, ax=3), TypeError, "ax must be"),
    ):
        with pytest.raises(error, match=message):
            call()
