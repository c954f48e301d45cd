import pytest
import torch
from marks import thinned
from nets import blobs
from processes import Stop, state
from torch import nn

import pyro_bmrs as bmrs
from pyro_bmrs.svi.schedule import Rates

X, Y = blobs(200)
SETTINGS = {"epochs": 30, "fine_tune_epochs": 4, "lr": 5e-3, "seed": 0, "progress": False}


def build():
    torch.manual_seed(0)
    layers = [nn.Linear(6, 32), nn.ReLU(), bmrs.MultiplicativeNoise(32)]
    layers += [nn.Linear(32, 32), nn.ReLU(), bmrs.MultiplicativeNoise(32), nn.Linear(32, 3)]
    model = bmrs.NoisyNetwork(nn.Sequential(*layers))
    return model, bmrs.TruncatedLogNormalGuide(model)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("remove", "cost"), thinned([(0.3, "parameters"), (0.8, "parameters"), (0.9, "flops")], keep=[(0.9, "flops")])
)
def test_the_size_is_reached(remove, cost):
    model, guide = build()
    dense = bmrs.count_parameters(model.net), bmrs.count_flops(model.net, X[:1])
    result = bmrs.fit(model, guide, (X, Y), (X, Y), pruning=bmrs.ToSize(remove, cost), **SETTINGS)
    small = bmrs.compact(model, guide, None, X[:4])
    left = (
        bmrs.count_parameters(small) / dense[0] if cost == "parameters" else bmrs.count_flops(small, X[:1]) / dense[1]
    )
    assert 1 - left == pytest.approx(remove, abs=0.02)
    assert result.history[-1]["accuracy_validation"] > 0.9
    weights = [record["kl_weight"] for record in result.history]
    assert weights[0] == pytest.approx(0.05)
    assert len(set(weights)) > 10
    assert result.kl_weight == weights[-1]
    assert model.kl_weight == 1.0


@pytest.mark.slow
def test_a_resumed_fit_goes_on_with_its_multiplier(tmp_path):
    ends = []
    for folder in ("whole", "parts"):
        settings = {**SETTINGS, "pruning": bmrs.ToSize(0.8), "folder": tmp_path / folder}
        if folder == "parts":
            with pytest.raises(KeyboardInterrupt):
                bmrs.fit(*build(), (X, Y), callbacks=[Stop(20)], **settings)
        model, guide = build()
        result = bmrs.fit(model, guide, (X, Y), resume=True, **settings)
        ends.append((state(model, guide), [record["kl_weight"] for record in result.history]))
    torch.testing.assert_close(ends[0][0], ends[1][0], rtol=0, atol=0)
    assert ends[0][1] == ends[1][1]


@pytest.mark.slow
@pytest.mark.parametrize("criterion", thinned([bmrs.WeightNorm(), bmrs.Random()], keep=[bmrs.Random()]))
def test_what_only_ranks_removes_step_by_step_at_the_models_own_weight(criterion):
    model, guide = build()
    result = bmrs.fit(model, guide, (X, Y), (X, Y), criterion=criterion, pruning=bmrs.ToSize(0.8), **SETTINGS)
    small = bmrs.compact(model, guide, None, X[:4])
    assert 1 - bmrs.count_parameters(small) / bmrs.count_parameters(model.net) == pytest.approx(0.8, abs=0.02)
    assert result.history[-1]["accuracy_validation"] > 0.9
    removed = [record["compression"] for record in result.history]
    assert removed[8] == 0
    assert removed == sorted(removed)
    assert len(set(removed)) > 6
    assert removed[21] == removed[-1]  # 70 % of 30 epochs
    assert result.kl_weight == model.kl_weight == 1.0


@pytest.mark.slow
def test_no_site_is_emptied():
    model, guide = build()
    result = bmrs.fit(model, guide, (X, Y), pruning=bmrs.ToSize(0.97), **SETTINGS)
    assert all(mask.any() for mask in result.masks.values())


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((1.0,), ValueError, r"remove must be a fraction inside \(0, 1\), but got 1.0"),
        ((0,), ValueError, "remove must be"),
        (("half",), TypeError, "remove must be"),
        ((0.5, "time"), ValueError, 'cost must be "parameters" or "flops", but got \'time\''),
    ],
)
def test_targets_are_checked(arguments, error, message):
    with pytest.raises(error, match=message):
        bmrs.ToSize(*arguments)


def test_what_is_out_of_reach_is_refused():
    with pytest.raises(ValueError, match=r"remove=0.999 is out of reach: with one structure left of each site, 0\.9"):
        bmrs.fit(*build(), (X, Y), pruning=bmrs.ToSize(0.999), **SETTINGS)
    with pytest.raises(ValueError, match="a size needs a criterion"):
        bmrs.fit(*build(), (X, Y), pruning=bmrs.ToSize(0.5), criterion=None, **SETTINGS)


@pytest.mark.parametrize(("steps", "epochs"), [(13, 385), (79, 64), (750, 7), (15625, 3)])
def test_defaults_follow_from_the_number_of_steps(steps, epochs):
    rates = Rates.planned(2e-3, None, None, None, None, steps)
    assert rates.noisy_epochs == epochs
    assert rates.epochs - rates.noisy_epochs == -(-epochs // 3)
    assert 0.1 <= rates.posterior_lr <= 0.2
    assert rates.travel(steps) >= 490
    assert 0 < rates.kl_warmup_epochs <= epochs / 4


def test_few_steps_get_a_faster_posterior():
    rates = Rates.planned(2e-3, None, 30, None, None, 13)
    assert rates.posterior_lr == 0.3
    assert Rates.planned(2e-3, None, 30, None, None, 200).travel(200) == pytest.approx(500)


def test_too_few_steps_are_said():
    match = r"its posterior could travel 2\.6 nats at most, .* at least 800 steps with noise \(now 52\)"
    with pytest.warns(bmrs.FitWarning, match=match):
        bmrs.fit(*build(), (X, Y), epochs=4, fine_tune_epochs=1, posterior_lr=0.1, seed=0, progress=False)
