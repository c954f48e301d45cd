import copy
import warnings

import pytest
import torch
from nets import blobs, build
from torch import nn

import pyro_bmrs as bmrs
from analysis.data.sets import digits
from analysis.runs.baselines import narrowed, train_baseline, train_from_scratch
from analysis.runs.dense import accuracy
from models import lenet5, mlp
from pyro_bmrs.structures.compact import without_noise
from pyro_bmrs.structures.layers import ChannelScale

IMPORTANCES = ["magnitude", "taylor", "group_norm"]
SETTINGS = {"batch_size": 64, "lr": 4e-3, "seed": 0}


def caffe():
    """Convolutions, and noise on single positions of the feature maps as LeNet-5-Caffe has it, made small."""
    return nn.Sequential(
        nn.Conv2d(1, 4, 5), nn.ReLU(), bmrs.MultiplicativeNoise(4), nn.MaxPool2d(4), nn.Flatten(),
        bmrs.MultiplicativeNoise(196), nn.Linear(196, 12), nn.ReLU(), bmrs.MultiplicativeNoise(12), nn.Linear(12, 10),
    )  # fmt: skip


def small_mlp():
    return mlp(1024, hidden=20, layers=3)


def parameters_of(net):
    return {name: tuple(parameter.shape) for name, parameter in net.named_parameters()}


@pytest.mark.slow
@pytest.mark.parametrize("ranking", ["layer", "network"])
@pytest.mark.parametrize("importance", IMPORTANCES)
@pytest.mark.parametrize("make", [lenet5, small_mlp, caffe])
def test_a_baseline_meets_its_budget_and_keeps_its_outputs(make, importance, ranking):
    torch.manual_seed(0)
    net, (x, y) = make(), digits().train
    before = copy.deepcopy(net.state_dict())
    baseline = train_baseline(net, (x[:256], y[:256]), importance, 0.8, epochs=4, **SETTINGS, ranking=ranking)
    removed = 1 - bmrs.count_parameters(baseline) / bmrs.count_parameters(net)
    assert 0.8 <= removed < 0.9
    assert baseline(x[:3]).shape == (3, 10)
    assert all(parameter.isfinite().all() for parameter in baseline.parameters())
    assert not any(isinstance(module, bmrs.MultiplicativeNoise) for module in baseline.modules())
    assert not baseline.training
    for name, value in net.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("importance", IMPORTANCES)
def test_a_baseline_learns_and_finds_the_features_of_a_small_problem(importance):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 32), nn.ReLU(), bmrs.MultiplicativeNoise(32), nn.Linear(32, 3))
    x, y = blobs(1000)
    baseline = train_baseline(net, (x[:800], y[:800]), importance, 0.7, epochs=24, batch_size=40, lr=1e-2, seed=0)
    assert accuracy(baseline(x[800:]), y[800:]) > 0.9
    assert baseline[0].out_features == baseline[3].in_features <= 9


@pytest.mark.slow
def test_every_structure_of_a_residual_network_may_go():
    model, _, x = build("resnet", batch=40)
    y = torch.randint(4, (40,))
    for importance in IMPORTANCES:
        baseline = train_baseline(model.net, (x, y), importance, 0.5, epochs=2, batch_size=20, lr=1e-3, seed=0)
        assert bmrs.count_parameters(baseline) <= 0.5 * bmrs.count_parameters(model.net)
        assert baseline(x).shape == (40, 4)


def test_the_seed_decides_and_bytes_are_images():
    torch.manual_seed(0)
    net, (x, y) = mlp(64, hidden=8, layers=2), digits(8).train
    x = (255 * x[:128]).to(torch.uint8)

    def run(seed, x):
        return train_baseline(net, (x, y[:128]), "taylor", 0.5, epochs=2, batch_size=32, lr=1e-3, seed=seed)(x / 255)

    state = torch.get_rng_state()
    assert torch.equal(run(0, x), run(0, x))
    assert not torch.equal(run(0, x), run(1, x))
    torch.testing.assert_close(
        run(0, x), train_baseline(net, (x / 255, y[:128]), "taylor", 0.5, 2, 32, 1e-3, 0)(x / 255)
    )
    assert torch.equal(torch.get_rng_state(), state)


def test_no_budget_is_plain_training():
    torch.manual_seed(0)
    net, (x, y) = mlp(64, hidden=8, layers=2), digits(8).train
    baseline = train_baseline(net, (x[:128], y[:128]), "magnitude", 0.0, epochs=3, **SETTINGS)
    assert parameters_of(baseline) == parameters_of(net)


def test_a_narrow_layer_down_to_one_structure_stays_finite():
    torch.manual_seed(0)
    net, (x, y) = mlp(64, hidden=3, layers=2), digits(8).train
    baseline = train_baseline(net, (x[:128], y[:128]), "group_norm", 0.6, epochs=8, **SETTINGS, ranking="network")
    assert 1 in (baseline.fc1.out_features, baseline.fc2.out_features)
    assert all(parameter.isfinite().all() for parameter in baseline.parameters())


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"importance": "loss"}, "importance must be one of"),
        ({"ranking": "model"}, "ranking must be one of"),
        ({"budget": 1.0}, r"budget must be a fraction .* got 1.0"),
        ({"epochs": 1}, "epochs must be at least 2"),
        ({"budget": 0.999}, "cannot have fewer than .* choose a smaller budget"),
    ],
)
def test_what_cannot_be_is_refused(changed, message):
    net, (x, y) = mlp(64, hidden=8, layers=2), digits(8).train
    settings = {"importance": "magnitude", "budget": 0.5, "epochs": 2, **SETTINGS, **changed}
    with pytest.raises(ValueError, match=message):
        train_baseline(net, (x[:128], y[:128]), **settings)


@pytest.mark.parametrize("name", ["mlp", "lenet5", "noise_on_positions", "batch_norm"])
def test_without_noise_is_the_network_outside_a_model(name):
    model, _, x = build(name)
    plain = without_noise(model.net)
    assert not any(isinstance(module, bmrs.MultiplicativeNoise) for module in plain.modules())
    model.eval()
    torch.testing.assert_close(plain.eval()(x), model.net(x), rtol=0, atol=0)


def test_narrowed_has_the_widths_of_a_run():
    torch.manual_seed(0)
    net = lenet5()
    small = narrowed(
        net, {"conv1_noise": 2, "conv2_noise": 5, "fc1_noise": 7, "fc2_noise": 0}, torch.rand(2, 1, 32, 32)
    )
    assert parameters_of(small) == {
        "conv1.weight": (2, 1, 5, 5), "conv1.bias": (2,), "conv2.weight": (5, 2, 5, 5), "conv2.bias": (5,),
        "fc1.weight": (7, 125), "fc1.bias": (7,), "fc2.weight": (1, 7), "fc2.bias": (1,),
        "output.weight": (10, 1), "output.bias": (10,),
    }  # fmt: skip
    with pytest.raises(ValueError, match="cannot keep 121 structures of layer 'fc1_noise'"):
        narrowed(net, {"fc1_noise": 121}, torch.rand(2, 1, 32, 32))
    with pytest.raises(ValueError, match=r"cannot keep 1 structures of layer 'fc9_noise'.*'fc1_noise': 120"):
        narrowed(net, {"fc9_noise": 1}, torch.rand(2, 1, 32, 32))


@pytest.mark.parametrize("name", ["lenet5", "noise_on_positions", "noise_between_tanhs"])
def test_from_scratch_keeps_the_architecture_and_nothing_else(name):
    model, guide, x = build(name, batch=32)
    masks = {site: torch.arange(size) % 2 == 0 for site, size in model.sizes.items()}
    pruned = bmrs.compact(model, guide, masks, x)
    before = copy.deepcopy(pruned.state_dict())
    y = torch.randint(2, (32,))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        nets = [train_from_scratch(pruned, (x, y), epochs=0, batch_size=16, lr=0.0, seed=seed) for seed in (0, 0, 1)]
    assert parameters_of(nets[0]) == parameters_of(pruned)
    for key, parameter in nets[0].named_parameters():
        assert torch.equal(parameter, nets[1].get_parameter(key))
        assert not torch.equal(parameter, nets[2].get_parameter(key))
        assert not torch.equal(parameter, before[key])
    assert not any(isinstance(module, ChannelScale) for module in nets[0].modules())
    for key, value in pruned.state_dict().items():
        assert torch.equal(value, before[key])


def test_from_scratch_learns():
    x, y = blobs(1000)
    small = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    trained = train_from_scratch(small, (x[:800], y[:800]), epochs=20, batch_size=40, lr=1e-2, seed=0)
    assert accuracy(trained(x[800:]), y[800:]) > 0.9
