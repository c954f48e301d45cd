"""Shrinking between two steps changes neither of them: held to the masked network, trained on with the same noise."""

import pytest
import torch
from nets import NETWORKS, build, random_masks
from pyro.distributions import Beta
from torch import nn

import pyro_bmrs as bmrs
from models import lenet5
from pyro_bmrs.model.supply import supply_noise

EXACT = {"rtol": 1e-10, "atol": 1e-10}
OPTIMIZERS = {
    # A larger eps, or Adam makes whole steps of the rounding of gradients that are nil.
    "fused_adam": lambda groups: torch.optim.Adam(groups, lr=1e-2, eps=1e-6, fused=True),
    "amsgrad": lambda groups: torch.optim.AdamW(groups, lr=1e-2, amsgrad=True),
    "momentum": lambda groups: torch.optim.SGD(groups, lr=1e-2, momentum=0.9),
    "sgd": lambda groups: torch.optim.SGD(groups, lr=1e-2),
    "rmsprop": lambda groups: torch.optim.RMSprop(groups, lr=1e-3, centered=True),
}


class Run:
    """A model in training, with noise that is a function of the step and of each structure's original position."""

    def __init__(self, model, guide, x, optimizer="fused_adam", granularity="example"):
        self.model, self.guide, self.x, self.granularity = model, guide, x, granularity
        groups = [{"params": list(model.parameters())}, {"params": list(guide.parameters()), "lr": 0.1}]
        self.optimizer = OPTIMIZERS[optimizer](groups)
        self.sizes = model.sizes
        self.positions = {site: torch.arange(size) for site, size in self.sizes.items()}
        self.step = 0
        with torch.no_grad():
            self.y = torch.arange(len(x)) % model.net.eval()(x[:1]).shape[-1]

    def train(self, steps):
        losses = []
        self.model.train()
        for _ in range(steps):
            with supply_noise(self.model.noise, self.noise()):
                logits = self.model.net(self.x).movedim(-1, 1)
                y = self.y.view(-1, *(1,) * (logits.dim() - 2)).expand(-1, *logits.shape[2:])
                loss = nn.functional.cross_entropy(logits, y) + self.guide.kl() / self.model.num_data
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            losses.append(loss.detach())
            self.step += 1
        return torch.stack(losses)

    def noise(self):
        generator = torch.Generator().manual_seed(self.step)
        shapes = dict.fromkeys(self.sizes, self.x.shape[:1])
        if self.granularity == "element":
            shapes = self.model.element_shapes(self.x)
        theta = {}
        for site, q in self.guide.posterior().items():
            uniform = torch.rand(*shapes[site], self.sizes[site], generator=generator, dtype=torch.float64)
            uniform = uniform[..., self.positions[site]]
            theta[site] = (q.icdf(uniform) if hasattr(q, "log_icdf") else q.mean * 2 * uniform).to(self.x)
        return theta

    def remove(self, masks):
        for site, layer in self.model.noise.items():
            layer.remove(~masks[site][self.positions[site]])

    def shrink(self):
        kept = bmrs.shrink(self.model, self.guide, self.optimizer, self.x)
        self.positions = {site: positions[kept[site]] for site, positions in self.positions.items()}
        return kept

    def state(self):
        """Return everything that training moves: tensors by name."""
        tensors = dict(self.model.state_dict())
        tensors |= {f"guide.{name}": tensor for name, tensor in self.guide.named_parameters()}
        for i, memory in self.optimizer.state_dict()["state"].items():
            tensors |= {f"{i}.{name}": value for name, value in memory.items() if isinstance(value, torch.Tensor)}
        return tensors


def two_runs(name, optimizer="fused_adam", seed=0, granularity="example"):
    return [Run(*build(name, seed, dtype=torch.float64), optimizer, granularity) for _ in range(2)]


def check_same_training(masked, shrunk, masks, steps=5):
    """Remove from both, shrink one, train both on, and shrink the other too: nothing may differ."""
    for run in (masked, shrunk):
        run.remove(masks)
    shrunk.shrink()
    torch.testing.assert_close(shrunk.train(steps), masked.train(steps), **EXACT)
    expected = bmrs.predict(masked.model, masked.guide, masked.x)
    torch.testing.assert_close(bmrs.predict(shrunk.model, shrunk.guide, shrunk.x), expected, **EXACT)
    masked_now = masked.model.sizes
    for site, positions in shrunk.positions.items():
        assert len(positions) == shrunk.model.sizes[site] <= masked_now[site]


def check_same_state(found, expected):
    assert found.state().keys() == expected.state().keys()
    for name, tensor in expected.state().items():
        torch.testing.assert_close(found.state()[name], tensor, **EXACT, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("keep", [0.5, 0.2])
def test_the_next_steps_are_those_of_the_masked_network(name, keep):
    masked, shrunk = two_runs(name)
    for run in (masked, shrunk):
        run.train(3)
    check_same_training(masked, shrunk, random_masks(masked.model, keep=keep), steps=20)
    masked.shrink()
    check_same_state(shrunk, masked)
    removed = sum(masked.sizes.values()) - len(shrunk.guide.keep)
    assert removed == 0 if name == "noise_before_sigmoid" else removed > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mlp", "lenet5", "lenet5_noise_before_pool", "noise_on_positions"])
def test_noise_of_every_element_changes_nothing(name):
    masked, shrunk = two_runs(name, granularity="element")
    for run in (masked, shrunk):
        run.train(3)
    check_same_training(masked, shrunk, random_masks(masked.model, keep=0.5), steps=10)
    masked.shrink()
    check_same_state(shrunk, masked)


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_any_optimizer_that_works_elementwise(optimizer):
    masked, shrunk = two_runs("batch_norm", optimizer)
    for run in (masked, shrunk):
        run.train(3)
    check_same_training(masked, shrunk, random_masks(masked.model), steps=10)
    masked.shrink()
    check_same_state(shrunk, masked)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mlp", "lenet5", "batch_norm"])
def test_shrinking_again_and_again(name):
    masked, shrunk = two_runs(name)
    masks = {site: torch.ones(size, dtype=torch.bool) for site, size in masked.sizes.items()}
    for seed in range(4):
        newer = random_masks_of(masked.sizes, seed, keep=0.7)
        masks = {site: masks[site] & newer[site] for site in masks}
        check_same_training(masked, shrunk, masks, steps=4)
    masked.shrink()
    check_same_state(shrunk, masked)
    assert shrunk.model.sizes == {site: max(1, int(mask.sum())) for site, mask in masks.items()}
    assert all(torch.equal(shrunk.positions[site], mask.nonzero().squeeze(1)) for site, mask in masks.items())


def random_masks_of(sizes, seed, keep):
    generator = torch.Generator().manual_seed(seed)
    return {site: torch.rand(size, generator=generator) < keep for site, size in sizes.items()}


@pytest.mark.slow
def test_a_site_that_loses_all_keeps_one_masked_structure():
    masked, shrunk = two_runs("lenet5")
    masks = {**random_masks(masked.model), "fc1_noise.theta": torch.zeros(120, dtype=torch.bool)}
    check_same_training(masked, shrunk, masks)
    assert shrunk.positions["fc1_noise.theta"].tolist() == [0]
    assert shrunk.model.masks["fc1_noise.theta"].tolist() == [False]
    again = shrunk.shrink()
    assert again["fc1_noise.theta"].tolist() == [0]
    masked.shrink()
    check_same_state(shrunk, masked)


@pytest.mark.slow
def test_all_that_is_known_of_the_network_is_right_afterwards():
    model, guide, x = build("lenet5", dtype=torch.float64)
    run = Run(model, guide, x)
    run.train(1)
    masks = random_masks(model)
    structures = bmrs.find_structures(model.net, x[:2])
    parameters = bmrs.count_parameters(model.net, structures, masks)
    posterior, prediction = guide.posterior(), bmrs.predict(model, guide, x, masks)
    identities = [id(p) for group in run.optimizer.param_groups for p in group["params"]]
    steps = run.optimizer.state[model.net.conv1.weight]["step"].clone()
    run.remove(masks)
    kept = run.shrink()

    assert all(torch.equal(kept[site], mask.nonzero().squeeze(1)) for site, mask in masks.items())
    assert model.sizes == guide.sizes == {site: int(mask.sum()) for site, mask in masks.items()}
    assert bool(guide.keep.all())
    assert bmrs.count_parameters(model.net) == parameters
    assert model.net.conv2.in_channels == len(kept["conv1_noise.theta"])
    assert model.net.conv2.out_channels == len(kept["conv2_noise.theta"])
    for site, q in guide.posterior().items():
        torch.testing.assert_close(q.loc, posterior[site].loc[kept[site]])
        torch.testing.assert_close(q.log_low, posterior[site].log_low[kept[site]])
    torch.testing.assert_close(bmrs.predict(model, guide, x), prediction, **EXACT)
    small = bmrs.compact(model, guide, None, x)
    torch.testing.assert_close(small(x), prediction, **EXACT)
    parameters = [*model.parameters(), *guide.parameters()]
    assert identities == [id(p) for p in parameters]
    assert identities == [id(p) for group in run.optimizer.param_groups for p in group["params"]]
    assert torch.equal(run.optimizer.state[model.net.conv1.weight]["step"], steps)
    context = bmrs.PruningContext(model.eval(), guide, bmrs.find_structures(model.net, x[:2]), x.float(), run.y)
    scores = bmrs.SNR().scores(context)
    assert {site: len(score) for site, score in scores.items()} == model.sizes


def test_masks_that_remove_nothing_change_nothing():
    run = two_runs("mlp")[0]
    run.train(2)
    before = {name: tensor.clone() for name, tensor in run.state().items()}
    kept = run.shrink()
    assert all(torch.equal(kept[site], torch.arange(size)) for site, size in run.sizes.items())
    assert all(torch.equal(tensor, before[name]) for name, tensor in run.state().items())


def run_of(net, x, guide_type=bmrs.TruncatedLogNormalGuide):
    torch.manual_seed(1)
    for module in net.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    model = bmrs.NoisyNetwork(net, num_data=100).double()
    guide = guide_type(model).double()
    return Run(model, guide, x)


def check_net(make, shape, removed, expected_sizes, guide_type=bmrs.TruncatedLogNormalGuide):
    """Check training on of ``make()`` without the structures ``removed`` (site to positions), and what stays."""
    x = torch.randn(6, *shape, dtype=torch.float64)
    masked, shrunk = (run_of(make(), x, guide_type) for _ in range(2))
    for run in (masked, shrunk):
        run.train(2)
    masks = {
        site: ~torch.isin(torch.arange(size), torch.tensor(removed.get(site, [-1])))
        for site, size in masked.sizes.items()
    }
    check_same_training(masked, shrunk, masks, steps=10)
    assert shrunk.model.sizes == expected_sizes
    masked.shrink()
    check_same_state(shrunk, masked)


def test_every_guide_shrinks():
    def beta():
        noise = bmrs.MultiplicativeNoise(8, prior=Beta(torch.linspace(0.5, 1.5, 8), torch.tensor(2.0)))
        return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), noise, nn.Linear(8, 3))

    check_net(beta, (4,), {"2.theta": [0, 3, 5]}, {"2.theta": 5}, bmrs.BetaGuide)


def test_priors_of_several_types_stay_with_their_structures():
    def mixed():
        low = -torch.arange(5.0, 11.0)
        own = bmrs.TruncatedLogNormal(torch.full((6,), -1.0), torch.ones(6), low, torch.zeros(6))
        return nn.Sequential(
            nn.Linear(4, 5), nn.Tanh(), bmrs.MultiplicativeNoise(5), nn.Linear(5, 6), nn.Tanh(),
            bmrs.MultiplicativeNoise(6, prior=own), nn.Linear(6, 4), nn.Tanh(), bmrs.MultiplicativeNoise(4),
            nn.Linear(4, 3),
        )  # fmt: skip

    removed = {"2.theta": [1], "5.theta": [0, 4], "8.theta": [2]}
    check_net(mixed, (4,), removed, {"2.theta": 4, "5.theta": 4, "8.theta": 3})
    run = run_of(mixed(), torch.randn(6, 4, dtype=torch.float64))
    run.model.noise["5.theta"].remove(torch.arange(6) < 2)
    run.shrink()
    assert run.guide.prior()["5.theta"].log_low.tolist() == [-7, -8, -9, -10]
    assert run.guide.posterior()["5.theta"].log_low.tolist() == [-7, -8, -9, -10]


def test_what_batch_normalisation_makes_of_nothing_stays():
    def net():
        return nn.Sequential(
            nn.Linear(4, 6), nn.ReLU(), bmrs.MultiplicativeNoise(6), nn.BatchNorm1d(6), nn.Linear(6, 3)
        )

    check_net(net, (4,), {"2.theta": [1, 2]}, {"2.theta": 6})  # its shift is a bias that learns, though zero at first


def test_what_padding_hides_stays():
    def net():
        return nn.Sequential(
            nn.Conv2d(1, 4, 3), bmrs.MultiplicativeNoise(4), nn.Sigmoid(), nn.Conv2d(4, 2, 3, padding=1), nn.Flatten(),
            nn.Linear(32, 3),
        )  # fmt: skip

    check_net(net, (1, 6, 6), {"1.theta": [1, 2]}, {"1.theta": 4})


@pytest.mark.slow
def test_positions_that_a_filter_produces_all_at_once_stay():
    def net():
        return nn.Sequential(nn.Conv1d(1, 2, 2), nn.ReLU(), nn.Flatten(), bmrs.MultiplicativeNoise(6), nn.Linear(6, 3))

    check_net(net, (1, 4), {"3.theta": [1, 4]}, {"3.theta": 6})
    check_net(net, (1, 4), {"3.theta": [0, 1, 2]}, {"3.theta": 3})  # all that the first filter produces


class TwoBranches(nn.Module):
    """Two layers whose outputs are added, each with noise of its own or, where it has none, with a ReLU."""

    def __init__(self, second):
        super().__init__()
        self.a, self.b, self.out = nn.Linear(4, 5), nn.Linear(4, 5), nn.Linear(5, 3)
        self.first, self.second = bmrs.MultiplicativeNoise(5), second

    def forward(self, x):
        return self.out(self.first(self.a(x)) + self.second(self.b(x)))


@pytest.mark.slow
def test_coupled_structures_go_when_all_of_them_do():
    def net():
        return TwoBranches(bmrs.MultiplicativeNoise(5))

    removed = {"first.theta": [0, 1, 2], "second.theta": [1, 2, 4]}
    check_net(net, (4,), removed, {"first.theta": 3, "second.theta": 3})
    everything = {"first.theta": [0, 1, 2, 3, 4], "second.theta": [0, 1, 2, 3, 4]}
    check_net(net, (4,), everything, {"first.theta": 1, "second.theta": 1})
    check_net(net, (4,), {"first.theta": [0, 1, 2, 3], "second.theta": [4]}, {"first.theta": 5, "second.theta": 5})


def test_noise_on_noise_goes_when_both_do():
    def net():
        return nn.Sequential(
            nn.Linear(4, 5), bmrs.MultiplicativeNoise(5), nn.Tanh(), bmrs.MultiplicativeNoise(5), nn.Linear(5, 3)
        )

    check_net(net, (4,), {"1.theta": [0, 1], "3.theta": [1, 2]}, {"1.theta": 4, "3.theta": 4})


def test_a_silent_example_does_not_pass_for_a_removed_structure():
    class Off(nn.ReLU):
        """A ReLU that has not been on yet."""

        def forward(self, x):
            return super().forward(x - 1e6)

    check_net(lambda: TwoBranches(Off()), (4,), {"first.theta": [0, 1]}, {"first.theta": 5})


class Joined(nn.Module):
    """Structures of one site that two layers produce."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.out = nn.Linear(4, 3), nn.Linear(4, 2), nn.Linear(5, 3)
        self.noise = bmrs.MultiplicativeNoise(5)

    def forward(self, x):
        return self.out(self.noise(torch.cat([self.a(x), self.b(x)], 1).relu()))


@pytest.mark.slow
def test_each_of_the_layers_that_are_joined_keeps_a_structure():
    check_net(Joined, (4,), {"noise.theta": [0, 3]}, {"noise.theta": 3})
    check_net(Joined, (4,), {"noise.theta": [0, 3, 4]}, {"noise.theta": 3})
    check_net(Joined, (4,), {"noise.theta": [0, 1, 2, 3, 4]}, {"noise.theta": 2})


def test_structures_that_another_layer_sees_without_noise_stay():
    class TwoHeads(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.noise = nn.Linear(4, 5), bmrs.MultiplicativeNoise(5)
            self.noisy, self.plain = nn.Linear(5, 3), nn.Linear(5, 3)

        def forward(self, x):
            h = self.stem(x).relu()
            return self.noisy(self.noise(h)) + self.plain(h)

    check_net(TwoHeads, (4,), {"noise.theta": [0, 3]}, {"noise.theta": 5})


def test_structures_that_the_network_returns_stay():
    class Residual(nn.Module):
        """The structures are outputs too."""

        def __init__(self):
            super().__init__()
            self.a, self.b, self.noise = nn.Linear(4, 3), nn.Linear(3, 3), bmrs.MultiplicativeNoise(3)

        def forward(self, x):
            h = self.noise(self.a(x))
            return self.b(h) + h

    run = run_of(Residual(), torch.randn(6, 4, dtype=torch.float64))
    run.train(1)
    run.model.noise["noise.theta"].remove(torch.tensor([True, False, False]))
    before = {name: tensor.clone() for name, tensor in run.state().items()}
    assert run.shrink()["noise.theta"].tolist() == [0, 1, 2]
    assert all(torch.equal(tensor, before[name]) for name, tensor in run.state().items())


def test_an_optimizer_that_remembers_other_things_is_refused():
    run = two_runs("mlp")[0]
    run.optimizer = torch.optim.Adafactor(run.model.parameters())
    run.train(1)
    run.remove(random_masks(run.model))
    with pytest.raises(ValueError, match=r"Adafactor remembers 'row_var'.* use an optimiser such as Adam"):
        run.shrink()
    assert run.model.sizes == run.sizes


def test_in_float32_it_agrees_to_rounding():
    masked, shrunk = (Run(*build("lenet5")) for _ in range(2))
    for run in (masked, shrunk):
        run.train(2)
        run.remove(random_masks(run.model))
    shrunk.shrink()
    torch.testing.assert_close(shrunk.train(5), masked.train(5), rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
def test_on_a_gpu():
    torch.manual_seed(0)
    model = bmrs.NoisyNetwork(lenet5(), num_data=100).cuda()
    guide = bmrs.TruncatedLogNormalGuide(model).cuda()
    optimizer = torch.optim.Adam([*model.parameters(), *guide.parameters()], fused=True)
    x, y = torch.randn(8, 1, 32, 32).cuda(), torch.arange(8).cuda()
    elbo = bmrs.MeanFieldELBO()
    for _ in range(2):
        optimizer.zero_grad()
        elbo.differentiable_loss(model, guide, x, y).backward()
        optimizer.step()
        masks = random_masks(model)
        for site, layer in model.noise.items():
            layer.remove(~masks[site])
        expected = bmrs.predict(model, guide, x)
        bmrs.shrink(model, guide, optimizer, x)
        torch.testing.assert_close(bmrs.predict(model, guide, x), expected, rtol=1e-3, atol=1e-4)


def test_layers_that_only_run_in_training_are_not_cut_behind_its_back():
    class Auxiliary(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.other = nn.Linear(4, 5), nn.Linear(5, 3), nn.Linear(5, 3)

        def forward(self, x):
            h = self.a(x).relu()
            return self.b(h) + self.other(h) if self.training else self.b(h)

    net, x = Auxiliary(), torch.randn(6, 4)
    found = bmrs.find_structures(net, x)
    assert "the network fails without them in train mode" in found.refused["a"]
    assert found.refused["other"] == "it is not used in a forward pass on the example"
    model = bmrs.NoisyNetwork(bmrs.attach_noise(net, bmrs.find_structures(net, x, trial=False)), num_data=10)
    guide = bmrs.TruncatedLogNormalGuide(model)
    optimizer = torch.optim.Adam([*model.parameters(), *guide.parameters()])
    model.noise["a.theta"].remove(torch.tensor([True, False, False, True, False]))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(RuntimeError, match="uses layers in train mode that it does not use in eval mode"):
        bmrs.shrink(model, guide, optimizer, x)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
