import pytest
import torch
from nets import small_classifier
from torch import nn

import pyro_bmrs as bmrs


@pytest.mark.parametrize(("granularity", "examples"), [("shared", 20), ("batch", None)])
def test_a_loss_under_noise_and_the_kl_are_the_negative_elbo(granularity, examples):
    model, guide = small_classifier()
    x, y = torch.randn(20, 6), torch.randint(3, (20,))
    model.num_data = 100
    torch.manual_seed(1)
    expected = bmrs.MeanFieldELBO(granularity).differentiable_loss(model, guide, x, y) / 100
    torch.manual_seed(1)
    with bmrs.sampled_noise(model, guide, examples):
        loss = nn.functional.cross_entropy(model.net(x), y)
    torch.testing.assert_close(loss + guide.kl() / 100, expected)


def test_it_ends_with_the_block():
    model, guide = small_classifier()
    x = torch.randn(20, 6)
    torch.manual_seed(2)
    before = model.net(x)  # on its own a noise layer draws from its prior
    with bmrs.sampled_noise(model, guide):
        during = model.net(x)
    torch.manual_seed(2)
    torch.testing.assert_close(model.net(x), before, rtol=0, atol=0)
    assert not torch.equal(during, before)


def test_what_does_not_fit_is_refused():
    model, guide = small_classifier()
    with pytest.raises(ValueError, match="examples must be"), bmrs.sampled_noise(model, guide, 0):
        pass
    with pytest.raises(ValueError, match="guide"), bmrs.sampled_noise(small_classifier()[0], guide):
        pass
