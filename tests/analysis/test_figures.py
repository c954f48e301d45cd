import json

import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.colors import to_hex
from matplotlib.text import Text
from synthetic import continuous, post_training, result, sweep

from analysis import figures
from analysis.drawing.figure_style import METHODS, figure_style, panel_grid
from analysis.drawing.published import Point, published
from analysis.drawing.tradeoff import summarise, summary, tradeoff
from analysis.figures import Figures, draw, main, of_current_prior
from analysis.runs.store import read_results

MNIST = ("lenet5", "mnist")
ALL = [(network, dataset) for network in ("mlp", "lenet5") for dataset in ("mnist", "fashion_mnist", "cifar10")]
CELLS = {"one": [MNIST], "three": ALL[1:4], "four": [*ALL[:2], *ALL[3:5]], "five": ALL[1:]}
MAKERS = {
    "tradeoff": (tradeoff, continuous),
    "post_training": (figures.post_training, post_training),
    "rank_heatmaps": (figures.rank_heatmaps, post_training),
    "precision_sweep": (figures.precision_sweep, sweep),
}


@pytest.fixture(autouse=True)
def style():
    with figure_style():
        yield
    plt.close("all")


def overlapping_texts(figure):
    """Return the pairs of visible texts whose boxes have more than a pixel in common."""
    figure.canvas.draw()
    beyond = set()  # ticks outside the limits, which exist but are not drawn
    for axis in (axis for ax in figure.axes for axis in (ax.xaxis, ax.yaxis)):
        low, high = sorted(axis.get_view_interval())
        beyond |= {tick.label1 for tick in axis.get_major_ticks() if not low <= tick.get_loc() <= high}
    texts = [text for text in figure.findobj(Text) if text.get_visible() and text.get_text().strip()]
    texts = [text for text in texts if text not in beyond]
    boxes = [(text.get_text(), text.get_window_extent()) for text in texts]
    return [
        (one, other)
        for i, (one, a) in enumerate(boxes)
        for other, b in boxes[:i]
        if min(a.x1, b.x1) - max(a.x0, b.x0) > 1 and min(a.y1, b.y1) - max(a.y0, b.y0) > 1
    ]


@pytest.mark.slow
@pytest.mark.parametrize("cells", CELLS)
@pytest.mark.parametrize("maker", MAKERS)
def test_texts_do_not_overlap_and_axes_are_labelled(maker, cells):
    make, results = MAKERS[maker]
    runs = results(CELLS[cells])
    figure = make([run for run in runs if run["config"]["seed"] == 0 or run["config"]["network"] == "mlp"])
    assert overlapping_texts(figure) == []
    if maker != "rank_heatmaps":
        assert any("accuracy (%)" in ax.get_ylabel() for ax in figure.axes)
        assert sum("(" in ax.get_xlabel() for ax in figure.axes) == len(CELLS[cells])
    box = figure.get_tightbbox()
    width, height = figure.get_size_inches()
    assert min(box.x0, box.y0, width - box.x1, height - box.y1) >= 0


@pytest.mark.slow
@pytest.mark.parametrize("count", [3, 4, 5])
def test_networks_of_other_shapes_have_a_trade_off_too(count):
    cells = [MNIST, ("lenet5_caffe", "mnist"), ("mlp_inputs", "mnist"), ("mlp_inputs", "cifar10"), ("mlp", "mnist")]
    figure = tradeoff(continuous(cells[:count]))
    assert overlapping_texts(figure) == []
    titles = [ax.get_title() for ax in figure.axes]
    assert titles[-2:] == ["LeNet-5, MNIST", "LeNet-5-Caffe, MNIST"]
    assert titles[-3].startswith("MLP with input noise, ")


def test_methods_look_different_from_each_other_and_the_same_everywhere():
    assert len({(look.colour, look.marker) for look in METHODS.values()}) == len(METHODS)
    for make, results in (MAKERS["tradeoff"], MAKERS["post_training"]):
        lines = make(results([MNIST])).axes[0].lines
        looks = {(to_hex(line.get_color()).upper(), line.get_marker()) for line in lines if line.get_marker() != "None"}
        assert {look for look in looks if look[1] not in ("_", "|")} <= {
            (look.colour.upper(), look.marker) for look in METHODS.values()
        }


def test_points_are_means_and_bars_standard_deviations_over_seeds():
    results = [result(*MNIST, "BMRS_N", seed, 80 + 2 * seed, 98 + 0.1 * seed, "ours") for seed in range(3)]
    point = summarise(results)
    assert (point.compression, point.accuracy) == pytest.approx((82, 98.1))
    assert (point.compression_sd, point.accuracy_sd) == pytest.approx((2, 0.1))
    assert summarise(results[:1]) == Point(pytest.approx(80), pytest.approx(98))
    points = [line for line in tradeoff(results).axes[0].lines if line.get_markersize() == 6.5]
    assert len(points) == 1
    np.testing.assert_allclose(points[0].get_xydata(), [[18, 98.1]])


def test_settings_of_one_method_are_joined_and_other_recipes_are_not():
    runs = [result(*MNIST, "BMRS_N", 0, c, 98, "ours", kl_weight=w) for w, c in ((30.0, 92), (3.0, 80), (100.0, 96))]
    runs.append(result(*MNIST, "BMRS_N", 0, 87, 95, "paper"))
    figure = tradeoff(runs)
    explained = [text.get_text() for text in figure.legends[0].get_texts()]
    assert {"published", "paper's recipe, run here", "our recipe"} <= set(explained)
    assert "paper's recipe, run here" not in [text.get_text() for text in tradeoff(runs[:3]).legends[0].get_texts()]
    lines = figure.axes[0].lines
    joined = [line for line in lines if len(line.get_xdata()) == 3 and line.get_marker() == "o"]
    assert len(joined) == 1
    np.testing.assert_allclose(joined[0].get_xydata()[:, 0], [20, 8, 4])


def test_baselines_are_points_of_their_own_whose_seeds_may_have_other_widths():
    names = [method for method in METHODS if method.startswith("tp_") or method == "scratch"]
    runs = [result(*MNIST, name, seed, 90, 97 + 0.1 * i + seed, "baselines") for i, name in enumerate(names)
            for seed in (0, 1)]  # fmt: skip
    runs.append(result(*MNIST, "tp_taylor", 0, 90, 98.9, "baselines"))
    for i, run in enumerate(runs):
        run["config"] |= {"widths": [i, 3]} if run["config"]["method"] == "scratch" else {"budget": 0.9}
    runs[-1]["config"]["ranking"] = "network"
    figure = tradeoff(runs)
    lines = [line for line in figure.axes[0].lines if line.get_markersize() == 5 and line.get_marker() != "None"]
    assert [(line.get_marker(), to_hex(line.get_color()).upper()) for line in lines] == [
        (METHODS[name].marker, METHODS[name].colour) for name in (*names, "tp_taylor")
    ]
    assert [len(line.get_xdata()) for line in lines] == [1] * 5
    np.testing.assert_allclose([line.get_ydata()[0] for line in lines], [97.5, 97.6, 97.7, 97.8, 98.9])
    explained = [text.get_text() for text in figure.legends[0].get_texts()]
    assert set(explained) >= {METHODS[name].label for name in names}
    assert "" not in explained


def test_collapsed_networks_do_not_stretch_the_axis():
    ax = tradeoff([result(*MNIST, "SNR", 0, 99, 11, "ours"), result(*MNIST, "BMRS_N", 0, 90, 98.5, "ours")]).axes[0]
    assert 90 < ax.get_ylim()[0] < 98
    assert 98.6 < ax.get_ylim()[1] <= 100
    assert "fail" in [label.get_text() for label in ax.get_yticklabels()]
    ticks = [float(label.get_text()) for label in ax.get_yticklabels() if label.get_text() != "fail"]
    assert min(ticks) > 92
    assert ax.get_xlim()[1] > 2  # % of the parameters: the one at 1 % has failed
    half_failed = tradeoff([result(*MNIST, "SNR", seed, 90, value, "ours") for seed, value in enumerate((98, 11))])
    assert np.isfinite(half_failed.axes[0].get_ylim()).all()
    alone = tradeoff([result("lenet5", "digits", "BMRS_N", 0, 90, 100.0)]).axes[0]
    assert "fail" not in [label.get_text() for label in alone.get_yticklabels()]
    assert np.isfinite(alone.get_ylim()).all()


def test_after_training_the_stop_is_marked_where_the_curve_passes_it():
    curve = {"level": [0.1, 0.50001, 0.9], "compression": [0.2, 0.6, 0.95], "accuracy_test": [0.99, 0.98, 0.5]}
    other = {"level": [0.1, 0.7, 0.9], "compression": [0.2, 0.8, 0.95], "accuracy_test": [0.97, 0.9, 0.3]}
    runs = [
        result(*MNIST, "BMRS_N", seed, 95, 50, pruning="post-training", curve=each, stop_level=stop)
        for seed, (each, stop) in enumerate(((curve, 0.5000149), (other, 0.7)))
    ]
    lines = figures.post_training(runs).axes[0].lines
    np.testing.assert_allclose(lines[0].get_xydata(), [[20, 98], [95, 40]])  # at levels that both seeds have
    np.testing.assert_allclose(lines[1].get_xydata(), [[60, 98], [80, 90]])
    np.testing.assert_allclose(lines[2].get_xydata(), [[70, 94]])
    unstopped = [{**run, "stop_level": None} for run in runs]
    assert len(figures.post_training(unstopped).axes[0].lines) == 1


def test_below_the_curves_those_stops_that_work_are_seen_closely():
    curve = {"level": [0.5, 0.6, 0.9], "compression": [0.6, 0.7, 0.95], "accuracy_test": [0.99, 0.98, 0.1]}
    runs = [
        result(*MNIST, method, 0, 95, 10, pruning="post-training", curve=curve, stop_level=stop)
        for method, stop in (("BMRS_N", 0.5), ("BMRS_U-8", 0.6), ("SNR", 0.9), ("L2", None))
    ]
    knee = figures.post_training(runs).axes[1]
    for limits, low, high in ((knee.get_xlim(), 60, 70), (knee.get_ylim(), 98, 99)):
        assert low - 10 < limits[0] < low < high < limits[1] < high + 10
    without = figures.post_training(runs[3:]).axes[1]
    assert np.isfinite([without.get_xlim(), without.get_ylim()]).all()


def test_rank_correlations_of_one_fit_count_once():
    def run(method, seed, value):
        correlation = {"methods": ["SNR", "BMRS_N"], "spearman": [[1, value], [value, 1]]}
        return result(*MNIST, method, seed, 50, 90, pruning="post-training", rank_correlation=correlation)

    figure = figures.rank_heatmaps([run("SNR", 0, 0.2), run("BMRS_N", 0, 0.2), run("SNR", 1, 0.8)])
    np.testing.assert_allclose(figure.axes[0].images[0].get_array(), [[1, 0.5], [0.5, 1]])
    assert figure.axes[1].get_ylabel().endswith("mean of 2 fits")
    wrong = run("SNR", 2, 0.1)
    wrong["rank_correlation"]["methods"] = ["SNR", "L2"]
    with pytest.raises(ValueError, match="LeNet-5, MNIST are not all between SNR, BMRS_N"):
        figures.rank_heatmaps([run("SNR", 0, 0.2), wrong])


def test_the_sweep_runs_along_p1():
    runs = [result(*MNIST, f"BMRS_U-{p1}", seed, 90 - p1, 95, "paper") for p1 in (12, 8, 4, 1) for seed in (0, 1)]
    below = figures.precision_sweep(runs).axes[1]
    np.testing.assert_allclose(below.lines[0].get_xydata(), [[1, 89], [4, 86], [8, 82], [12, 78]])
    assert below.get_xlim() == (13, 0)


@pytest.mark.slow
def test_every_figure_there_are_results_for_is_written_the_same_each_time(tmp_path):
    after = post_training([MNIST])
    other = {**after[0], "config": {**after[0]["config"], "method": "BMRS_U-2"}}  # which has no colour of its own
    results = [*continuous([MNIST]), *after, other, *sweep([MNIST])]
    for i, run in enumerate(results):
        (tmp_path / "runs").mkdir(exist_ok=True)
        (tmp_path / "runs" / f"{i:04}.json").write_text(json.dumps(run))
    main(Figures(results=tmp_path / "runs", output=tmp_path / "a"))
    draw(results[:10], tmp_path / "b")
    draw(results[:10], tmp_path / "c")
    names = ("post_training_paper", "precision_paper", "rank_correlation_paper", "summary", "tradeoff")
    expected = sorted(f"{name}.{suffix}" for name in names for suffix in ("pdf", "png", "svg"))
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == expected
    for path in (tmp_path / "b").iterdir():
        assert path.read_bytes() == (tmp_path / "c" / path.name).read_bytes(), path.name
    assert plt.get_fignums() == []


@pytest.mark.slow
def test_figures_without_results_are_left_out(tmp_path):
    table1 = [result(*MNIST, method, 0, 80, 98) for method in ("BMRS_N", "BMRS_U-8", "BMRS_U-4")]
    assert [path.name for path in draw(table1, tmp_path)] == ["tradeoff.pdf", "tradeoff.svg", "tradeoff.png"]
    with pytest.raises(ValueError, match="no trade-off to draw"):
        tradeoff(post_training([MNIST]))


def test_the_summary_shows_ours_baselines_and_what_is_published():
    ours = [result(*MNIST, "BMRS_N", seed, 90, 98.9, "ours") for seed in range(2)]
    others = [result(*MNIST, "SNR", 0, 95, 97, "paper"), result(*MNIST, "tp_taylor", 0, 90, 97.5, "baselines")]
    alone = [result("mlp", "digits", "BMRS_N", 0, 80, 97, "ours")]
    axes = summary([*ours, *others, *alone]).axes
    assert [ax.get_title() for ax in axes] == [tradeoff(ours).axes[0].get_title()]
    assert "log scale" in axes[0].get_ylabel()
    with pytest.raises(ValueError, match="no trade-off to draw"):
        summary(ours)


def test_only_results_are_loaded(tmp_path):
    with pytest.raises(FileNotFoundError, match="no results of runs in"):
        main(Figures(tmp_path, tmp_path))
    run = result(*MNIST, "SNR", 0, 80, 98)
    (tmp_path / "a.json").write_text(json.dumps(run))
    (tmp_path / "a.error.json").write_text(json.dumps({"config": run["config"], "error": "lost"}))
    (tmp_path / "list.json").write_text("[1]")
    (tmp_path / "other.json").write_text('{"config": "x", "compression": 1, "accuracy_test": 1}')
    assert read_results(tmp_path) == [run]
    (tmp_path / "b.json").write_text("{")
    with pytest.raises(ValueError, match=r"b\.json is no result of a run .*; delete it"):
        read_results(tmp_path)


def test_published_points():
    assert published("lenet5", "cifar10")["BMRS_U-4"] == Point(68.07, 67.66, 1.95, 0.59)
    assert published("mlp", "mnist")["L2"].accuracy_sd == 0
    assert published("mlp_inputs", "mnist") == published("mlp", "mnist")
    assert published("lenet5", "digits") == published("unknown", "mnist") == {}
    horseshoe = published("lenet5_caffe", "mnist")["BC-GHS"]
    assert 431_080 * (1 - horseshoe.compression / 100) == pytest.approx(2792)
    assert horseshoe.accuracy == 99


def test_panels_fill_their_rows():
    for count, columns in ((1, 1), (2, 2), (4, 2), (5, 3), (7, 3)):
        figure, grid = panel_grid(count, height=2, rows_each=2)
        assert len(grid) == count
        assert len(figure.axes) == 2 * count
        assert grid[0][0].get_gridspec().ncols == columns
        assert all(top.get_position().y0 > bottom.get_position().y1 for top, bottom in grid)


def test_runs_of_an_earlier_recipes_prior_are_left_out_where_there_are_newer_ones():
    def run(network, **more):
        return {"config": {"dataset": "mnist", "network": network, "method": "BMRS_N", "recipe": "ours", **more}}

    old, new, other = run("mlp"), run("mlp", log_high=1.0), run("lenet5")
    paper = run("mlp", recipe="paper")
    assert of_current_prior([old, new, other, paper]) == [new, other, paper]
    assert of_current_prior([old, other]) == [old, other]
