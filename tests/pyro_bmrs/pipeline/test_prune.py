import copy
from dataclasses import dataclass

import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import pyro_bmrs as bmrs
from pyro_bmrs.pipeline.comparison import paired_change
from pyro_bmrs.pipeline.guessing import guessed
from pyro_bmrs.pipeline.tables import structure_table

GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(300, 8, generator=GENERATOR)
Y = (X[:, 0] + 0.5 * X[:, 1] > 0).long()
TRAIN, VALIDATION = (X[:200], Y[:200]), (X[200:], Y[200:])
SETTINGS = {"epochs": 40, "fine_tune_epochs": 10, "lr": 5e-3, "seed": 0, "progress": False}


@dataclass
class Output:
    logits: Tensor


class Net(nn.Module):
    def __init__(self, outputs=2):
        super().__init__()
        self.first, self.second, self.last = nn.Linear(8, 24), nn.Linear(24, 24), nn.Linear(24, outputs)

    def forward(self, x):
        return self.last(self.second(self.first(x).relu()).relu())


class Wrapped(Net):
    def forward(self, x):
        return Output(super().forward(x))


def made(kind=Net, *arguments):
    torch.manual_seed(0)
    return kind(*arguments)


@pytest.mark.slow
def test_it_is_what_the_pieces_do_one_after_the_other():
    net = made()
    pruned = bmrs.prune(net, TRAIN, VALIDATION, **SETTINGS)
    again = made()
    model = bmrs.NoisyNetwork(bmrs.attach_noise(again, bmrs.find_structures(again, X[:8])))
    guide = bmrs.TruncatedLogNormalGuide(model)
    result = bmrs.fit(model, guide, TRAIN, VALIDATION, **SETTINGS)
    small = bmrs.compact(model, guide, None, X[:8])
    torch.testing.assert_close(pruned.network(X), small(X), rtol=0, atol=0)
    assert pruned.result.compression == result.compression > 0.3
    assert isinstance(pruned.network, Net)


def test_nothing_of_the_callers_changes():
    net = made().train()
    net.first.weight.requires_grad_(False)
    before, random = copy.deepcopy(net.state_dict()), torch.get_rng_state()
    bmrs.prune(net, TRAIN, **{**SETTINGS, "epochs": 2})
    torch.testing.assert_close(net.state_dict(), before, rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), random)
    assert net.training
    assert [p.requires_grad for p in net.parameters()] == [False, True, True, True, True, True]
    assert not net.first._forward_pre_hooks


def test_a_refused_likelihood_has_drawn_nothing():
    random = torch.get_rng_state()
    with pytest.raises(TypeError, match="likelihood must return the distribution"):
        bmrs.prune(made_without_seed(), TRAIN, likelihood=lambda out: torch.randn(3))
    assert torch.equal(torch.get_rng_state(), random)


def made_without_seed():
    with torch.random.fork_rng([]):
        return Net()


@pytest.mark.slow
def test_it_prints_both_tables():
    net = made()
    text = str(bmrs.prune(net, TRAIN, VALIDATION, **SETTINGS))
    for part in (
        "layer",
        "first",
        "second",
        "kept %",
        "parameters",
        "FLOPs per example",
        "ms per batch of",
        "as given",
    ):
        assert part in text
    assert "validation accuracy %" in text
    assert "of 100 examples)" in text
    assert "had not been trained" in text or "±" in text
    assert "Not offered for removal: last" in text


@pytest.mark.slow
def test_noise_on_outputs_has_both_counts():
    """As the paper places it: what is removed, and what would be counted where outputs are only masked."""
    net = Net()
    structures = bmrs.find_structures(net, X[:2], outputs=["first", "second"]).select(kinds="output")
    pruned = bmrs.prune(net, TRAIN, VALIDATION, structures=structures, **SETTINGS)
    gone = {site: int((~mask).sum()) for site, mask in pruned.result.masks.items()}
    rows = 9 * gone["first.theta"] + 25 * gone["second.theta"]
    assert pruned.masked_parameters == bmrs.count_parameters(net) - rows > bmrs.count_parameters(pruned.network)
    assert f"only masked: {pruned.masked_parameters:,} (rows of masked outputs alone)" in str(pruned)


@pytest.mark.slow
def test_a_size():
    pruned = bmrs.prune(made(), TRAIN, VALIDATION, remove=0.7, **SETTINGS)
    dense, small = pruned.comparison.parameters
    assert small == bmrs.count_parameters(pruned.network)
    assert 1 - small / dense == pytest.approx(0.7, abs=0.02)
    flops = bmrs.prune(made(), TRAIN, remove=0.7, cost="flops", **SETTINGS).comparison.flops
    assert 1 - flops[1] / flops[0] == pytest.approx(0.7, abs=0.02)
    with pytest.raises(TypeError, match="remove and pruning exclude each other"):
        bmrs.prune(made(), TRAIN, remove=0.5, pruning=bmrs.Continuous())


def test_outputs_loaders_and_mappings():
    loader = DataLoader(TensorDataset(*TRAIN), batch_size=20, shuffle=True)
    settings = {**SETTINGS, "epochs": 3, "fine_tune_epochs": 1, "posterior_lr": 0.1}
    pruned = bmrs.prune(made(Wrapped), loader, output=lambda out: out.logits, **settings)
    assert isinstance(pruned.network(X), Output)
    named = {"x": TRAIN[0], "labels": TRAIN[1]}
    assert bmrs.prune(made(), named, named, **settings).comparison.evaluations[1].accuracy is not None


@pytest.mark.slow
def test_regression_and_noise_of_ones_own():
    y = X[:, 0] + 0.1 * torch.randn(300, generator=GENERATOR)
    net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), bmrs.MultiplicativeNoise(16), nn.Linear(16, 1))
    pruned = bmrs.prune(net, (X, y), likelihood=lambda out: dist.Normal(out.squeeze(-1), 0.1), **SETTINGS)
    assert "training RMSE" in str(pruned)
    assert pruned.structures is None
    assert not [each for each in pruned.network.modules() if isinstance(each, bmrs.MultiplicativeNoise)]


def test_some_structures_only():
    net = made()
    chosen = bmrs.find_structures(net, X[:8]).select(names="second")
    pruned = bmrs.prune(net, TRAIN, structures=chosen, **{**SETTINGS, "epochs": 3, "posterior_lr": 0.1})
    assert list(pruned.result.masks) == ["second.theta"]


@pytest.mark.parametrize(
    ("net", "y", "settings", "error", "message"),
    [
        (
            Net,
            Y.float(),
            {},
            TypeError,
            r"for a regression, .*Normal\(out.squeeze\(-1\), 0.1\); for labels of 0 and 1, ",
        ),
        (lambda: Net(1), Y, {}, ValueError, r"one output per example.*Bernoulli\(logits=out.squeeze\(-1\)\)"),
        (Wrapped, Y, {}, TypeError, r"the network returns an Output: .* output=lambda out: out.logits"),
        (Wrapped, Y, {"output": "logits"}, TypeError, "output must be a function"),
        (Wrapped, Y, {"output": lambda out: out.nothing}, ValueError, "output does not take a Output"),
        (
            Net,
            Y.reshape(-1, 1),
            {},
            ValueError,
            r"leaves open where the classes are: .*: y\.squeeze\(1\), or y\.argmax",
        ),
        (Net, Y, {"epoch": 3}, TypeError, "unexpected keyword argument 'epoch'"),
        (Net, Y, {"kl_wieght": 3}, TypeError, r"prune got .*'kl_wieght'; did you mean kl_weight\? It takes remove, "),
        (Net, Y, {"hugo": 3}, TypeError, r"prune got an unexpected keyword argument 'hugo'\. It takes remove, "),
        (lambda: nn.Linear(8, 2), Y, {}, ValueError, "nothing of this network can be removed"),
        (lambda: 3, Y, {}, TypeError, "net must be"),
        (Net, Y, {"cost": "flops"}, ValueError, "cost='flops' is the cost of which remove= is the fraction"),
        (Net, Y, {"remove": 80}, ValueError, "remove must be a fraction"),
        (Net, Y, {"remove": -0.1}, ValueError, r"remove must be a fraction inside \(0, 1\), but got -0.1"),
        (
            lambda: Net(1),
            Y.float(),
            {"likelihood": lambda out: dist.Normal(out, -out.exp()).to_event(1)},
            ValueError,
            r"the likelihood is a Normal whose scale must satisfy GreaterThan\(lower_bound=0.0\), but is a Tensor",
        ),
    ],
)
def test_refusals(net, y, settings, error, message):
    with pytest.raises(error, match=message):
        bmrs.prune(made(net), (X, y), **settings)


def test_sequences_of_labels_are_guessed():
    likelihood = guessed(torch.randn(4, 7, 3), torch.zeros(4, 7, dtype=torch.long))
    assert likelihood(torch.randn(5, 7, 3)).batch_shape == (5,)


def test_columns_are_as_wide_as_names():
    name = "bert.encoder.layer.0.attention.self.query"
    lines = structure_table({name: 4, "a": 64}, {name: 3, "a": 1}).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert lines[2].split() == [name, "4", "3", "75.0%"]


def test_changes_are_told_with_their_uncertainty():
    before = torch.tensor([1.0, 0.0, 0.0, 1.0]).double()
    after = torch.tensor([1.0, 1.0, 1.0, 1.0]).double()
    assert paired_change(before, after) == "  +50.00 ± 25.00 (2 of 4 examples)"
    assert paired_change(before / 2, after) == "  +75.00 ± 12.50"
