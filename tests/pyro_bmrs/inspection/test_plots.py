import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from nets import blobs, build, small_classifier

import pyro_bmrs as bmrs


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


@pytest.fixture
def guide():
    model, guide, _ = build("mlp")
    model.noise["fc2_noise.theta"].remove(torch.arange(12) < 4)
    return guide


def check_labels(ax):
    ax.figure.canvas.draw()
    for label in (ax.get_xlabel(), ax.get_ylabel()):
        assert label


@pytest.mark.slow
@pytest.mark.parametrize("reduced", [bmrs.spike, bmrs.precision_window])
@pytest.mark.parametrize(("loc", "scale"), [(-1.0, 0.05), (-9.0, 100.0), (-25.0, 1.0), (3.0, 1e-3)])
def test_reduction(reduced, loc, scale):
    prior = bmrs.LogUniform()
    posterior = bmrs.TruncatedLogNormal(torch.tensor(loc), torch.tensor(scale))
    ax = bmrs.plot_reduction(posterior, prior, reduced(prior))
    check_labels(ax)
    assert "nats" in ax.get_title()
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["posterior", "prior", "reduced prior"]


def test_density_drawn_integrates_to_one():
    prior = bmrs.LogUniform()
    ax = bmrs.plot_reduction(bmrs.TruncatedLogNormal(torch.tensor(-3.0), torch.tensor(0.7)), prior, bmrs.spike(prior))
    x, density = ax.lines[0].get_data()
    assert float(torch.trapezoid(torch.as_tensor(density), torch.as_tensor(x))) == pytest.approx(1, abs=1e-3)


def test_forest(guide):
    ax = bmrs.plot_forest(guide)
    check_labels(ax)
    assert [label.get_text() for label in ax.get_yticklabels()] == [
        "fc1\n12 of 12", "fc2\n8 of 12", "fc3\n12 of 12",
    ]  # fmt: skip
    assert [text.get_text() for text in ax.texts] == ["4 removed"]


def test_evidence_by_layer(guide):
    ax = bmrs.plot_evidence(bmrs.evidence_changes(guide), guide.split(guide.keep), prior_log_odds=1.1)
    check_labels(ax)
    assert "nats" in ax.get_ylabel()
    assert "8 of 12 kept" in ax.get_xticklabels()[1].get_text()
    assert any(line.get_ydata()[0] == -1.1 for line in ax.lines if len(line.get_ydata()))


def test_evidence_against_snr(guide):
    snr = {site: posterior.snr for site, posterior in guide.posterior().items()}
    check_labels(bmrs.plot_evidence_snr(bmrs.evidence_changes(guide), snr))


def test_history():
    history = [
        {"epoch": i + 1, "phase": "noisy" if i < 3 else "fine-tune", "compression": 0.1 * i, "accuracy_validation": 0.9}
        for i in range(5)
    ]
    ax = bmrs.plot_history(history)
    check_labels(ax)
    assert list(ax.lines[0].get_ydata()) == pytest.approx([0, 10, 20, 30, 40])
    with pytest.raises(ValueError, match="history is empty"):
        bmrs.plot_history([])


def test_axes_given_are_drawn_on(guide):
    _, ax = plt.subplots()
    assert bmrs.plot_evidence(bmrs.evidence_changes(guide), ax=ax) is ax


def test_the_causes_of_removal_have_colours():
    delta_f = {"a.theta": torch.tensor([0.5, -0.5, -50.0])}
    ax = bmrs.plot_evidence(delta_f, prior_log_odds=1.0)
    colours = {tuple(colour) for colour in ax.collections[0].get_facecolors()}
    assert len(colours) == 3
    labels = [text.get_text() for text in ax.get_legend().get_texts()]
    assert labels[:3] == ["kept", "removed by the evidence", "removed by the prior odds"]
    low, high = ax.get_ylim()
    assert low < -50
    assert high > 0.5


def test_removed_structures_are_hollow():
    delta_f, snr = {"a.theta": torch.tensor([0.5, -50.0, -60.0])}, {"a.theta": torch.tensor([0.3, 3.0, 4.0])}
    ax = bmrs.plot_evidence_snr(delta_f, snr, masks={"a.theta": torch.tensor([False, True, True])})
    full, hollow = ax.collections
    assert (len(full.get_offsets()), len(hollow.get_offsets())) == (2, 1)
    assert len(full.get_facecolors())
    assert not len(hollow.get_facecolors())


@pytest.mark.parametrize(("key", "axes"), [("accuracy_validation", 1), ("rmse_validation", 2)])
def test_history_with_the_dense_network(key, axes):
    history = [{"epoch": i + 1, "phase": "noisy", "compression": 0.1 * i, key: 0.9} for i in range(3)]
    ax = bmrs.plot_history(history, dense=0.5)
    assert len(ax.figure.axes) == axes
    lines = [line for each in ax.figure.axes for line in each.lines]
    assert float(lines[-1].get_ydata()[0]) == (50 if axes == 1 else 0.5)


def test_a_structure_is_named():
    prior = bmrs.LogUniform()
    posterior = bmrs.TruncatedLogNormal(torch.tensor(-9.0), torch.tensor(100.0))
    ax = bmrs.plot_reduction(posterior, prior, bmrs.spike(prior), name="fc1, structure 3")
    assert ax.get_title().startswith("fc1, structure 3\n")
    assert "hardly against" in ax.get_title()


def test_free_form_evidence_is_drawn_beside_the_criterions():
    model, guide = small_classifier()
    data = blobs(60)
    free_form = bmrs.free_form_evidence(model, guide, data)
    delta_f = bmrs.evidence_changes(guide)
    ax = bmrs.plot_evidence(delta_f, free_form=free_form)
    (bars,) = ax.containers
    site = next(iter(delta_f))
    drawn = np.sort(bars.lines[0].get_ydata())
    np.testing.assert_allclose(drawn, np.sort(free_form.delta_f[site].numpy()), rtol=1e-6)
    halves = bmrs.plot_network(delta_f, free_form=free_form).collections[0].get_array()
    assert halves.shape == (len(delta_f[site]), 2)
    np.testing.assert_allclose(np.sort(halves[:, 1]), drawn, rtol=1e-6)
    posterior = guide.posterior()[site]
    one = bmrs.TruncatedLogNormal(*(each[0].detach() for each in (posterior.loc, posterior.scale)), -20.0, 0.0)
    prior, factor = bmrs.LogUniform(), free_form.factors[site].structure(0)
    ax = bmrs.plot_reduction(one, prior, bmrs.spike(prior), free_form=factor)
    assert [line.get_label() for line in ax.lines][-1] == "free-form factor"
    assert "of the free form" in ax.get_title()
    kept = bmrs.to_arviz(model, guide, draws=3, free_form=free_form).constant_data
    np.testing.assert_allclose(kept[f"{site}.delta_f_free_form"].values, free_form.delta_f[site])
    np.testing.assert_allclose(kept[f"{site}.delta_f_free_form_error"].values, free_form.standard_error[site])
    with pytest.raises(TypeError, match="free_form must be what free_form_evidence returned"):
        bmrs.plot_evidence(delta_f, free_form=delta_f)
