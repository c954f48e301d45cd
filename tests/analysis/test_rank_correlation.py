import json

import pytest
import scipy.stats
import torch
from nets import build

import pyro_bmrs as bmrs
from analysis.rank_correlation import CRITERIA, rank_correlation, spearman


@pytest.mark.parametrize("levels", [3, 10**6])
def test_spearman_is_scipys_with_and_without_ties(levels):
    scores = torch.randint(levels, (4, 60)).double()
    expected = torch.as_tensor(scipy.stats.spearmanr(scores.T.numpy()).statistic)
    torch.testing.assert_close(spearman(scores), expected, rtol=0, atol=1e-12)


def test_extremes_and_constants():
    found = spearman(torch.tensor([[1.0, 2.0, 3.0], [5.0, 6.0, 70.0], [3.0, 2.0, 1.0], [1.0, 1.0, 1.0]]))
    expected = torch.tensor([[1, 1, -1, 0], [1, 1, -1, 0], [-1, -1, 1, 0], [0, 0, 0, 1]]).double()
    torch.testing.assert_close(found, expected)
    infinite = spearman(torch.tensor([[1.0, 2.0, torch.inf], [-torch.inf, 0.0, 1.0]]))
    torch.testing.assert_close(infinite, torch.ones(2, 2, dtype=torch.float64))


@pytest.mark.parametrize("name", ["lenet5", "mlp", "resnet"])
def test_criteria_are_ranked_over_all_layers(name):
    model, guide, x = build(name)
    y = torch.zeros(len(x), dtype=torch.long)
    found = json.loads(json.dumps(rank_correlation(model, guide, x, y)))
    total = sum(model.sizes.values())
    assert found["methods"] == list(CRITERIA)
    assert found["structures"] == total
    for ranks in found["ranks"].values():
        assert {layer: len(each) for layer, each in ranks.items()} == {
            site.removesuffix(".theta"): size for site, size in model.sizes.items()
        }
        assert sum(map(sum, ranks.values())) == total * (total + 1) / 2
    matrix = torch.tensor(found["spearman"])
    assert torch.equal(matrix.diag(), torch.ones(len(CRITERIA)))
    torch.testing.assert_close(matrix, matrix.T)


def test_the_first_rank_is_what_goes_first_and_removed_structures_have_none():
    model, guide, x = build("mlp")
    y = torch.zeros(len(x), dtype=torch.long)
    model.noise["fc1_noise.theta"].remove(torch.arange(12) < 5)
    criteria = {"mean": bmrs.PosteriorMean(0.1), "again": bmrs.PosteriorMean(0.5)}
    found = rank_correlation(model, guide, x, y, criteria)
    assert found["structures"] == 31
    assert found["spearman"] == [[1.0, 1.0], [1.0, 1.0]]
    means = {site: mean.detach()[model.masks[site]] for site, mean in guide.mean().items()}
    ranks = found["ranks"]["mean"]
    first = min((rank, site, i) for site in means for i, rank in enumerate(ranks[site.removesuffix(".theta")]))
    assert float(means[first[1]][first[2]]) == min(float(mean.min()) for mean in means.values())


def test_what_has_no_rank_is_refused():
    model, guide, x = build("mlp")
    y = torch.zeros(len(x), dtype=torch.long)
    with pytest.raises(ValueError, match="1 criteria and 36 structures"):
        rank_correlation(model, guide, x, y, {"snr": bmrs.SNR(1.0)})

    class Broken(bmrs.Criterion):
        def scores(self, context):
            return {site: torch.full((12,), torch.nan) for site in context.guide.sizes}

    with pytest.raises(FloatingPointError, match="criterion 'broken' has a NaN score"):
        rank_correlation(model, guide, x, y, {"snr": bmrs.SNR(1.0), "broken": Broken()})
