import dataclasses
import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch

from analysis.data.sets import Split, digits
from analysis.runs import baseline_runs, experiment, scheduling
from analysis.runs.config import BASELINES, METHODS, DenseRun, NoisyRun, ToSize, WhileTraining, read_config
from analysis.runs.execution import Execution, epochs_done, epochs_planned, is_running, work_folder
from analysis.runs.experiment import execute
from analysis.runs.progress import Progress, format_seconds, seconds_left
from analysis.runs.recipes import criterion, dense_of, make_config
from analysis.runs.reference import REFERENCE_LOG_ODDS
from analysis.runs.store import Store
from analysis.study import _RESULTS, GRIDS, Study, _command, _run_together, configurations, main
from analysis.tables import tabulate
from pyro_bmrs import BMRS_N, BMRS_U, Criterion, WeightNorm
from pyro_bmrs.svi.callbacks import JSONLines

ROOT = Path(__file__).parents[2]
TINY = {"epochs": 2, "fine_tune_epochs": 1}
OF_THE_MACHINE = ("seconds", "latency_dense_ms", "latency_pruned_ms", "sessions", "date")


def study(folder, **changes):
    settings = {"networks": ("mlp",), "methods": ("BMRS_N",), "recipes": ("ours",), "device": "cpu", "threads": 1}
    return Study(work=folder / "work", results=folder / "results", **{**settings, **TINY, **changes})


def store(folder):
    return Store(folder / "results" / "runs")


def without_times(results):
    return {key: value for key, value in results.items() if key not in OF_THE_MACHINE}


def results_of(config):
    """What a run comes to, as far as tables and displays look at it."""
    return {"seconds": 1.0, "compression": 0.5, "accuracy_test": 0.9, "device": "cpu: x", "versions": {"torch": "2"}}


def test_ids_are_stable_and_distinct():
    config = make_config("mnist", "lenet5", "BMRS_N", "paper", 0)
    assert replace(config, pixels=(0, 1), best_of=0).id == "c03cad222468"
    for pixels in ((1,), (1, 1), (0, float("nan"))):
        with pytest.raises(ValueError, match="pixels must be two numbers that differ"):
            replace(config, pixels=pixels)
    grid = configurations(Study(grid="table1", datasets=("mnist", "cifar10"), seeds=(0, 1)))
    assert len({config.id for config in grid}) == len(grid) == 2 * 2 * 2 * 2 * 7
    assert replace(config, kl_weight=30) == replace(config, kl_weight=30.0)
    assert replace(config, kl_weight=30).id == replace(config, kl_weight=30.0).id != replace(config, kl_weight=31).id
    assert read_config(json.loads(json.dumps(config.settings))).id == config.id


def test_results_of_former_versions_are_still_those_of_their_configurations():
    kept = Store(_RESULTS / "runs").read_all()
    assert len(kept) >= 2
    assert all(read_config(results["config"]).id == results["id"] for results in kept)


def test_settings_added_later_are_kept_only_where_they_are_used(tmp_path):
    ours = make_config("mnist", "mlp", "BMRS_N", "ours", 0, kl_by_cost=False)
    scratch = make_config("mnist", "mlp", "scratch", "baselines", 0, budget=0.5, widths=(3, 2))
    for config in (ours, scratch):
        Store(tmp_path).write(config, {})
        assert read_config(Store(tmp_path).read(config)["config"]) == config
    left_out = set(ours.all_settings) - set(Store(tmp_path).read(ours)["config"])
    assert left_out == {"kl_by_cost", "pixels", "best_of", "kl_priced_at", "match_by", "train_images", "placement"}
    assert Store(tmp_path).read(scratch)["config"]["widths"] == [3, 2]
    assert len({scratch.id, replace(scratch, widths=(3, 1)).id, replace(scratch, budget=0.6).id, ours.id}) == 4


@pytest.mark.slow
def test_the_kl_may_be_priced_at_other_widths(tmp_path):
    config = make_config("digits", "mlp", "BMRS_N", "ours", 0, epochs=1, fine_tune_epochs=0, kl_by_cost=True)
    execution = Execution(work=tmp_path)
    at_full_size = execute(config, execution)
    priced = execute(replace(config, kl_priced_at=(20, 20, 20)), execution)
    assert priced["accuracy_validation"] != at_full_size["accuracy_validation"]
    same = execute(replace(config, kl_priced_at=(100, 100, 100)), execution)
    assert without_times(same) == without_times(at_full_size)
    with pytest.raises(ValueError, match="a number for each of the sites"):
        execute(replace(config, kl_priced_at=(20, 20)), execution)
    with pytest.raises(ValueError, match="needs kl_by_cost"):
        replace(config, kl_by_cost=False, kl_priced_at=(20, 20, 20))
    with pytest.raises(ValueError, match="kl_by_cost needs a number"):
        replace(config, kl_weight="reference")
    assert dense_of(replace(config, kl_priced_at=(20, 20, 20))) == dense_of(config)


def test_baselines_train_as_long_as_ours_without_noise():
    baseline = make_config("mnist", "lenet5", "tp_taylor", "baselines", 3, budget=0.9, ranking="network")
    dense = make_config("mnist", "lenet5", "none", "ours", 3)
    named = {"method": "tp_taylor", "recipe": "baselines", "budget": 0.9, "ranking": "network"}
    assert baseline.all_settings == {**dense.all_settings, **named}
    ours = make_config("mnist", "lenet5", "BMRS_N", "ours", 3)
    assert baseline.epochs == baseline.total_epochs == ours.epochs + ours.fine_tune_epochs == ours.total_epochs
    assert (baseline.decay, baseline.batch_size, baseline.lr) == (True, ours.batch_size, ours.lr)
    assert baseline.label == "mnist lenet5 tp_taylor baselines budget 0.9 seed 3"
    for method, recipe in (
        ("tp_magnitude", "ours"),
        ("scratch", "paper"),
        ("BMRS_N", "baselines"),
        ("none", "baselines"),
    ):
        with pytest.raises(ValueError, match=f"'{method}' does not go with the recipe '{recipe}'"):
            make_config("mnist", "lenet5", method, recipe, 0)


@pytest.mark.parametrize("recipe", ["paper", "ours"])
def test_the_dense_network_of_a_run_is_that_of_its_recipe(recipe):
    for changes in ({}, {"epochs": 7, "lr": 0.1, "kl_weight": 3.0, "p2": 9.0}):
        noisy, dense = (make_config("mnist", "lenet5", method, recipe, 1, **changes) for method in ("BMRS_N", "none"))
        assert dense_of(noisy) == dense_of(dense) == dense


def test_a_field_added_later_leaves_ids_as_they_are():
    config = make_config("digits", "mlp", "SNR", "ours", 0)
    longer = dataclasses.make_dataclass("Longer", [("extra", int, 0)], bases=(NoisyRun,), frozen=True, kw_only=True)
    same = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    assert longer(**same).id == config.id
    assert longer(**same, extra=1).id != config.id


def test_the_papers_recipe_is_the_references():
    config = make_config("mnist", "lenet5", "BMRS_N", "paper", 0)
    assert (config.epochs, config.fine_tune_epochs, config.schedule) == (60, 0, WhileTraining(1, 50))
    assert (config.granularity, config.kl_weight, config.decay, config.kl_warmup_epochs) == (
        "element",
        "reference",
        False,
        0,
    )
    assert (config.batch_size, config.lr, config.posterior_lr, config.placement) == (128, 1.4e-3, 1.4e-3, "outputs")
    assert criterion(config) == BMRS_N(prior_log_odds=REFERENCE_LOG_ODDS)
    ranked = make_config("mnist", "lenet5", "L2", "paper", 0)
    assert criterion(ranked) == WeightNorm(criterion(config), match_by="structures")
    assert (ranked.epochs, ranked.schedule) == (60, WhileTraining(50, 50))
    assert dense_of(ranked) == dense_of(config)
    assert criterion(make_config("mnist", "mlp", "BMRS_U-4", "paper", 0)) == BMRS_U(4, 23)
    assert make_config("mnist", "mlp", "SNR", "paper", 0, epochs=6, fine_tune_epochs=2).schedule.prune_until == 6
    assert (config.pixels, config.best_of) == ((-127 / 255, 128 / 255), 10)
    dense = make_config("cifar10", "mlp", "none", "paper", 0, fine_tune_epochs=2)
    assert (dense.pixels, dense.best_of, dense.epochs) == ((-1, 1), 2, 52)
    assert make_config("mnist", "mlp", "SNR", "paper", 0, pruning="post-training").best_of == 0
    assert make_config("mnist", "mlp", "SNR", "ours", 0).pixels == (0, 1)


def test_the_dense_network_is_one_run_whatever_the_settings_of_noise():
    both = configurations(Study(methods=("none", "SNR"), recipes=("ours",), networks=("mlp",), kl_weight=(1.0, 2.0)))
    assert [config.method for config in both] == ["none", "SNR", "SNR"]
    assert both[0].epochs == both[1].epochs + both[1].fine_tune_epochs


def test_dense_networks_and_baselines_see_the_pixels_that_ours_does():
    ours = make_config("cifar10", "lenet5", "BMRS_N", "ours", 0)
    assert ours.pixels == (-1.9, 2.1)
    assert (
        dense_of(ours).pixels
        == make_config("cifar10", "lenet5", "tp_taylor", "baselines", 0, budget=0.5).pixels
        == ours.pixels
    )
    given = configurations(Study(methods=("none", "SNR"), recipes=("ours",), networks=("mlp",), pixels=(-1.0, 1.0)))
    assert [config.pixels for config in given] == [(-1, 1)] * 2


def test_axes_and_settings_can_be_replaced():
    only = configurations(Study(grid="table1", datasets=("digits",), networks=("lenet5",), methods=("BMRS_U-12",),
                                seeds=(7,), recipes=("ours",), epochs=3, lr=0.1, kl_weight=(5.0,)))  # fmt: skip
    assert [(c.dataset, c.method, c.seed, c.epochs, c.lr, c.kl_weight) for c in only] == [
        ("digits", "BMRS_U-12", 7, 3, 0.1, 5.0)
    ]
    with pytest.raises(ValueError, match="epochs must not be negative, but got -3"):
        configurations(Study(methods=("none",), epochs=-3))
    with pytest.raises(ValueError, match="no method 'L1'"):
        configurations(Study(methods=("L1",)))
    with pytest.raises(ValueError, match="no setting for the network 'lenet5_caffe' on 'cifar10'"):
        configurations(Study(networks=("lenet5_caffe",), datasets=("cifar10",)))


@pytest.mark.parametrize("grid", [name for name in GRIDS if name != "baselines"])
def test_grids_are_of_runs_that_exist(grid, monkeypatch):
    monkeypatch.delenv("BMRS_DATA", raising=False)
    runs = configurations(Study(grid=grid))
    assert "fashion_mnist" not in {config.dataset for config in runs}
    assert all(isinstance(config, DenseRun) == (config.method == "none") for config in runs)
    assert all(isinstance(criterion(config), Criterion) for config in runs if isinstance(config, NoisyRun))


def beside(folder, **changes):
    """The study of baselines in the same folders."""
    return study(folder, grid="baselines", **{"methods": (), "recipes": (), "networks": (), **changes})


def keep(folder, seed, compression, kept, dataset="digits", network="mlp", recipe="ours", **changes):
    """Keep a result of BMRS_N, as far as baselines look at it."""
    config = make_config(dataset, network, "BMRS_N", recipe, seed, **{**TINY, **changes})
    widths = {f"fc{i}_noise": width for i, width in enumerate(kept)}
    store(folder).write(config, {**results_of(config), "compression": compression, "kept": widths})


def test_baselines_stand_beside_what_ours_came_to(tmp_path):
    for seed, compression in ((0, 0.70003), (1, 0.75), (2, 0.8), (3, 0.1)):
        keep(tmp_path, seed, compression, (9 + seed, 4), kl_weight=4.0)
        keep(tmp_path, seed, compression, (9, 9), recipe="paper")
        keep(tmp_path, seed, compression, (9, 9), pruning="post-training")
        keep(tmp_path, seed, compression, (9, 9), network="mlp_inputs")
        keep(tmp_path, seed, compression, (9, 9), posterior_lr=0.1)
    for seed in (0, 1):  # and not 2
        keep(tmp_path, seed, 0.5, (9, 9), network="lenet5")
    baselines = configurations(beside(tmp_path))
    assert [config.method for config in baselines] == [*BASELINES] * 3
    assert {(config.dataset, config.network, config.recipe) for config in baselines} == {("digits", "mlp", "baselines")}
    assert {(config.budget, config.epochs) for config in baselines} == {(0.75, 3)}
    assert [config.widths for config in baselines[3::4]] == [(9, 4), (10, 4), (11, 4)]
    both = configurations(beside(tmp_path, seeds=(0, 1), methods=("tp_taylor", "scratch"), ranking="network"))
    assert [(config.network, config.budget, config.seed, config.all_settings.get("ranking")) for config in both] == [
        (network, budget, seed, ranking)
        for seed in (0, 1)
        for ranking in ("network", None)  # which from scratch has no part in
        for network, budget in (("lenet5", 0.5), ("mlp", 0.725))
    ]
    assert configurations(beside(tmp_path, seeds=(0,), networks=("mlp",), datasets=("mnist", "digits"))) != []


def test_baselines_of_several_weights_of_the_kl_have_budgets_of_their_own(tmp_path):
    for weight, compression in ((1.0, 0.5), (4.0, 0.75), (8.0, 0.75)):
        keep(tmp_path, 0, compression, (9, int(weight)), kl_weight=weight)
    baselines = configurations(beside(tmp_path, seeds=(0,)))
    assert [(config.method, config.budget) for config in baselines[:2]] == [
        ("tp_magnitude", 0.5),
        ("tp_magnitude", 0.75),
    ]
    assert len(baselines) == 3 * 2 + 3  # two weights that come to one size have one baseline, of other widths two
    assert {config.budget for config in configurations(beside(tmp_path, seeds=(0,), kl_weight=(1.0,)))} == {0.5}


def test_a_ranking_of_ours_prunes_to_the_size_of_bmrs_n_in_a_fit_like_its(tmp_path):
    for seed, compression in ((0, 0.5), (1, 0.6)):
        keep(tmp_path, seed, compression, (9, 9), kl_weight=4.0)
    found = configurations(beside(tmp_path, seeds=(0, 1), methods=("L2", "random")))
    assert [(config.method, config.recipe, config.kl_weight, config.schedule, config.seed) for config in found] == [
        (method, "ours", 4.0, ToSize(0.55), seed) for seed in (0, 1) for method in ("L2", "random")
    ]
    assert {(config.epochs, config.fine_tune_epochs, config.kl_warmup_epochs) for config in found} == {(2, 1, 0)}
    assert found[0].label == "digits mlp L2 ours budget 0.55 seed 0"


@pytest.mark.slow
def test_a_run_to_a_size_reaches_it_by_whatever_criterion(tmp_path):
    config = make_config("digits", "mlp", "random", "ours", 0, pruning="to-size", budget=0.6, **TINY)
    results = execute(config, Execution(tmp_path, device="cpu"))
    assert results["compression"] == pytest.approx(0.6, abs=0.02)
    table = tabulate([{**results, "config": config.settings}])[0]
    assert table.rows[0][1] == "random (epochs 2, fine_tune_epochs 1, budget 0.6)"


def test_settings_that_a_run_does_not_have_are_left_out_or_refused():
    dense, lenet = (
        make_config("digits", network, method, "ours", 0, hidden=7, kl_weight=3.0, log_high=1.0)
        for network, method in (("mlp", "none"), ("lenet5", "BMRS_N"))
    )
    assert dense.net.hidden == 7
    assert "kl_weight" not in dense.all_settings
    assert "hidden" not in lenet.all_settings
    assert lenet.log_high == 1
    with pytest.raises(TypeError, match="no run has a setting called widht"):
        make_config("digits", "mlp", "BMRS_N", "ours", 0, widht=7)
    with pytest.raises(TypeError, match="a DenseRun of mlp has no setting kl_weight"):
        read_config({**dense.settings, "kl_weight": 3.0})


def test_baselines_of_nothing_are_refused_with_what_to_run_first(tmp_path):
    keep(tmp_path, 0, 0.5, (9, 9))
    for changes in ({}, {"seeds": (1,)}, {"seeds": (0,), "datasets": ("mnist",)}, {"seeds": (0,), "epochs": 5},
                    {"seeds": (0,), "networks": ("lenet5",)}, {"seeds": (0,), "kl_weight": (9.0,)}):  # fmt: skip
        with pytest.raises(ValueError, match=r"first run .* --grid table1 --recipe ours --methods BMRS_N --seeds"):
            main(beside(tmp_path, table=True, **changes))
    with pytest.raises(ValueError, match="no method 'L1'"):
        configurations(beside(tmp_path, seeds=(0,), methods=("L1",)))
    for mixed in (beside(tmp_path, seeds=(0,), recipes=("ours",)), study(tmp_path, recipes=("ours", "baselines"))):
        with pytest.raises(ValueError, match="the recipe baselines is that of the grid baselines"):
            configurations(mixed)


@pytest.mark.slow
@pytest.mark.parametrize(("network", "seeds"), [("mlp", (0, 1)), ("lenet5", (0,))])
def test_baselines_from_one_end_to_the_other(network, seeds, tmp_path, capsys):
    settings = {"networks": (network,), "seeds": seeds, "epochs": 4, "fine_tune_epochs": 0}
    ours, baselines = study(tmp_path, kl_weight=(4.0,), **settings), beside(tmp_path, **settings)
    count = len(BASELINES) * len(seeds)
    assert main(ours)
    assert main(baselines)
    assert f"{count} runs: 0 done, {count} to do" in capsys.readouterr().out
    sources = [store(tmp_path).read(config) for config in configurations(ours)]
    budget = configurations(baselines)[0].budget
    assert 0 < budget == pytest.approx(sum(source["compression"] for source in sources) / len(seeds), abs=1e-4)
    for config in configurations(baselines):
        found = store(tmp_path).read(config)
        assert read_config(found["config"]) == config
        if config.method == "scratch":
            same = ("params_dense", "params_pruned", "flops_pruned", "compression")
            assert [found[key] for key in same] == [sources[config.seed][key] for key in same]
        else:
            assert found["compression"] >= budget
        assert found["accuracy_test"] > 0.2
        assert found["history"]["accuracy_validation"] == [pytest.approx(found["accuracy_validation"], abs=1e-5)]
        assert (found["epochs"], found["sessions"]) == (4, [0])
        missing = {"accuracy_test_masked", "surgery_max_abs_error", "structures", "kept", "compression_reference"}
        assert set(sources[0]) - set(found) == missing
    files = {path: path.stat().st_mtime_ns for path in store(tmp_path).folder.iterdir()}
    assert main(baselines)
    assert f"{count} runs: {count} done, 0 to do" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in store(tmp_path).folder.iterdir()} == files
    assert main(replace(baselines, table=True))
    printed = capsys.readouterr().out
    for method in BASELINES:
        assert f"| baselines | {method} (epochs 4, budget {budget:g}) | " in printed
    assert printed.count(f"({len(seeds)}) |") == len(BASELINES)


@pytest.mark.slow
def test_an_interrupted_baseline_starts_again(tmp_path, monkeypatch):
    keep(tmp_path, 0, 0.5, (20, 20, 20))
    baselines = beside(tmp_path, seeds=(0,), methods=("tp_taylor",))
    (config,) = configurations(baselines)
    with monkeypatch.context() as patched:
        patched.setattr(baseline_runs, "compare", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            main(baselines)
    execution = Execution(tmp_path / "work")
    assert (epochs_done(config, execution), epochs_planned(config)) == (0, 3)
    assert store(tmp_path).state(config) == "pending"
    assert main(baselines)
    again = execute(config, Execution(tmp_path / "again", device="cpu"))
    found = store(tmp_path).read(config)
    assert found["sessions"] == [0, 0]
    assert {key: found[key] for key in without_times(again)} == without_times(again)


def test_a_network_from_scratch_has_a_width_for_each_layer(tmp_path):
    keep(tmp_path, 0, 0.5, (20, 20))
    assert not main(beside(tmp_path, seeds=(0,), methods=("scratch",)))  # the MLP has three
    (config,) = configurations(beside(tmp_path, seeds=(0,), methods=("scratch",)))
    assert "shorter" in store(tmp_path).read_error(config)["error"]


def test_what_is_done_is_skipped_and_what_failed_retried_on_request(tmp_path, monkeypatch, capsys):
    asked = []

    def sometimes(config, execution):
        asked.append(config.seed)
        if config.seed == 1 and len(asked) < 4:
            raise FloatingPointError("the loss became nan")
        return results_of(config)

    monkeypatch.setattr(scheduling, "execute", sometimes)
    three = study(tmp_path, seeds=(0, 1, 2))
    assert not main(three, ["--seeds", "0", "1", "2", "--work", "/somewhere"])
    out = capsys.readouterr().out
    failed = configurations(three)[1]
    assert f"failed: {failed.id}  {failed.label}: FloatingPointError: the loss became nan" in out
    error = store(tmp_path).read_error(failed)
    assert "in sometimes" in error["traceback"]
    assert error["command"] == "python -m analysis.study --seeds 0 1 2"
    assert [store(tmp_path).state(config) for config in configurations(three)] == ["done", "failed", "done"]
    assert not main(three)
    assert asked == [0, 1, 2]
    assert main(replace(three, retry=True))
    assert asked == [0, 1, 2, 1]
    assert [store(tmp_path).state(config) for config in configurations(three)] == ["done"] * 3
    capsys.readouterr()
    main(replace(three, dry_run=True))
    assert capsys.readouterr().out.count("done") == 3


def test_a_corrupt_result_is_named(tmp_path):
    config = make_config("digits", "mlp", "SNR", "ours", 0)
    Store(tmp_path).write(config, {})
    (tmp_path / f"{config.id}.json").write_text("{")
    with pytest.raises(ValueError, match=f"{config.id}.json is no result of a run"):
        Store(tmp_path).read_all()


@pytest.mark.slow
@pytest.mark.parametrize("method", ["none", "BMRS_N"])
def test_an_interrupted_run_goes_on_to_the_same_result(method, tmp_path, monkeypatch):
    whole = study(tmp_path / "whole", methods=(method,), epochs=4, kl_weight=(4.0,))
    assert main(whole)
    config = configurations(whole)[0]
    written = JSONLines.on_epoch_end

    def interrupt(self, record):
        if record["epoch"] == 4:
            raise KeyboardInterrupt
        written(self, record)

    halves = study(tmp_path / "halves", methods=(method,), epochs=4, kl_weight=(4.0,))
    with monkeypatch.context() as patched:
        patched.setattr(JSONLines, "on_epoch_end", interrupt)
        with pytest.raises(KeyboardInterrupt):
            main(halves)
    assert store(tmp_path / "halves").state(config) == "pending"
    assert main(halves)
    expected, found = (store(tmp_path / name).read(config) for name in ("whole", "halves"))
    assert without_times(found) == without_times(expected)
    assert (expected["sessions"], found["sessions"]) == ([0], [0, 3])


@pytest.mark.slow
def test_every_method_and_recipe_from_one_end_to_the_other(tmp_path, capsys):
    everything = study(tmp_path, methods=METHODS, recipes=("paper", "ours"), kl_weight=())
    assert main(everything)
    assert main(replace(everything, table=True))
    printed = capsys.readouterr()
    assert "16 runs: 0 done, 16 to do" in printed.out
    assert printed.err.count("% removed") == 16
    for config in configurations(everything):
        results = store(tmp_path).read(config)
        assert read_config(results["config"]) == config
        assert results["surgery_max_abs_error"] < 1e-4 if config.method != "none" else results["compression"] == 0
        assert len(results["history"]["accuracy_validation"]) == results["epochs"] == 3
        assert results["accuracy_test"] > 0.5
        assert f"| {config.recipe} | {config.method} (" in printed.out
    source = (tmp_path / "results" / "smoke.tex").read_text()
    assert source.count("toprule") == 3  # against none, and by the paper's count


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.* has lost all its structures")  # at the highest levels
def test_post_training_runs_share_their_training(tmp_path):
    both = study(tmp_path, methods=("BMRS_N", "L2"), pruning="post-training", epochs=4)
    assert main(both)
    evidence, norm = (store(tmp_path).read(config) for config in configurations(both))
    assert evidence["history"] == norm["history"]
    assert evidence["seconds"] > 0
    assert 0 < evidence["stop_level"] < 1
    assert evidence["stop_level"] in evidence["curve"]["level"]
    assert norm["stop_level"] is None
    assert evidence["curve"]["compression"] == sorted(evidence["curve"]["compression"])
    assert len(evidence["curve"]["accuracy_test"]) == len(evidence["curve"]["level"])
    assert evidence["rank_correlation"] == norm["rank_correlation"]
    matrix = evidence["rank_correlation"]["spearman"]
    assert [row[i] for i, row in enumerate(matrix)] == [1.0] * len(METHODS[1:])
    folders = {path.name for path in (tmp_path / "work").iterdir()}
    assert len(folders) == 3


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.* has lost all its structures")
def test_images_may_be_bytes_as_those_of_the_hub_are(tmp_path, monkeypatch):
    whole = digits(32)
    parts = ((whole.train[0][:200], whole.train[1][:200]), whole.validation, whole.test)
    as_bytes = Split(*(((255 * x).round().to(torch.uint8), y) for x, y in parts))
    as_numbers = Split(*((x / 255, y) for x, y in (as_bytes.train, as_bytes.validation, as_bytes.test)))
    for name, split in (("bytes", as_bytes), ("numbers", as_numbers)):
        monkeypatch.setattr(experiment, "load", lambda name, data_dir, size, split=split: split)
        methods, mlp = ("none", "BMRS_N", "L2"), {"datasets": ("mnist",), "batch_size": 20}
        assert main(study(tmp_path / name, methods=methods, **mlp))
        assert main(study(tmp_path / name, methods=("gradient",), pruning="post-training", **mlp))
    both = [store(tmp_path / name).read_all() for name in ("bytes", "numbers")]
    assert len(both[0]) == 4
    assert [*map(without_times, both[0])] == [*map(without_times, both[1])]


@pytest.mark.slow
def test_caffe_and_noisy_inputs_run(tmp_path):
    runs = study(tmp_path, networks=("lenet5_caffe", "mlp_inputs"), epochs=1, fine_tune_epochs=0)
    assert main(runs)
    caffe, mlp = (store(tmp_path).read(config) for config in configurations(runs))
    assert (caffe["params_dense"], caffe["structures"]["flatten_noise"]) == (431_080, 800)
    assert mlp["structures"]["input_noise"] == 1024


class Killer(threading.Thread):
    """Kills the process that is at work on one of some runs, whichever has come further than an epoch first."""

    def __init__(self, folder, configs):
        super().__init__(daemon=True)
        self.folders = [work_folder(config, Execution(folder / "work")) for config in configs]

    def run(self):
        while not (under_way := [folder for folder in self.folders if self.epochs(folder) > 1]):
            time.sleep(0.02)
        lock = str(under_way[0] / "lock")
        for process in psutil.Process().children(recursive=True):
            if lock in {file.path for file in process.open_files()}:
                os.kill(process.pid, signal.SIGKILL)

    def epochs(self, folder):
        file = folder / "metrics.jsonl"
        return file.read_text().count("\n") if file.exists() else 0


def two_runs(folder, **changes):
    return study(folder, seeds=(0, 1), epochs=10, fine_tune_epochs=0, batch_size=128, **changes)


def check_nothing_is_lost(folder, runs):
    """One of two runs was taken up again where it had been left, and came to what it does undisturbed."""
    found = [store(folder).read(config) for config in configurations(runs)]
    interrupted = max(found, key=lambda results: results["sessions"][-1])
    assert interrupted["sessions"][0] == 0
    assert interrupted["sessions"][-1] > 1
    config = read_config(interrupted["config"])
    undisturbed = execute(config, Execution(folder / "undisturbed", device="cpu"))
    expected = json.loads(json.dumps(without_times(undisturbed)))
    assert {key: interrupted[key] for key in expected} == expected


@pytest.mark.exhaustive
def test_processes_side_by_side_and_one_killed(tmp_path, capsys):
    runs = two_runs(tmp_path, jobs=2)
    killer = Killer(tmp_path, configurations(runs))
    killer.start()
    assert main(runs)
    killer.join()
    check_nothing_is_lost(tmp_path, runs)


@pytest.mark.exhaustive
def test_a_cluster_with_a_worker_killed(tmp_path):
    distributed = pytest.importorskip("distributed")
    with distributed.LocalCluster(
        n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None, silence_logs=50
    ) as cluster:
        runs = two_runs(tmp_path, backend="dask", scheduler=cluster.scheduler_address)
        killer = Killer(tmp_path, configurations(runs))
        killer.start()
        assert main(runs)
        killer.join()
    check_nothing_is_lost(tmp_path, runs)


@pytest.mark.exhaustive
@pytest.mark.parametrize("pruning", ["continuous", "post-training"])
def test_processes_that_torchrun_starts_train_each_run_together(pruning, tmp_path):
    pytest.importorskip("transformers")
    asked = ["--networks", "vit_s", "--methods", "none", "BMRS_N", "--recipe", "ours", "--epochs", "2"]
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "analysis.study", *asked]
    folders = ["--work", str(tmp_path / "work"), "--results", str(tmp_path / "results")]
    settings = ["--fine-tune-epochs", "1", "--kl-weight", "20", "--pruning", pruning, "--device", "cpu", *folders]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    seeds = ["--seeds", "0"]
    subprocess.run([sys.executable, *command, *settings, *seeds], env=environment, cwd=ROOT, timeout=400, check=True)
    dense, noisy = sorted(store(tmp_path).read_all(), key=lambda each: each["method"], reverse=True)
    assert (dense["method"], "processes" in dense) == ("none", False)
    assert (noisy["processes"], noisy["sessions"]) == (2, [0])
    assert noisy["accuracy_test"] > 0.3
    assert len(noisy["history"]["accuracy_validation"]) == (3 if pruning == "continuous" else 2)


def test_processes_of_one_run_have_no_runs_beside_them(tmp_path):
    with pytest.raises(ValueError, match="leave out --jobs and --backend"):
        _run_together(study(tmp_path, jobs=2), None, [], store(tmp_path), "")


def test_clusters_that_will_not_do_are_refused(tmp_path):
    with pytest.raises(ValueError, match="needs --scheduler ADDRESS"):
        main(study(tmp_path, backend="dask"))

    class Crowded:
        def nthreads(self):
            return {"tcp://a:1": 1, "tcp://b:2": 4}

    with pytest.raises(ValueError, match="tcp://b:2 have several threads"):
        scheduling.count_workers(Crowded())


def test_the_time_left_is_estimated_from_like_runs():
    slow, fast = (make_config("digits", network, "SNR", "ours", 0, epochs=8, fine_tune_epochs=2)
                  for network in ("lenet5", "mlp"))  # fmt: skip
    assert seconds_left({fast: 10}, [], 1) is None
    finished = [(slow, 100.0), (fast, 10.0)]
    assert seconds_left({slow: 10, fast: 5}, finished, 1) == 105
    assert seconds_left({slow: 10, fast: 5}, finished, 2) == 100  # a run is not divided
    assert seconds_left({replace(fast, dataset="mnist"): 10}, finished, 1) == 55
    settings = {"epochs": 10, "fine_tune_epochs": 0, "budget": 0.5, "widths": (9, 9, 9)}
    baseline, scratch = (make_config("digits", "mlp", name, "baselines", 0, **settings)
                         for name in ("tp_taylor", "scratch"))  # fmt: skip
    assert seconds_left({baseline: 10, scratch: 10}, [(baseline, 90.0), (scratch, 5.0)], 1) == 95
    assert [format_seconds(s) for s in (3.2, 200, 7300)] == ["3 s", "3 min", "2 h 2 min"]


def test_the_display_says_what_runs_and_what_is_left(tmp_path):
    execution = Execution(tmp_path)
    configs = [make_config("digits", "mlp", "SNR", "ours", seed, epochs=8, fine_tune_epochs=2) for seed in range(3)]
    stream = io.StringIO()
    folder = work_folder(configs[1], execution)
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("{}\n{}\n")
    from filelock import FileLock

    with Progress(configs, [], execution, 1, stream) as progress, FileLock(folder / "lock"):
        assert [is_running(config, execution) for config in configs] == [False, True, False]
        progress.tell(configs[0], {**results_of(configs[0]), "seconds": 10.0}, "")
        progress.tell(configs[2], None, "ValueError: no\nmore")
    lines = stream.getvalue().splitlines()
    assert lines[0] == "[1/3] digits mlp SNR ours kl 2 seed 0: 50.0 % removed, accuracy 90.00 %, 10 s"
    assert lines[1] == ("1 of 3 done, 2 left, about 18 s; running: digits mlp SNR ours kl 2 seed 1 (epoch 2/10)")
    assert lines[2] == "[2/3] digits mlp SNR ours kl 2 seed 2: FAILED, ValueError: no"
    assert lines[3].startswith("1 of 3 done, 1 failed, 1 left")
    assert not is_running(configs[1], execution)


def test_commands_name_no_folders():
    arguments = [
        "--grid",
        "table1",
        "--data-dir",
        "/d",
        "--work=/w",
        "--methods",
        "E[theta]",
        "--scheduler",
        "tcp://h:1",
    ]
    assert _command(arguments) == "python -m analysis.study --grid table1 --methods 'E[theta]'"
