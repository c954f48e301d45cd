"""Free-form evidence of networks: held to removing the noise from the average by brute force."""

import math

import pytest
import torch
from nets import blobs, small_classifier
from numpy.polynomial import chebyshev
from pyro.distributions import Normal
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import pyro_bmrs as bmrs
from pyro_bmrs.model.supply import supply_noise

X = torch.randn(300, 3, generator=torch.Generator().manual_seed(0))
LABELS = (X[:, 0] + X[:, 1].square() > 1).long()
NUMBERS = X[:, 0] - 0.5 * X[:, 1] + 0.3 * torch.randn(300, generator=torch.Generator().manual_seed(1))
FEW = {"epochs": 60, "fine_tune_epochs": 0, "batch_size": 30, "lr": 0.01, "seed": 0, "progress": False}


def make(outputs=2, likelihood=None, **settings):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), bmrs.MultiplicativeNoise(8), nn.Linear(8, outputs))
    model = bmrs.NoisyNetwork(net, likelihood=likelihood, **settings)
    return model, bmrs.TruncatedLogNormalGuide(model)


def regression(**settings):
    return make(1, lambda out: Normal(out.squeeze(-1), 0.3), **settings)


@torch.no_grad()
def brute_force(model, guide, x, y, draws=20, nodes=17):
    """Return the evidence by setting each structure's noise to fixed values, in many draws of the others'."""
    q = guide.flat_posterior()
    at = (1 - torch.cos(torch.arange(nodes) * math.pi / (nodes - 1))).double() / 2
    total = torch.zeros(8, nodes, dtype=torch.float64)
    for _ in range(draws):
        theta = q.sample((len(x),))
        for i in range(8):
            for j in range(nodes):
                changed = theta.clone()
                changed[:, i] = at[j]
                with supply_noise(model.noise, guide.split(changed)):
                    total[i, j] += model.likelihood(model.net(x)).log_prob(y).double().sum() / draws
    gain = chebyshev.chebfit(2 * at.numpy() - 1, (total - total[:, :1]).T.numpy(), nodes - 1)
    u = torch.linspace(-20, 0, 20_001, dtype=torch.float64)
    values = torch.from_numpy(chebyshev.chebval(2 * u.exp().numpy() - 1, gain))
    return -(torch.logsumexp(values / model.kl_weight, -1) + math.log(1 / 20_000))


@pytest.mark.slow
@pytest.mark.parametrize(("build", "y"), [(make, LABELS), (regression, NUMBERS)])
@pytest.mark.parametrize("kl_weight", [1.0, 4.0])
def test_evidence_is_near_that_of_brute_force(build, y, kl_weight):
    model, guide = build(kl_weight=kl_weight)
    gradients = bmrs.TrainingGradients(guide)
    bmrs.fit(model, guide, (X, y), criterion=None, **FEW)
    exact = brute_force(model, guide, X, y)
    found = bmrs.free_form_evidence(model, guide, (X, y), pairs=4)
    heard = gradients.evidence(X)
    near = exact.abs() < 3
    assert near.any()
    for each in (found, heard):
        delta_f, error = each.delta_f["2.theta"], each.standard_error["2.theta"]
        assert ((delta_f - exact).abs() < 4 * error + 0.15 + 0.3 * exact.abs()).all()
        assert torch.equal(delta_f >= -math.log(3), exact >= -math.log(3))
    formula = bmrs.evidence_changes(guide)["2.theta"].double()
    assert (found.delta_f["2.theta"] - exact)[near].abs().mean() < (formula - exact)[near].abs().mean()


@pytest.mark.slow
def test_data_may_come_in_batches_and_the_random_state_is_left_alone():
    model, guide = make()
    state = torch.get_rng_state()
    whole = bmrs.free_form_evidence(model, guide, (X, LABELS), pairs=20).delta_f["2.theta"]
    assert torch.equal(torch.get_rng_state(), state)
    loader = DataLoader(TensorDataset(X, LABELS), batch_size=64)
    found, again = (bmrs.free_form_evidence(model, guide, loader, pairs=20) for _ in range(2))
    assert ((found.delta_f["2.theta"] - whole).abs() < 6 * found.standard_error["2.theta"]).all()
    assert torch.equal(again.delta_f["2.theta"], found.delta_f["2.theta"])


def test_removed_structures_have_none():
    model, guide = make()
    model.noise["2.theta"].remove(torch.arange(8) < 3)
    found = bmrs.free_form_evidence(model, guide, (X, LABELS))
    assert found.delta_f["2.theta"].isnan().tolist() == [True] * 3 + [False] * 5
    assert found.standard_error["2.theta"].isnan().tolist() == [True] * 3 + [False] * 5


@pytest.mark.slow
@pytest.mark.parametrize("heard", [False, True])
def test_the_criterion_prunes(heard):
    model, guide = make(kl_weight=3.0)
    data = bmrs.TrainingGradients(guide) if heard else (X, LABELS)
    criterion = bmrs.FreeFormCriterion(data, prior_log_odds=math.log(3))
    result = bmrs.fit(model, guide, (X, LABELS), criterion=criterion, **{**FEW, "fine_tune_epochs": 5})
    assert 0 < sum(int((~mask).sum()) for mask in result.masks.values()) < 8
    assert bmrs.evaluate(model, guide, (X, LABELS)).at_mean.accuracy > 0.85


def test_stages_judge_what_goes_together():
    """Two equal structures: the data need one of them, and either alone could go."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 2), bmrs.MultiplicativeNoise(2), nn.Linear(2, 1))
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([[1.0, 0, 0], [1.0, 0, 0]]))
        net[0].bias.zero_()
        net[2].weight.copy_(torch.tensor([[1.0, 1.0]]))
        net[2].bias.zero_()
    model = bmrs.NoisyNetwork(net, likelihood=lambda out: Normal(out.squeeze(-1), 0.5), num_data=300)
    guide = bmrs.TruncatedLogNormalGuide(model, init_loc=math.log(0.5))
    y = 0.5 * X[:, 0]  # what is predicted is X[:, 0]: one of the two is too much
    context = bmrs.PruningContext(model, guide, bmrs.find_structures(net, X[:2]), X, y)
    alone = bmrs.FreeFormCriterion((X, y)).scores(context)["1.theta"]
    jointly = bmrs.FreeFormCriterion((X, y), stages=2).scores(context)["1.theta"]
    assert (alone > 0).all()
    assert sorted((jointly > 0).tolist()) == [False, True]
    assert model.noise["1.theta"].keep.all()


@pytest.mark.slow
def test_a_fit_by_the_data_is_resumed_to_the_bit(tmp_path):
    def fitted(**settings):
        model, guide = make(kl_weight=3.0)
        criterion = bmrs.FreeFormCriterion((X, LABELS), prior_log_odds=math.log(3))
        short = {**FEW, "epochs": 8, "kl_warmup_epochs": 2}
        return bmrs.fit(model, guide, (X, LABELS), criterion=criterion, **short, **settings), guide

    class Stop(bmrs.Callback):
        def on_epoch_end(self, record):
            if record["epoch"] == 5:
                raise KeyboardInterrupt

    _, whole = fitted()
    with pytest.raises(KeyboardInterrupt):
        fitted(folder=tmp_path, callbacks=[Stop()])
    _, again = fitted(folder=tmp_path, resume=True)
    assert torch.equal(whole.loc, again.loc)


@pytest.mark.filterwarnings("ignore::pyro_bmrs.FitWarning")
def test_what_cannot_be_heard_is_said():
    model, guide = make()
    gradients = bmrs.TrainingGradients(guide)
    with pytest.raises(ValueError, match="no gradients have been taken yet"):
        gradients.evidence(X)
    short = {**FEW, "epochs": 2}
    with pytest.raises(ValueError, match=r'granularity="example" or "shared"'):
        bmrs.fit(model, guide, (X, LABELS), granularity="batch", **short)
    with pytest.raises(ValueError, match="compile=True excludes listening"):
        bmrs.fit(model, guide, (X, LABELS), compile=True, **short)
    other, its_guide = make()
    criterion = bmrs.FreeFormCriterion(gradients)
    with pytest.raises(ValueError, match="of another guide than is fitted"):
        bmrs.fit(other, its_guide, (X, LABELS), criterion=criterion, **short)
    with pytest.raises(ValueError, match="stages of FreeFormCriterion must be 1 with TrainingGradients"):
        bmrs.FreeFormCriterion(gradients, stages=2)
    with pytest.raises(TypeError, match="needs the training data"):
        bmrs.FreeFormCriterion(None)
    with pytest.raises(TypeError, match="guide must be"):
        bmrs.TrainingGradients(model)


def test_uneven_batches_and_shrinking_are_heard_rightly():
    """By the sums over one pass, whose gradients are those of each example whatever its batch."""
    model, guide = small_classifier()
    x, y = blobs(150)
    gradients = bmrs.TrainingGradients(guide, epochs=1)
    frozen = {"lr": 1e-12, "posterior_lr": 1e-12, "criterion": None, "seed": 0, "progress": False}
    bmrs.fit(model, guide, (x, y), epochs=3, fine_tune_epochs=0, batch_size=40, kl_warmup_epochs=0, **frozen)
    n, _, _, level, *_ = gradients.sums.values
    found = level / n
    expected = bmrs.free_form_evidence(model, guide, (x, y), pairs=30).factors
    for site, part in guide.split(found).items():
        mean = guide.posterior()[site].mean.detach().double()
        slope = (expected[site].slope + expected[site].curvature * mean) / 150
        assert (part - slope).abs().max() < 0.15 * slope.abs().max()
