import json
import warnings

import pytest
import torch
from scipy.integrate import quad
from torch.distributions import kl_divergence

import pyro_bmrs as bmrs
from analysis.compare_priors import ComparePriors, format_table, main
from analysis.comparisons.priors import PRIORS, HardConcrete

SHORT = {"kl_weights": (1.0,), "seeds": (0, 1), "epochs": 3, "draws": 30}


def compared(**settings):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of fits that are too short
        return main(ComparePriors(**{**SHORT, **settings}))


@pytest.mark.exhaustive
def test_each_prior_is_fitted_and_judged(tmp_path):
    report = compared(output=tmp_path / "out")
    assert json.loads((tmp_path / "out" / "priors.json").read_text()) == report
    assert (tmp_path / "out" / "priors.md").read_text() == format_table(report) + "\n"
    for picture in ("trade_off", "calibration", "compare", "posteriors"):
        assert (tmp_path / "out" / f"{picture}.png").stat().st_size > 10_000
    assert [row["prior"] for row in report["rows"]] == list(PRIORS)
    for row in report["rows"]:
        assert len(row["accuracy"]) == 2
        assert all(0.5 < each <= 1 for each in row["accuracy"])
        assert all(each < 0 for each in row["log_likelihood"])


@pytest.mark.slow
def test_a_run_goes_on_and_other_settings_are_refused(tmp_path, capsys):
    one, two = list(PRIORS)[:2]
    first = compared(priors=(one,), seeds=(0,), output=tmp_path)
    capsys.readouterr()
    both = compared(priors=(one, two), seeds=(0,), output=tmp_path)
    assert f"{one}, kl_weight" not in capsys.readouterr().out
    assert both["rows"][0] == first["rows"][0]
    with pytest.raises(ValueError, match="of other settings"):
        compared(seeds=(0, 1), output=tmp_path)
    with pytest.raises(ValueError, match="there is no prior 'none'"):
        compared(priors=("none",), output=tmp_path)


@pytest.mark.parametrize("location", [-6.0, -1.0, 0.5, 4.0])
def test_hard_concrete_noise(location):
    q, p = (HardConcrete(torch.tensor(each, dtype=torch.float64)) for each in (location, -3.0))
    zero, one = q.log_zero.exp(), q.log_one.exp()

    def mean_of(value):
        """Return the mean of a function of the noise, by quadrature of the density and the two points."""
        inside = quad(lambda x: float(q.log_prob(torch.tensor(x)).exp() * value(torch.tensor(x))), 1e-12, 1 - 1e-12)
        return float(zero * value(torch.tensor(0.0)) + one * value(torch.tensor(1.0))) + inside[0]

    assert mean_of(torch.ones_like) == pytest.approx(1, abs=1e-7)
    assert float(q.mean) == pytest.approx(mean_of(lambda x: x), abs=1e-7)
    assert float(q.variance) == pytest.approx(mean_of(lambda x: x**2) - float(q.mean) ** 2, abs=1e-7)
    ratio = mean_of(lambda x: q.log_prob(x.double()) - p.log_prob(x.double()))
    assert float(kl_divergence(q, p)) == pytest.approx(ratio, abs=1e-6)
    torch.manual_seed(0)
    draws = q.sample((20_000,))
    assert float((draws == 0).double().mean()) == pytest.approx(float(zero), abs=0.02)
    assert float(draws.mean()) == pytest.approx(float(q.mean), abs=0.02)
    removal = bmrs.evidence_change(q, p, bmrs.spike(p))
    assert float(removal) == pytest.approx(float(q.log_zero - p.log_zero), abs=1e-12)
