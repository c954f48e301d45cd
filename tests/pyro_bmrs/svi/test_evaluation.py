import math

import pyro.distributions as dist
import pytest
import torch
from torch import nn

import pyro_bmrs as bmrs
from pyro_bmrs.svi.evaluation import evaluate

GENERATOR = torch.Generator().manual_seed(0)
LOGITS = torch.randn(50, 4, generator=GENERATOR)
LABELS = torch.randint(3, (50,), generator=GENERATOR)


def evaluated(likelihood, x, y, parts=3):
    return evaluate(lambda each: each, likelihood, zip(x.tensor_split(parts), y.tensor_split(parts), strict=True))


def test_class_labels():
    found = evaluated(lambda out: dist.Categorical(logits=out), LOGITS, LABELS)
    right = LOGITS.argmax(-1) == LABELS
    assert found.accuracy == pytest.approx(right.double().mean().item())
    for label in range(3):
        assert found.recall[label] == pytest.approx(right[label == LABELS].double().mean().item())
    assert found.recall[3] is None
    assert found.majority == max((label == LABELS).double().mean().item() for label in range(3))
    expected = -nn.functional.cross_entropy(LOGITS, LABELS, reduction="none").double()
    torch.testing.assert_close(found.log_likelihood, expected)
    assert found.metrics()["recall_validation"] == found.recall


def test_a_sequence_of_labels():
    logits, labels = LOGITS.reshape(10, 5, 4), LABELS.reshape(10, 5)
    found = evaluated(lambda out: dist.Categorical(logits=out).to_event(1), logits, labels)
    assert found.accuracy == pytest.approx((LOGITS.argmax(-1) == LABELS).double().mean().item())
    assert found.recall is None
    assert found.correct.shape == (10,)


def test_several_labels_of_0_and_1():
    labels = (LOGITS + torch.randn(50, 4, generator=GENERATOR) > 0).float()
    found = evaluated(lambda out: dist.Bernoulli(logits=out).to_event(1), LOGITS, labels)
    assert found.accuracy == pytest.approx(((LOGITS > 0) == labels.bool()).double().mean().item())


@pytest.mark.parametrize("family", [dist.Normal, dist.Laplace])
def test_numbers(family):
    y = LOGITS[:, 0] + 0.3
    found = evaluated(lambda out: family(out[:, 0], 0.5), LOGITS, y)
    assert found.metrics()["rmse_validation"] == pytest.approx(0.3, abs=1e-6)
    assert found.accuracy is None


def test_what_has_no_mean_has_a_log_likelihood():
    found = evaluated(lambda out: dist.Cauchy(out[:, 0], 0.5), LOGITS, LOGITS[:, 1])
    assert found.metrics().keys() == {"log_likelihood_validation"}
    assert math.isfinite(found.metrics()["log_likelihood_validation"])


def test_any_distribution_of_pyro():
    likelihood = lambda out: dist.TransformedDistribution(  # noqa: E731
        dist.Normal(out[:, 0], 1.0), [torch.distributions.transforms.TanhTransform()]
    )
    found = evaluated(likelihood, LOGITS, torch.tanh(LOGITS[:, 1]) * 0.9)
    assert found.log_likelihood.shape == (50,)
    assert found.metrics().keys() == {"log_likelihood_validation"}


@pytest.mark.slow
def test_a_fit_says_which_class_it_has_given_up():
    x = torch.cat([torch.randn(300, 4, generator=GENERATOR), torch.randn(40, 4, generator=GENERATOR) + 2.0])
    y = torch.tensor([0] * 300 + [1] * 40)
    net = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), bmrs.MultiplicativeNoise(16), nn.Linear(16, 2))
    model = bmrs.NoisyNetwork(net)
    guide = bmrs.TruncatedLogNormalGuide(model)

    class Collapse(bmrs.Callback):
        def on_epoch_end(self, record):
            if record["epoch"] == 40:  # from here on the network says class 0
                with torch.no_grad():
                    net[3].bias += torch.tensor([50.0, 0.0])

    with pytest.warns(bmrs.FitWarning, match=r"class 1 is recognised in \d+ % of its 40 examples, after \d+ %"):
        bmrs.fit(
            model, guide, (x, y), (x, y), epochs=41, fine_tune_epochs=0, lr=1e-2, seed=0, progress=False,
            callbacks=[Collapse()],
        )  # fmt: skip
