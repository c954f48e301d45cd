import math

from analysis.benchmarks.evidence_speed import EvidenceSpeed, main


def test_it_times_both_criteria(capsys):
    results = main(EvidenceSpeed(structures=50_000, rounds=2))
    assert set(results) == {"BMRS_N", "BMRS_U-8", "both", "MiB"}
    assert all(math.isfinite(value) and value >= 0 for value in results.values())
    assert results["both"] >= max(results["BMRS_N"], results["BMRS_U-8"])
    assert "both" in capsys.readouterr().out
