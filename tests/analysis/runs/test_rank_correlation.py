import pytest
import scipy.stats
import torch

from analysis.runs.rank_correlation import spearman


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


def test_what_has_no_rank_is_refused():
    with pytest.raises(FloatingPointError, match="row 1 has a NaN score"):
        spearman(torch.tensor([[1.0, 2.0], [torch.nan, 1.0]]))
