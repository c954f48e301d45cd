"""What cannot be drawn or tabulated is refused in one line, and what shrinking leaves can."""

import math

import matplotlib.pyplot as plt
import pyro.distributions as dist
import pytest
import torch
from nets import blobs, build
from torch import nn

import pyro_bmrs as bmrs


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


@pytest.fixture(scope="module")
def shrunk():
    """Return guide and result of a fit from whose network structures have been cut."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), bmrs.MultiplicativeNoise(16), nn.Linear(16, 3))
    model = bmrs.NoisyNetwork(net)
    guide = bmrs.TruncatedLogNormalGuide(model)
    settings = {"epochs": 60, "fine_tune_epochs": 1, "batch_size": 20, "lr": 1e-2, "seed": 0, "progress": False}
    result = bmrs.fit(model, guide, blobs(), pruning=bmrs.Continuous(start=20, shrink=True), **settings)
    return model, guide, result


@pytest.mark.slow
def test_pictures_after_shrinking_have_original_numbers(shrunk):
    model, guide, result = shrunk
    assert 0 < guide.sizes["2.theta"] < 16
    changes = bmrs.evidence_changes(guide)
    left = torch.ones(guide.sizes["2.theta"], dtype=torch.bool)
    assert torch.equal(~changes["2.theta"].isnan(), model.noise["2.theta"].in_original(left, False))
    ax = bmrs.plot_evidence(changes, result.masks)
    assert f"{int(result.masks['2.theta'].sum())} of 16 kept" in ax.get_xticklabels()[0].get_text()
    snr = {site: model.noise[site].in_original(q.snr.detach(), math.nan) for site, q in guide.posterior().items()}
    bmrs.plot_evidence_snr(changes, snr)
    with pytest.raises(ValueError, match=r"snr of site '2.theta' must be of shape \(16,\), one per"):
        bmrs.plot_evidence_snr(changes, {site: q.snr for site, q in guide.posterior().items()})
    bmrs.plot_forest(guide)
    assert result.scores["2.theta"].shape == (16,)
    assert result.scores["2.theta"].isfinite().all()
    data = bmrs.to_arviz(guide, draws=5)
    expected = (~changes["2.theta"].isnan()).nonzero().flatten().tolist()
    assert data.posterior["2.theta_structure"].values.tolist() == expected


@pytest.mark.slow
def test_odds_of_each_structure_go_with_it_when_the_network_shrinks():
    masks = []
    settings = {"epochs": 40, "fine_tune_epochs": 1, "batch_size": 20, "lr": 1e-2, "seed": 0, "progress": False}
    criterion = bmrs.BMRS_N(prior_log_odds={"2.theta": torch.linspace(-3.0, 3.0, 16)})
    for shrink in (False, True):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), bmrs.MultiplicativeNoise(16), nn.Linear(16, 3))
        model = bmrs.NoisyNetwork(net)
        pruning = bmrs.Continuous(start=20, shrink=shrink)
        guide = bmrs.TruncatedLogNormalGuide(model)
        masks.append(bmrs.fit(model, guide, blobs(), criterion=criterion, pruning=pruning, **settings).masks["2.theta"])
    assert not masks[0].all()
    assert masks[0].shape == masks[1].shape == (16,)


BETA = dist.Beta(2.0, 3.0)


@pytest.mark.parametrize("family", [BETA, dist.Gamma(1.0, 1.0), dist.Normal(0.0, 1.0)])
def test_a_reduction_of_other_families_is_refused(family):
    with pytest.raises(NotImplementedError, match=f"draws .*, but posterior is an? {type(family).__name__}"):
        bmrs.plot_reduction(family, family, family)


def test_a_reduction_is_of_one_structure():
    prior = bmrs.LogUniform(torch.full((3,), -9.0))
    with pytest.raises(ValueError, match=r"plot_reduction draws one structure, but .* batch_shape \(3,\)"):
        bmrs.plot_reduction(prior, prior, bmrs.spike(prior))


CHANGES = {"a": torch.tensor([-1.0, 2.0])}
RESULT = bmrs.FitResult({}, {}, [], 0.0)
WRONG = {
    "a fit's result": (lambda: bmrs.plot_evidence(CHANGES, RESULT), TypeError, "pass its .masks"),
    "integers": (lambda: bmrs.plot_evidence(CHANGES, {"a": torch.tensor([0, 1])}), TypeError, "'a' must be a bool"),
    "other sites": (lambda: bmrs.plot_evidence(CHANGES, {"b": torch.ones(2) > 0}), ValueError, r"sites \['a'\]"),
    "other shapes": (lambda: bmrs.plot_evidence(CHANGES, {"a": torch.ones(3) > 0}), ValueError, "'a' must be of shape"),
    "nothing": (lambda: bmrs.plot_evidence({}), ValueError, "delta_f must have at least one site"),
    "no mapping": (lambda: bmrs.plot_evidence(torch.zeros(3)), TypeError, "delta_f must map sites to tensors"),
    "lists": (lambda: bmrs.plot_evidence_snr({"a": [1.0]}, {}), TypeError, "delta_f of site 'a' must be a tensor"),
    "odds": (lambda: bmrs.plot_evidence(CHANGES, prior_log_odds="3"), TypeError, "prior_log_odds must be a finite"),
    "axes": (lambda: bmrs.plot_evidence(CHANGES, ax=3), TypeError, "ax must be axes of Matplotlib"),
    "guide": (lambda: bmrs.plot_forest(None), TypeError, "guide must be a guide such as"),
    "mass": (lambda: bmrs.plot_forest(build("mlp")[1], mass=2.0), ValueError, r"mass must lie inside \(0, 1\)"),
    "history": (lambda: bmrs.plot_history(RESULT), TypeError, "pass its .history"),
    "draws": (lambda: bmrs.to_arviz(build("mlp")[1], draws=1.5), ValueError, "draws must be a positive integer"),
    "no guide": (lambda: bmrs.evidence_changes(3), TypeError, "guide must be a guide such as"),
    "no function": (lambda: bmrs.evidence_changes(build("mlp")[1], bmrs.LogUniform()), TypeError, "reduced_prior must"),
}


@pytest.mark.parametrize(("use", "error", "message"), WRONG.values(), ids=WRONG)
def test_what_cannot_be_drawn_is_named(use, error, message):
    with pytest.raises(error, match=message):
        use()


def test_structures_that_were_cut_out_are_not_drawn():
    changes = {"a": torch.tensor([-1.0, math.nan, 2.0]), "b": torch.full((2,), math.nan)}
    bmrs.plot_evidence(changes)
    bmrs.plot_evidence_snr(changes, {"a": torch.ones(3, requires_grad=True), "b": torch.ones(2)})


def test_noise_that_may_be_negative_has_no_logarithm():
    class NormalGuide(bmrs.FlatGuide):
        prior_types = (dist.Normal,)

        def __init__(self, model):
            super().__init__(model)
            self.loc = nn.Parameter(torch.zeros(4))

        def family(self, index=slice(None)):
            return dist.Normal(self.loc[index], 1.0)

    noise = bmrs.MultiplicativeNoise(4, prior=dist.Normal(torch.zeros(()), 1.0))
    model = bmrs.NoisyNetwork(nn.Sequential(nn.Linear(2, 4), noise, nn.Linear(4, 2)))
    with pytest.raises(ValueError, match="noise of a Normal posterior may be negative"):
        bmrs.plot_forest(NormalGuide(model))
