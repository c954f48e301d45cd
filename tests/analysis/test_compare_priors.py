import json
import warnings

from analysis.compare_priors import PRIORS, ComparePriors, format_table, main


def test_each_prior_is_fitted_and_judged(tmp_path):
    config = ComparePriors(kl_weights=(1.0,), seeds=(0, 1), epochs=3, draws=3, output=tmp_path / "out")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of fits that are too short
        report = main(config)
    assert json.loads((tmp_path / "out" / "priors.json").read_text()) == report
    assert (tmp_path / "out" / "priors.md").read_text() == format_table(report) + "\n"
    assert (tmp_path / "out" / "priors.png").stat().st_size > 10_000
    assert [row["prior"] for row in report["rows"]] == list(PRIORS)
    for row in report["rows"]:
        assert len(row["accuracy"]) == 2
        assert all(0.5 < each <= 1 for each in row["accuracy"])
        assert all(each < 0 for each in row["log_likelihood"])
