"""Noise that examples share: exact draws, stratified, independent between structures, and as good as one each."""

import copy
import math

import pyro.distributions as dist
import pytest
import torch
from nets import blobs, small_classifier
from oracle import assert_close
from torch import nn

import pyro_bmrs as bmrs
from models import mlp
from pyro_bmrs.model.guides.truncated_log_normal import SHARED_DRAWS


def guide_of(structures=6, dtype=torch.float32, prior=None, kind=bmrs.TruncatedLogNormalGuide, **settings):
    """Return a guide of that many structures, posteriors of all sorts among them."""
    noise = bmrs.MultiplicativeNoise(structures, prior)
    model = bmrs.NoisyNetwork(nn.Sequential(nn.Linear(3, structures), noise, nn.Linear(structures, 2)), num_data=50)
    guide = kind(model.to(dtype), **settings)
    with torch.no_grad():
        guide.loc.copy_(torch.tensor([0.0, -3.0, 1.0, -25.0, -0.8, -10.0]).repeat(-(-structures // 6))[:structures])
        guide.log_scale.copy_(torch.tensor([-5.0, 1.0, 0.5, 0.0, 3.5, 4.2]).repeat(-(-structures // 6))[:structures])
    return guide.to(dtype)


def ranks(guide, draws):
    """Return the probabilities below draws."""
    return guide.posterior()["1.theta"].cdf(draws)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_draw_is_exact_and_a_batch_has_one_in_each_stratum(dtype):
    torch.manual_seed(0)
    guide = guide_of(dtype=dtype)
    first = []
    for _ in range(400):
        probabilities = ranks(guide, guide.draw_shared(SHARED_DRAWS)["1.theta"].detach())
        strata = (probabilities.sort(0).values * SHARED_DRAWS).diff(dim=0)
        assert_close(strata, torch.ones(()), 5e-3 if dtype == torch.float32 else 1e-9)
        first.append(probabilities[0])
    probabilities = torch.stack(first).double()  # of one example of each batch: uniform, and structures independent
    ordered = probabilities.sort(0).values
    steps = torch.arange(1, 401, dtype=torch.float64)[:, None] / 400
    kolmogorov = torch.maximum((steps - ordered).abs(), (ordered - (steps - 1 / 400)).abs()).amax(0)
    assert (kolmogorov < 1.95 / math.sqrt(400)).all()  # 0.1 % level
    correlations = torch.corrcoef(probabilities.t()).fill_diagonal_(0)
    assert correlations.abs().max() < 4 / math.sqrt(400)


def test_structures_have_orders_of_their_own():
    """Over the examples of one batch two structures are not large and small together."""
    torch.manual_seed(0)
    guide = guide_of(200)
    probabilities = ranks(guide, guide.draw_shared(SHARED_DRAWS)["1.theta"].detach())
    correlations = torch.corrcoef(probabilities.t()).fill_diagonal_(0)
    assert correlations.abs().mean() < 0.3  # of 16 independent numbers: 0.2
    assert not torch.equal(guide.lattice[0], guide.lattice[1])
    assert all(row.unique().numel() == SHARED_DRAWS for row in guide.lattice)


@pytest.mark.parametrize("examples", [1, 5, 16, 17, 20, 32, 100])
def test_batches_of_any_size_take_the_draws_in_turn(examples):
    guide = guide_of()
    draws = guide.draw_shared(examples)["1.theta"]
    assert draws.shape == (examples, 6)
    for i in range(SHARED_DRAWS, examples):
        assert torch.equal(draws[i], draws[i - SHARED_DRAWS])
    torch.manual_seed(3)
    expected = guide.draw_shared(examples)["1.theta"], guide.kl()
    torch.manual_seed(3)
    draws, kl = guide.draw_and_kl(examples)
    torch.testing.assert_close((draws["1.theta"], kl), expected)


@pytest.mark.parametrize("examples", [0, -3, 1.5, None])
def test_a_number_of_examples_that_is_none_is_refused(examples):
    for guide in (guide_of(), guide_of(kind=Halves)):
        for draw in (guide.draw_shared, guide.draw_and_kl):
            with pytest.raises((TypeError, ValueError), match="examples must be a positive integer"):
                draw(examples)


def gradients(objective, parameters, repeats, first_seed=0):
    found = []
    for seed in range(first_seed, first_seed + repeats):
        torch.manual_seed(seed)
        found.append(torch.cat([each.flatten() for each in torch.autograd.grad(objective(), parameters)]))
    return torch.stack(found).double()


@pytest.mark.slow
@pytest.mark.parametrize("epochs", [5, 60], ids=["hardly any structure is noise", "many are"])
def test_gradients_are_unbiased_and_about_as_noisy_as_with_a_draw_for_each_example(epochs):
    torch.manual_seed(0)
    model = bmrs.NoisyNetwork(mlp(6, hidden=20, layers=3, classes=3))
    guide = bmrs.TruncatedLogNormalGuide(model)
    x, y = blobs(300)
    bmrs.fit(model, guide, (x, y), epochs=epochs, fine_tune_epochs=0, criterion=None, posterior_lr=0.1, progress=False)
    share = float((guide.log_scale > 0).float().mean())
    assert share < 0.2 if epochs == 5 else 0.3 < share < 0.95
    model.num_data, x, y = 300, x[:128], y[:128]
    for parameters in (list(guide.parameters()), list(model.net.parameters())):
        shared, example, batch = (
            gradients(lambda g=g: bmrs.MeanFieldELBO(g).differentiable_loss(model, guide, x, y), parameters, 150)
            for g in ("shared", "example", "batch")
        )
        error = ((shared.var(0) + example.var(0)) / 150).sqrt() + 1e-6 * example.abs().mean(0)
        assert ((shared.mean(0) - example.mean(0)).abs() < 5 * error).all()
        assert shared.var(0).sum() < 1.5 * example.var(0).sum()
        assert 1.5 * shared.var(0).sum() < batch.var(0).sum()


def test_the_kl_and_its_slopes_are_those_of_float64():
    """Though draws are made in float32."""
    exact, guide = guide_of(dtype=torch.float64), guide_of()
    _, kl = guide.draw_and_kl(20)
    found = torch.autograd.grad(kl, (guide.loc, guide.log_scale))
    expected = torch.autograd.grad(exact.kl(), (exact.loc, exact.log_scale))
    torch.testing.assert_close(kl.double(), exact.kl(), rtol=1e-6, atol=1e-6)
    for mine, theirs in zip(found, expected, strict=True):
        assert_close(mine, theirs, 1e-5, floor=1e-2)


def test_removed_structures_and_sites_weights_count_as_in_kl():
    guide = guide_of()
    guide.noise["1.theta"].remove(torch.tensor([True, False, False, True, False, False]))
    guide.model.kl_weights["1.theta"] = 3.0
    torch.testing.assert_close(guide.draw_and_kl(20)[1], guide.kl())


@pytest.mark.parametrize("prior", [bmrs.TruncatedLogNormal(-1.0, 2.0), None], ids=["log-normal", "log-uniform"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_prior_and_dtype_has_the_same_two_results(prior, dtype):
    guide = guide_of(dtype=dtype, prior=prior)
    torch.manual_seed(0)
    draws, kl = guide.draw_and_kl(40)
    torch.manual_seed(0)
    torch.testing.assert_close((draws["1.theta"], kl), (guide.draw_shared(40)["1.theta"], guide.kl()))
    assert torch.equal(draws["1.theta"][:SHARED_DRAWS], draws["1.theta"][SHARED_DRAWS : 2 * SHARED_DRAWS])


def test_other_families_draw_for_each_example():
    noise = bmrs.MultiplicativeNoise(6, dist.Beta(1.0, 1.0))
    model = bmrs.NoisyNetwork(nn.Sequential(nn.Linear(3, 6), noise, nn.Linear(6, 2)), num_data=50)
    draws, kl = bmrs.BetaGuide(model).draw_and_kl(40)
    assert draws["1.theta"].unique(dim=0).shape == (40, 6)
    assert kl.shape == ()


class Halves(bmrs.TruncatedLogNormalGuide):
    """Draws as its user likes."""

    def draw(self, sample_shape=()):
        return self.split(torch.full((*sample_shape, len(self.loc)), 0.5))


class Wider(bmrs.TruncatedLogNormalGuide):
    """Of the same family with other parameters."""

    def family(self, index=slice(None)):
        q = super().family(index)
        return bmrs.TruncatedLogNormal(q.loc, 2 * q.scale, q.log_low, q.log_high, validate_args=False)


class Doubled(bmrs.TruncatedLogNormalGuide):
    """Counts its KL twice."""

    def kl(self):
        return 2 * super().kl()


def test_what_a_subclass_says_holds():
    plain = guide_of()
    draws, kl = guide_of(kind=Halves).draw_and_kl(40)
    assert torch.equal(draws["1.theta"], torch.full((40, 6), 0.5))
    torch.testing.assert_close(kl, plain.kl())
    wider = guide_of(kind=Wider)
    torch.manual_seed(0)
    draws, kl = wider.draw_and_kl(SHARED_DRAWS)
    with torch.no_grad():
        plain.log_scale.add_(math.log(2))
    torch.manual_seed(0)
    expected = plain.draw_and_kl(SHARED_DRAWS)
    torch.testing.assert_close((draws["1.theta"], kl), (expected[0]["1.theta"], expected[1]), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(guide_of(kind=Doubled).draw_and_kl(40)[1], 2 * guide_of().kl())
    patched = guide_of()
    patched.draw = lambda sample_shape=(): patched.split(torch.full((*sample_shape, 6), 0.25))
    assert torch.equal(patched.draw_and_kl(40)[0]["1.theta"], torch.full((40, 6), 0.25))
    assert torch.equal(patched.draw_shared(3)["1.theta"], torch.full((3, 6), 0.25))


def test_after_shrinking_each_structure_keeps_its_order():
    model, guide = small_classifier()
    x, y = blobs(60)
    bmrs.fit(model, guide, (x, y), epochs=1, fine_tune_epochs=0, progress=False)
    before = guide.lattice.clone()
    kept = torch.zeros(len(before), dtype=torch.bool)
    kept[::3] = True
    guide.noise["2.theta"].remove(~kept)
    bmrs.shrink(model, guide, torch.optim.Adam([*model.parameters(), *guide.parameters()]), x[:2])
    assert torch.equal(guide.lattice, before[::3])
    assert guide.lattice.t().is_contiguous()  # as steps read it
    draws, kl = guide.draw_and_kl(20)
    assert draws["2.theta"].shape == (20, len(before[::3]))
    assert torch.isfinite(kl)


def test_replicas_have_shifts_of_their_own():
    guide = guide_of(kind=bmrs.TruncatedLogNormalGuide)

    def draw(loc):
        with torch.no_grad():
            moved = copy.copy(guide)
        return torch.func.functional_call(_Drawing(moved), {"guide.loc": loc}, ())

    draws = torch.func.vmap(draw, randomness="different")(guide.loc.detach().expand(3, -1))
    assert draws.shape == (3, 20, 6)
    assert not torch.equal(draws[0], draws[1])


class _Drawing(nn.Module):
    def __init__(self, guide):
        super().__init__()
        self.guide = guide

    def forward(self):
        return self.guide.draw_and_kl(20)[0]["1.theta"]


def test_bounds_that_are_not_the_priors_are_refused():
    """The KL beside the draws is that from the prior on the same bounds."""
    model, guide = small_classifier()
    guide.log_low.fill_(-10.0)
    with pytest.raises(ValueError, match="log_low of the guide is not that of its model's priors"):
        bmrs.fit(model, guide, blobs(40), epochs=1, progress=False)
