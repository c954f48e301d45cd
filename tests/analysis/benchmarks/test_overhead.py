import json

import pytest

from analysis.benchmarks.overhead import Overhead, format_tables, main

TINY = Overhead(networks=("mlp",), batch_sizes=(4,), threads=(1,), rounds=2, device="cpu", compile=False, fit_epochs=1)


def check(report, folder, threads):
    assert json.loads((folder / "overhead.json").read_text()) == report
    assert (folder / "overhead.md").read_text() == format_tables(report) + "\n"
    assert {"date", "command", "config", "machine", "versions"} <= set(report)
    assert len(report["results"]) == threads
    for result in report["results"]:
        assert (result["network"], result["batch_size"]) == ("mlp", 4)
        assert set(result["training"]) == {"plain", "ours", "attached", "SVI.step"}
        assert set(result["inference"]) == {"plain", "predict", "compacted", "compacted by half"}
        assert set(result["posterior"]) == {"noise", "beyond a bound"}
        for timing in (*result["training"].values(), *result["inference"].values()):
            for quartiles in timing.values():
                assert 0 < quartiles[0] <= quartiles[1] <= quartiles[2]
        assert result["training"]["plain"]["ratio"] == [1.0, 1.0, 1.0]


@pytest.mark.slow
def test_it_writes_figures_and_tables(tmp_path, capsys):
    report = main(Overhead(**{**vars(TINY), "output": tmp_path / "new"}))
    check(report, tmp_path / "new", threads=1)
    table = capsys.readouterr().out
    for word in ("training", "inference", "SVI.step", "published", "8.3", "fitted for 1 epochs"):
        assert word in table


@pytest.mark.gpu
def test_captured_steps_are_timed_on_a_gpu(tmp_path):
    report = main(Overhead(**{**vars(TINY), "output": tmp_path, "device": "cuda"}))
    assert {"plain, captured", "ours, captured"} <= set(report["results"][0]["training"])
