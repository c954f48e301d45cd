import json

import pytest
import torch

from analysis import defaults, size
from analysis.benchmarks import import_time


@pytest.mark.slow
def test_imports_are_timed():
    results = import_time.main(import_time.ImportTime(rounds=1))
    assert results["ratio"] > 0


@pytest.mark.exhaustive
def test_defaults_go_on_where_they_were(tmp_path, capsys):
    config = defaults.Defaults(data=("wine",), seeds=(0,), by_hand=False, output=tmp_path / "defaults.json")
    results = defaults.main(config)
    assert results == json.loads((tmp_path / "defaults.json").read_text())
    assert results["wine"]["examples"] == 108
    assert results["wine"]["runs"]["defaults"]["removed"] > 50
    assert defaults.main(config) == results


@pytest.mark.parametrize("name", ["diabetes", "synthetic_200"])
def test_parts_of_a_data_set_are_disjoint_and_standardised(name):
    problem = defaults.load_problem(name, None)
    parts = [{row.numpy().tobytes() for row in x} for x, _ in (problem.train, problem.validation, problem.test)]
    assert not parts[0] & parts[1] | parts[0] & parts[2] | parts[1] & parts[2]
    torch.testing.assert_close(problem.train[0].mean(0), torch.zeros(problem.train[0].shape[1]), rtol=0, atol=1e-4)


@pytest.mark.slow
def test_sizes_are_compared(tmp_path, capsys):
    config = size.Size(
        networks=("mlp",),
        remove=(0.5,),
        seeds=(0,),
        fits=2,
        epochs=4,
        fine_tune_epochs=1,
        output=tmp_path / "size.json",
    )
    (row,) = size.main(config)
    assert row["steered"]["removed"] == pytest.approx(0.5, abs=0.02)
    assert row["fixed"]["kl_weight"] in (pytest.approx(1.0), pytest.approx(0.1), pytest.approx(10.0))
    assert "mlp, remove=0.5: steered: removed" in capsys.readouterr().out
