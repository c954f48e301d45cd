import re
import warnings

import pytest
import torch

import pyro_bmrs as bmrs
from analysis.examples import (
    compare_priors,
    inspect_posterior,
    long_fit,
    noise_by_hand,
    plain_loop,
    select_features,
    your_own,
)


@pytest.mark.slow
def test_a_plain_loop(capsys):
    small = plain_loop.main(epochs=24, warm_up=6)
    before, _, after = capsys.readouterr().out.splitlines()[0].partition(" parameters -> ")
    assert int(after.replace(",", "")) < 0.7 * int(before.replace(",", ""))
    assert small(torch.zeros(1, 1, 8, 8)).shape == (1, 10)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "needs"), [("lightning_module", "lightning"), ("hugging_face", "accelerate")])
def test_other_trainers(name, needs, capsys):
    with warnings.catch_warnings():  # of other libraries, at their pleasure
        warnings.simplefilter("ignore")
        pytest.importorskip(needs)
        from importlib import import_module

        small = import_module(f"analysis.examples.{name}").main(epochs=2)
    assert "parameters ->" in capsys.readouterr().out
    assert isinstance(small, torch.nn.Module)


@pytest.mark.slow
def test_noise_by_hand(tmp_path, capsys):
    small = noise_by_hand.main(str(tmp_path))
    printed = capsys.readouterr().out
    assert int(re.search(r"(\d+) % of the parameters removed", printed).group(1)) >= 70
    assert float(re.search(r"\naccuracy (\d\.\d+)", printed).group(1)) >= 0.92
    assert str(bmrs.load(tmp_path / "small")) == str(small)


@pytest.mark.slow
def test_a_long_fit(tmp_path):
    result, replicas = long_fit.main(str(tmp_path / "run"))
    assert (tmp_path / "run" / "checkpoint" / "fit.safetensors").exists()
    assert result.compression > 0
    assert [replica.seed for replica in replicas] == [0, 1, 2, 3, 4]
    again, _ = long_fit.main(str(tmp_path / "other"))
    assert len(again.history) == len(result.history) == 42


@pytest.mark.slow
def test_a_posterior_is_inspected(tmp_path, capsys):
    scores = inspect_posterior.main(str(tmp_path))
    assert scores.over_draws.accuracy > 0.9
    assert {path.name for path in tmp_path.glob("*.png")} == {
        "ridge.png", "network.png", "forest.png", "reliability.png"
    }  # fmt: skip
    printed = capsys.readouterr().out
    assert 0 < int(re.search(r"kept: (\d+) of 20", printed).group(1)) < 20
    assert "expected log predictive density" in printed


def test_features_are_selected(capsys):
    assert (select_features.main() >= 0).tolist() == [False, True, False, True, True, True]
    assert "Delta F in nats" in capsys.readouterr().out


@pytest.mark.slow
def test_two_priors_are_compared(capsys):
    scores = compare_priors.main()
    assert all(each.at_mean.accuracy > 0.9 for each in scores.values())
    printed = capsys.readouterr().out
    assert all(int(found) > 50 for found in re.findall(r"(\d+) % of the parameters removed", printed))
    assert "elpd_loo" in printed


@pytest.mark.slow
def test_a_prior_a_criterion_and_a_guide_of_ones_own(capsys):
    result = your_own.main()
    removed = 1 - float(result.masks["2.theta"].float().mean())
    assert 0.3 < removed < 0.95
    assert result.compression > 0.3
    assert "Delta F" in capsys.readouterr().out
