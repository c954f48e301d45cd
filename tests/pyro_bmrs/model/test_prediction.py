from dataclasses import dataclass

import pytest
import torch
from nets import build, random_masks
from pyro import poutine
from pyro.distributions import Categorical
from torch import nn

import pyro_bmrs as bmrs


def test_prediction_is_the_model_conditioned_on_the_masked_means():
    model, guide, x = build("mlp")
    masks = random_masks(model)
    values = {site: mean.detach() * masks[site] for site, mean in guide.mean().items()}
    with torch.no_grad():
        expected = poutine.condition(model, values)(x)
    torch.testing.assert_close(bmrs.predict(model, guide, x, masks), expected)


def test_default_masks_are_the_models_own_and_given_ones_replace_them():
    model, guide, x = build("mlp")
    dense = bmrs.predict(model, guide, x)
    masks = random_masks(model)
    masked = bmrs.predict(model, guide, x, masks)
    for site, layer in model.noise.items():
        layer.remove(~masks[site])
    assert torch.equal(bmrs.predict(model, guide, x), masked)
    everything = {site: torch.ones(size, dtype=torch.bool) for site, size in model.sizes.items()}
    assert torch.equal(bmrs.predict(model, guide, x, everything), dense)


def test_batches_do_not_matter_and_the_mode_is_left_alone():
    model, guide, x = build("batch_norm", batch=10)
    model.train()
    torch.testing.assert_close(bmrs.predict(model, guide, x, batch_size=3), bmrs.predict(model, guide, x))
    assert model.training


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        ({"fc9.theta": torch.ones(3, dtype=torch.bool)}, "no site 'fc9.theta' to mask; the model's sites are"),
        ({"fc1_noise.theta": torch.ones(5, dtype=torch.bool)}, r"bool tensor of shape \(12,\).*shape \(5,\)"),
        ({"fc1_noise.theta": torch.ones(12)}, "float32"),
        ({"fc1_noise.theta": [True] * 12}, "got list"),
    ],
)
def test_masks_that_do_not_fit_are_refused(masks, message):
    model, guide, x = build("mlp")
    with pytest.raises(ValueError, match=message):
        bmrs.predict(model, guide, x, masks)


@dataclass
class Answer:
    logits: torch.Tensor
    other: torch.Tensor | None = None


class Answering(nn.Module):
    """Returns its logits in one container or another."""

    def __init__(self, pack):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        self.pack = pack

    def forward(self, x):
        return self.pack(self.layers(x))


PACKED = {
    "tuple": (lambda logits: (logits, logits.sum(1)), lambda out: out[0]),
    "dict": (lambda logits: {"logits": logits, "count": 3}, lambda out: out["logits"]),
    "dataclass": (Answer, lambda out: out.logits),
}


@pytest.mark.parametrize("name", PACKED)
def test_networks_may_return_what_they_like(name):
    pack, unpack = PACKED[name]
    torch.manual_seed(0)
    x = torch.randn(40, 4)
    y = x[:, :3].argmax(1)
    net = Answering(pack)
    model = bmrs.NoisyNetwork(
        bmrs.attach_noise(net, bmrs.find_structures(net, x[:2])), lambda out: Categorical(logits=unpack(out))
    )
    guide = bmrs.TruncatedLogNormalGuide(model)
    result = bmrs.fit(model, guide, (x, y), (x, y), epochs=2, fine_tune_epochs=1, batch_size=10, progress=False, seed=0)
    assert "accuracy_validation" in result.history[-1]
    whole, parts = (unpack(bmrs.predict(model, guide, x, batch_size=size)) for size in (40, 7))
    torch.testing.assert_close(whole, parts)
    small = bmrs.compact(model, guide, result.masks, x[:2])
    torch.testing.assert_close(unpack(small(x)), whole)


def test_bytes_become_numbers_of_the_networks_own_dtype():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)).double()
    x, y = torch.randint(256, (20, 2, 2), dtype=torch.uint8), torch.randint(2, (20,))
    model = bmrs.NoisyNetwork(bmrs.attach_noise(net, bmrs.find_structures(net, x[:2])))
    guide = bmrs.TruncatedLogNormalGuide(model)
    bmrs.fit(model, guide, (x, y), epochs=1, fine_tune_epochs=1, batch_size=10, progress=False, seed=0)
    assert bmrs.predict(model, guide, x).dtype == torch.float64
