import math

import pytest
import torch
from nets import build
from torch.distributions import Distribution

import pyro_bmrs as bmrs
from pyro_bmrs.model.supply import supply_noise

ALL = [
    bmrs.BMRS_N(),
    bmrs.BMRS_U(8, 23),
    bmrs.BMRS_U(4, 23),
    bmrs.BMRS_U(8),
    bmrs.SNR(1.0),
    bmrs.PosteriorMean(0.1),
    bmrs.WeightNorm(),
    bmrs.GradientWeightNorm(),
    bmrs.Random(seed=3),
]


@pytest.fixture
def context():
    """LeNet-5 in which every second structure has a posterior like the prior, and the others sit firmly at one."""
    model, guide, x = build("lenet5")
    with torch.no_grad():
        guide.loc.copy_(torch.where(torch.arange(len(guide.loc)) % 2 == 0, -9.0, -0.1))
        guide.log_scale.copy_(torch.where(torch.arange(len(guide.loc)) % 2 == 0, 4.0, -3.0))
    y = torch.arange(len(x)) % 10
    return bmrs.PruningContext(model, guide, bmrs.find_structures(model.net, x), x, y)


@pytest.mark.slow
@pytest.mark.parametrize("criterion", ALL, ids=repr)
def test_scores_are_finite_and_one_a_structure(criterion, context):
    scores = criterion.scores(context)
    assert {site: tuple(score.shape) for site, score in scores.items()} == {
        site: (size,) for site, size in context.model.sizes.items()
    }
    assert all(bool(torch.isfinite(score).all()) for score in scores.values())


@pytest.mark.slow
@pytest.mark.parametrize("criterion", ALL, ids=repr)
def test_what_has_been_removed_is_not_supported_again(criterion, context):
    for site, layer in context.model.noise.items():
        layer.remove(torch.arange(context.model.sizes[site]) < 3)
    assert not any(bool(removed[:3].any()) for removed in criterion.removable(context).values())


@pytest.mark.parametrize(
    "criterion", [bmrs.BMRS_N(prior_log_odds=math.log(3)), bmrs.SNR(1.0), bmrs.PosteriorMean(0.1)], ids=repr
)
def test_posteriors_like_the_prior_go_and_firm_ones_stay(criterion, context):
    flat = torch.cat(list(criterion.removable(context).values()))
    assert flat.tolist() == (torch.arange(len(flat)) % 2 == 0).tolist()


def test_evidence_scores_are_the_evidence_change_plus_the_odds(context):
    site, q = next(iter(context.guide.posterior().items()))
    prior = context.guide.prior()[site]
    found = bmrs.BMRS_N(prior_log_odds=0.5).scores(context)[site]
    torch.testing.assert_close(found, bmrs.evidence_change(q, prior, bmrs.spike(prior)).detach() + 0.5)
    window = bmrs.BMRS_U(4, 23, prior_log_odds=0.5).scores(context)[site]
    torch.testing.assert_close(window, bmrs.evidence_change(q, prior, bmrs.precision_window(prior, 4)).detach() + 0.5)


def test_a_closed_window_keeps_what_collapsed_below_it(context):
    """BMRS_U's blind spot: mass below 2^-23 counts against removal, unless p2=None opens the window downwards."""
    with torch.no_grad():
        context.guide.loc.fill_(-19.0)
        context.guide.log_scale.fill_(-2.0)
    assert not any(bool(removed.any()) for removed in bmrs.BMRS_U(8, 23).removable(context).values())
    assert all(bool(removed.all()) for removed in bmrs.BMRS_U(8).removable(context).values())


def test_a_score_that_is_no_number_removes_nothing(context):
    class Broken(bmrs.Criterion):
        def scores(self, context):
            return {site: torch.full((size,), math.nan) for site, size in context.model.sizes.items()}

    assert not any(bool(removed.any()) for removed in Broken().removable(context).values())


def test_a_score_of_exactly_zero_removes(context):
    class Even(bmrs.Criterion):
        def scores(self, context):
            return {site: torch.zeros(size) for site, size in context.model.sizes.items()}

    assert all(bool(removed.all()) for removed in Even().removable(context).values())


@pytest.mark.parametrize("kind", [bmrs.WeightNorm, bmrs.GradientWeightNorm, bmrs.Random])
def test_rankings_match_the_compression_of_another_criterion(kind, context):
    match = bmrs.BMRS_N(prior_log_odds=math.log(3))

    def parameters(criterion):
        masks = {site: ~removed for site, removed in criterion.removable(context).items()}
        return bmrs.count_parameters(context.model.net, context.structures, masks)

    dense = bmrs.count_parameters(context.model.net)
    assert parameters(match) < dense
    # As close as whole structures allow: a conv2 filter is worth 25 * 120 of the 61,706 parameters.
    assert 0 <= parameters(match) - parameters(kind(match=match)) < 0.06 * dense


@pytest.mark.parametrize("kind", [bmrs.WeightNorm, bmrs.GradientWeightNorm, bmrs.Random])
def test_rankings_can_match_the_number_of_structures(kind, context):
    match = bmrs.BMRS_N(prior_log_odds=math.log(3))
    ranking = kind(match, match_by="structures")
    removed = torch.cat(list(ranking.removable(context).values()))
    scores = torch.cat(list(ranking.scores(context).values()))
    keep = torch.cat(list(context.model.masks.values()))
    expected = sum(int(each.sum()) for each in match.removable(context).values())
    assert 0 < expected == int(removed.sum()) < int(keep.sum())
    assert not bool((removed & ~keep).any())
    assert scores[removed].min() >= scores[keep & ~removed].max()


def test_rankings_match_parameters_or_structures_and_nothing_else():
    with pytest.raises(ValueError, match="match_by must be one of"):
        bmrs.WeightNorm(match_by="flops")


def test_weight_norm_is_the_norm_of_incoming_weights(context):
    scores = bmrs.WeightNorm().scores(context)
    torch.testing.assert_close(
        -scores["conv2_noise.theta"], context.model.net.conv2.weight.flatten(1).norm(dim=1).detach()
    )
    torch.testing.assert_close(-scores["fc1_noise.theta"], context.model.net.fc1.weight.norm(dim=1).detach())


def test_gradient_weight_norm_is_the_product_of_both_norms(context):
    net = context.model.net
    scores = bmrs.GradientWeightNorm().scores(context)
    means = {site: mean.detach() for site, mean in context.guide.mean().items()}
    with supply_noise(context.model.noise, means):
        loss = torch.nn.functional.cross_entropy(net(context.x), context.y)
    gradient = torch.autograd.grad(loss, net.fc2.weight)[0]
    torch.testing.assert_close(-scores["fc2_noise.theta"], gradient.norm(dim=1) * net.fc2.weight.norm(dim=1))


def test_a_new_reduced_prior_is_one_small_class(context):
    class HalfWindow(bmrs.EvidenceCriterion):
        def reduced_prior(self, prior) -> Distribution:
            return bmrs.LogUniform(prior.log_low, prior.log_low / 2)

    scores = HalfWindow().scores(context)
    assert bool((torch.cat(list(scores.values()))[1::2] < 0).all())


def test_odds_may_differ_by_site_and_structure(context):
    sizes = context.model.sizes
    odds = {site: torch.linspace(-1, 1, size) for site, size in sizes.items()}
    odds["conv1_noise.theta"] = 0.25
    plain = bmrs.BMRS_N().scores(context)
    for site, score in bmrs.BMRS_N(prior_log_odds=odds).scores(context).items():
        torch.testing.assert_close(score, plain[site] + odds[site])
    with pytest.raises(ValueError, match=r"'fc1_noise.theta' must be a number or of shape \(120,\).*\(3,\)"):
        bmrs.BMRS_N(prior_log_odds={**odds, "fc1_noise.theta": torch.zeros(3)}).scores(context)
    with pytest.raises(ValueError, match=r"no entry for site 'conv2_noise\.theta'"):
        bmrs.BMRS_N(prior_log_odds={"conv1_noise.theta": 0.0}).scores(context)


@pytest.mark.parametrize("cost", ["parameters", "flops"])
def test_odds_proportional_to_cost(cost, context):
    odds = bmrs.cost_log_odds(context.model.net, context.x, mean=1.5, cost=cost)
    flat = torch.cat(list(odds.values()))
    assert flat.mean() == pytest.approx(1.5)
    per_structure = {site: values[0].item() for site, values in odds.items()}
    assert all(values.unique().numel() == 1 for values in odds.values())
    # Parameters: a conv2 filter owns 6 * 25 + 1 weights and 25 columns of 120; an fc2 neuron 121 and a column of 10.
    # FLOPs: the same layers, each convolution weight used at 10 x 10 positions, biases free.
    expected = (151 + 25 * 120) / (121 + 10) if cost == "parameters" else (6 * 25 * 100 + 25 * 120) / (120 + 10)
    assert per_structure["conv2_noise.theta"] / per_structure["fc2_noise.theta"] == pytest.approx(expected, rel=1e-6)
    with pytest.raises(ValueError, match="'watts'"):
        bmrs.cost_log_odds(context.model.net, context.x, mean=1.0, cost="watts")


def test_a_prior_far_from_its_bound_is_warned_of():
    near, far = (bmrs.TruncatedLogNormal(loc, 2.0, -20.0, 0.0) for loc in (-15.0, -2.0))
    bmrs.BMRS_N().reduced_prior(near)
    with pytest.warns(
        bmrs.UnreliableEvidenceWarning, match="lower bound .* is 9 standard deviations below its location"
    ):
        bmrs.BMRS_N().reduced_prior(far)


@pytest.mark.parametrize("match_by", ["parameters", "structures"])
def test_what_has_been_spared_is_not_removed_again(match_by):
    model, guide, x = build("mlp")
    context = bmrs.PruningContext(model, guide, bmrs.find_structures(model.net, x), x, torch.arange(len(x)) % 4)
    match = bmrs.PosteriorMean(float(torch.cat([*guide.mean().values()]).detach().median()))
    ranking = bmrs.Random(match, match_by=match_by, seed=3)
    first = ranking.removable(context)
    assert any(bool((removed & ~match.removable(context)[site]).any()) for site, removed in first.items())
    for site, layer in model.noise.items():
        layer.remove(first[site])
    assert not any(bool(removed.any()) for removed in ranking.removable(context).values())


def test_a_ranking_and_shrinking_exclude_each_other():
    model, guide, x = build("mlp")
    with pytest.raises(ValueError, match="shrink=True cuts out what Random, which only ranks"):
        bmrs.fit(model, guide, (x, torch.arange(len(x)) % 4), criterion=bmrs.Random(),
                 pruning=bmrs.Continuous(shrink=True))  # fmt: skip


def test_a_ranking_matches_what_a_fit_would_remove_by_default():
    assert bmrs.WeightNorm().match == bmrs.Random().match == bmrs.BMRS_N(prior_log_odds=math.log(3))
