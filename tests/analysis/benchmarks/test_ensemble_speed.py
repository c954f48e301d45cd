import json
import math

import pytest

from analysis.benchmarks.ensemble_speed import EnsembleSpeed, main


@pytest.mark.slow
def test_it_times_both_ways_and_writes_what_it_found(tmp_path, capsys):
    config = EnsembleSpeed(batch_sizes=(8,), seeds=2, epochs=1, examples=16, rounds=2, device="cpu", output=tmp_path)
    report = main(config)
    (result,) = report["results"]
    assert set(result["seconds"]) == {"at once", "one by one"}
    assert all(math.isfinite(ratio) and ratio > 0 for ratio in result["ratios"])
    assert json.loads((tmp_path / "ensemble_speed.json").read_text()) == report
    table = (tmp_path / "ensemble_speed.md").read_text()
    assert "| mlp | 8 |" in table
    assert table in capsys.readouterr().out + "\n"
