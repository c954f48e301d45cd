import arviz
import numpy as np
import pytest
import torch
from nets import build

import pyro_bmrs as bmrs


def test_groups_and_shapes():
    model, guide, _ = build("mlp")
    model.noise["fc2_noise.theta"].remove(torch.arange(12) < 4)
    data = bmrs.to_arviz(guide, draws=50)
    for site, size in guide.sizes.items():
        assert data.posterior[site].shape == (1, 50, size)
        assert data.prior[site].shape == (1, 50, size)
    assert data.constant_data["fc2_noise.theta.kept"].values.tolist() == [0] * 4 + [1] * 8


def test_draws_follow_the_posterior():
    _, guide, _ = build("mlp")
    data = bmrs.to_arviz(guide, draws=4000)
    for site, posterior in guide.posterior().items():
        error = posterior.stddev.detach().numpy() / 4000**0.5
        difference = data.posterior[site].mean(("chain", "draw")).values - posterior.mean.detach().numpy()
        assert (np.abs(difference) < 5 * error).all()


@pytest.mark.slow
def test_arviz_summarises_and_stores_it(tmp_path):
    _, guide, _ = build("mlp")
    data = bmrs.to_arviz(guide)
    summary = arviz.summary(data, kind="stats")
    assert len(summary) == 2 * sum(guide.sizes.values())  # theta and its logarithm
    data.to_netcdf(tmp_path / "posterior.nc", engine="h5netcdf")
    stored = arviz.from_netcdf(tmp_path / "posterior.nc", engine="h5netcdf")
    site = next(iter(guide.sizes))
    np.testing.assert_array_equal(stored.posterior[site].values, data.posterior[site].values)


def test_draws_are_reproducible_and_leave_the_random_state_alone():
    _, guide, _ = build("mlp")
    torch.manual_seed(1)
    a, b = bmrs.to_arviz(guide, draws=5, seed=3), bmrs.to_arviz(guide, draws=5, seed=3)
    after = torch.rand(2)
    torch.manual_seed(1)
    assert torch.equal(after, torch.rand(2))
    site = next(iter(guide.sizes))
    assert (a.posterior[site] == b.posterior[site]).all()


def test_draws_must_be_positive():
    _, guide, _ = build("mlp")
    with pytest.raises(ValueError, match="draws must be a positive integer, but got 0"):
        bmrs.to_arviz(guide, draws=0)


def test_evidence_changes_are_those_of_each_site():
    _, guide, _ = build("mlp")
    for site, found in bmrs.evidence_changes(guide, lambda prior: bmrs.precision_window(prior, 4)).items():
        prior = guide.prior()[site]
        expected = bmrs.evidence_change(guide.posterior()[site], prior, bmrs.precision_window(prior, 4))
        assert torch.equal(found, expected)
