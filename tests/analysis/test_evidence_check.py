import json
import math

import pytest
import torch

from analysis.evidence_check import EvidenceCheck, format_table, main

pytestmark = pytest.mark.slow  # one fixture for all


@pytest.fixture(scope="module")
def checked(tmp_path_factory):
    """Return a report, and the folder that it is in."""
    folder = tmp_path_factory.mktemp("check")
    small = {"problems": 20, "steps": 500, "networks": 1, "kl_weights": (1.0,), "epochs": 6, "hidden": 12}
    return main(EvidenceCheck(**small, output=folder)), folder


def test_predictions_are_set_beside_the_truth(checked):
    report, folder = checked
    assert json.loads((folder / "check.json").read_text()) == report
    assert (folder / "check.md").read_text() == format_table(report) + "\n"
    for picture in ("predicted", "decisions", "one_goes_one_stays"):
        assert (folder / f"{picture}.png").stat().st_size > 10_000
    assert [case["part"] for case in report["cases"]] == ["linear", "refitted", "digits"]
    for case in report["cases"]:
        for prediction in case["predictions"].values():
            assert len(prediction["values"]) == len(case["truth"])
            assert all(map(math.isfinite, prediction["values"]))


def test_the_formula_is_exact_where_the_posterior_is(checked):
    case = checked[0]["cases"][0]
    truth = torch.tensor(case["truth"]).double()
    exact, free, formula = (
        torch.tensor(case["predictions"][name]["values"]).double()
        for name in ("the formula, on exact marginals", "free form", "BMRS_N")
    )
    near = truth.abs() < 3
    assert (exact - truth).abs().max() < 1e-6
    assert (free - truth)[near].abs().mean() < 0.1
    assert (formula - truth)[near].abs().mean() > (free - truth)[near].abs().mean()
