"""A model and its guide belong together, and every fact about them has one home."""

import copy
import math
import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch
from nets import blobs, build, small_classifier
from pyro.infer import Predictive, Trace_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoNormal
from torch import nn

import pyro_bmrs as bmrs

QUICK = {"epochs": 2, "fine_tune_epochs": 1, "batch_size": 50, "seed": 0, "progress": False}

USES = {
    "fit": lambda model, guide, x, y: bmrs.fit(model, guide, (x, y), **QUICK),
    "predict": lambda model, guide, x, y: bmrs.predict(model, guide, x),
    "compact": lambda model, guide, x, y: bmrs.compact(model, guide, None, x),
    "shrink": lambda model, guide, x, y: bmrs.shrink(model, guide, torch.optim.Adam([torch.zeros(1)]), x),
    "loss": lambda model, guide, x, y: bmrs.MeanFieldELBO().loss(model, guide, x, y),
}


@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_another_models_guide_is_refused(use):
    x, y = blobs()
    (model, guide), (_, other) = small_classifier(), small_classifier(seed=1)
    message = r"guide of another model.*TruncatedLogNormalGuide\(model\).*copy.deepcopy\(\(model, guide\)\)"
    for first, second in ((model, other), (copy.deepcopy(model), copy.deepcopy(guide)), (copy.deepcopy(model), guide)):
        with pytest.raises(ValueError, match=message):
            use(first, second, x, y)
    use(*copy.deepcopy((model, guide)), x, y)
    use(*pickle.loads(pickle.dumps((model, guide))), x, y)


@pytest.mark.parametrize("name", ["fit", "predict", "compact", "shrink"])
def test_what_is_no_model_or_guide_is_named(name):
    use = USES[name]
    x, y = blobs()
    model, guide = small_classifier()
    programs = (AutoNormal(model), lambda x, y: None) if name in ("fit", "shrink") else ()  # the others take any guide
    for wrong in (None, "guide", bmrs.TruncatedLogNormalGuide, model, *programs):
        with pytest.raises(TypeError, match=r"guide must be one that is made of the model"):
            use(model, wrong, x, y)
    for wrong in (model.net, None, bmrs.NoisyNetwork, lambda x, y: None):
        with pytest.raises(TypeError, match=r"model must be a NoisyNetwork, but got"):
            use(wrong, guide, x, y)


def test_a_guide_of_other_sizes_than_its_model_has_now_is_refused():
    x, _ = blobs()
    model, guide = small_classifier()
    model.noise["2.theta"].select(torch.arange(4))
    with pytest.raises(ValueError, match=r"guide has \{'2.theta': 16\} structures, but the model has \{'2.theta': 4\}"):
        bmrs.predict(model, guide, x)


def losses(model, guide, x, y):
    """Return our loss and Pyro's for the same draw."""
    found = []
    for elbo in (bmrs.MeanFieldELBO("batch"), TraceMeanField_ELBO()):
        torch.manual_seed(0)
        found.append(elbo.loss(model, guide, x, y))
    return found


def test_a_weight_that_a_layer_is_given_later_counts_everywhere():
    x, y = blobs()
    model, guide = small_classifier()
    with torch.no_grad():
        guide.log_scale.fill_(-1.0)
    before = losses(model, guide, x, y)
    model.noise["2.theta"].kl_weight = 50.0
    assert model.kl_weights == {"2.theta": 50.0}
    ours, theirs = losses(model, guide, x, y)
    assert ours == pytest.approx(theirs)
    assert ours > before[0] + 100
    model.kl_weight = {"2.theta": 3.0}
    assert model.noise["2.theta"].kl_weight == 3.0
    model.kl_weight = 2.0
    ours, theirs = losses(model, guide, x, y)
    assert ours == pytest.approx(theirs)
    with pytest.raises(ValueError, match="kl_weight must be a positive number, but got -1"):
        model.noise["2.theta"].kl_weight = -1.0
    with pytest.raises(ValueError, match=r"a number for each of the sites \['2.theta'\]"):
        model.kl_weight = {"3.theta": 1.0}


def test_a_second_model_of_the_same_network_leaves_the_first_alone():
    x, y = blobs()
    first, guide = small_classifier(kl_weight={"2.theta": 50.0})
    before = losses(first, guide, x, y)
    second = bmrs.NoisyNetwork(nn.Sequential(first.net, nn.Identity()))
    assert list(second.sizes) == ["0.2.theta"]
    assert losses(first, guide, x, y) == before
    assert before[0] == pytest.approx(before[1])
    own = bmrs.TruncatedLogNormalGuide(second)
    ours, theirs = losses(second, own, x, y)
    assert ours == pytest.approx(theirs)
    assert ours < before[0]


def test_noise_of_each_element_is_that_of_the_model_at_hand():
    elbo = bmrs.MeanFieldELBO(granularity="element")
    for stride in (1, 2):
        net = nn.Sequential(
            nn.Conv2d(1, 4, 3, stride=stride), nn.ReLU(), bmrs.MultiplicativeNoise(4), nn.Flatten(), nn.LazyLinear(2)
        )
        x = torch.randn(3, 1, 9, 9)
        net(x)
        model = bmrs.NoisyNetwork(net)
        guide, seen = bmrs.TruncatedLogNormalGuide(model), []
        model.noise["2.theta"].register_forward_pre_hook(lambda m, args, seen=seen: seen.append(m.held().shape))
        elbo.loss(model, guide, x, torch.zeros(3))
        side = 7 if stride == 1 else 4
        assert seen[-1] == (3, side, side, 4)


class Factored(bmrs.NoisyNetwork):
    def forward(self, x, y=None):
        pyro.factor("penalty", torch.tensor(-1000.0))
        return super().forward(x, y)


def test_a_program_of_ones_own_is_honoured_by_the_elbo_and_refused_by_fit():
    x, y = blobs()
    model = Factored(small_classifier()[0].net)
    guide = bmrs.TruncatedLogNormalGuide(model)
    ours, theirs = losses(model, guide, x, y)
    assert ours == theirs
    assert ours > 1000
    with pytest.raises(TypeError, match=r"model is a Factored with forward of its own, which fit does not run.*SVI"):
        bmrs.fit(model, guide, (x, y), **QUICK)
    model, guide = small_classifier()
    model.register_forward_hook(lambda *_: None)
    with pytest.raises(TypeError, match="NoisyNetwork with forward hooks of its own"):
        bmrs.fit(model, guide, (x, y), **QUICK)

    class Wider(bmrs.TruncatedLogNormalGuide):
        def forward(self, *args, **kwargs):
            pyro.sample("more", dist.Normal(0.0, 1.0))
            return super().forward(*args, **kwargs)

    model, _ = small_classifier()
    with pytest.raises(TypeError, match="the guide is a Wider with forward of its own"):
        bmrs.fit(model, Wider(model), (x, y), **QUICK)


class Penalised(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        pyro.factor("penalty", torch.tensor(-1000.0))
        return self.net(x)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:trying to observe a value outside of inference")  # where it is only evaluated
def test_a_factor_inside_the_network_counts_in_every_phase():
    x, y = blobs()
    for epochs, fine_tune_epochs in ((1, 0), (0, 1)):
        losses = []
        for wrap in (lambda net: net, Penalised):
            model = bmrs.NoisyNetwork(wrap(small_classifier()[0].net))
            settings = {**QUICK, "epochs": epochs, "fine_tune_epochs": fine_tune_epochs, "lr": 1e-9}
            result = bmrs.fit(model, bmrs.TruncatedLogNormalGuide(model), (x, y), **settings)
            losses.append(result.history[-1]["loss"])
        assert losses[1] - losses[0] == pytest.approx(1000 / len(x), rel=1e-3)


def test_vectorised_draws_are_refused_by_name():
    x, y = blobs()
    model, guide = small_classifier()
    assert Predictive(model, guide=guide, num_samples=3)(x)["obs"].shape == (3, len(x))
    with pytest.raises(ValueError, match=r"asks for 3 draws of the noise at once.*parallel=False"):
        Predictive(model, guide=guide, num_samples=3, parallel=True)(x)
    with pytest.raises(ValueError, match=r"draws of the noise at once.*vectorize_particles=False"):
        Trace_ELBO(num_particles=2, vectorize_particles=True, max_plate_nesting=1).loss(model, guide, x, y)


def test_a_family_without_a_kl_says_so_when_the_guide_is_made():
    class Wrong(bmrs.FlatGuide):
        prior_types = (bmrs.LogUniform,)

        def __init__(self, model):
            super().__init__(model)
            self.loc = nn.Parameter(torch.zeros(16))

        def family(self, index=slice(None)):
            return dist.StudentT(3.0, self.loc[index], 1.0)

    with pytest.raises(NotImplementedError, match=r"no KL is known from StudentT to LogUniform: .*register_kl"):
        Wrong(small_classifier()[0])


def test_a_prior_changed_behind_the_guides_back_is_refused():
    x, y = blobs()
    model, guide = small_classifier()
    model.noise["2.theta"].prior_log_low.fill_(-10.0)
    with pytest.raises(
        ValueError, match=r"log_low of the LogUniform prior of '2.theta'.*TruncatedLogNormalGuide\(model\)"
    ):
        bmrs.fit(model, guide, (x, y), **QUICK)


PRIORS = {
    "transformed": dist.TransformedDistribution(dist.Normal(0.0, 1.0), [dist.transforms.ExpTransform()]),
    "relaxed": dist.RelaxedBernoulli(torch.tensor(0.5), torch.tensor(0.3)),
    "two names for one thing": dist.Bernoulli(0.3),
}


@pytest.mark.parametrize("prior", PRIORS.values(), ids=PRIORS)
def test_priors_that_cannot_be_rebuilt_are_refused(prior):
    with pytest.raises(ValueError, match=r"prior is a .*, which cannot be rebuilt from its parameters"):
        bmrs.MultiplicativeNoise(4, prior=prior)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"size": "4"}, TypeError, "size must be a positive integer, the number of structures, but got '4'"),
        ({"size": True}, TypeError, "but got True"),
        ({"dim": 1.5}, ValueError, "dim must be"),
        ({"dim": 0}, ValueError, "dim must not be 0, which indexes examples"),
        ({"prior": torch.distributions.Beta(1.0, 1.0)}, TypeError, r"for instance pyro.distributions.Beta"),
        ({"prior": bmrs.LogUniform}, TypeError, "but got the class LogUniform"),
    ],
)
def test_arguments_of_a_noise_layer_are_named(arguments, error, message):
    with pytest.raises(error, match=message):
        bmrs.MultiplicativeNoise(**{"size": 4, **arguments})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"likelihood": nn.CrossEntropyLoss()}, "got the loss CrossEntropyLoss; leave it out for class labels"),
        ({"likelihood": dist.Categorical}, "got the class Categorical"),
        ({"likelihood": dist.Normal(0.0, 1.0)}, "likelihood must map the network's output"),
        ({"likelihood": "categorical"}, "got 'categorical'"),
        ({"num_data": "100"}, "num_data must be a positive integer, the number of training examples, but got '100'"),
        ({"kl_weight": "1"}, "kl_weight must be a positive number, but got '1'"),
        ({"kl_weight": True}, "kl_weight must be a positive number, but got True"),
    ],
)
def test_arguments_of_a_model_are_named(arguments, message):
    with pytest.raises(TypeError, match=message):
        small_classifier(**arguments)


def test_a_net_must_be_a_module():
    with pytest.raises(TypeError, match=r"net must be an nn.Module, but got the class Linear"):
        bmrs.NoisyNetwork(nn.Linear)


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [("init_loc", "0", TypeError), ("init_loc", float("nan"), ValueError), ("init_log_scale", 6.0, ValueError)],
)
def test_initial_values_of_a_guide_are_checked(name, value, error):
    with pytest.raises(error, match=f"{name} must"):
        bmrs.TruncatedLogNormalGuide(small_classifier()[0], **{name: value})


@pytest.mark.slow
def test_original_numbers_are_seen_after_shrinking():
    model, guide, x = build("mlp")
    expected = bmrs.evidence_changes(guide)
    removed = {site: torch.arange(layer.size) % 3 == 1 for site, layer in model.noise.items()}
    for site, layer in model.noise.items():
        layer.remove(removed[site])
    masks = model.masks
    before = bmrs.predict(model, guide, x)
    bmrs.shrink(model, guide, torch.optim.Adam([*model.parameters(), *guide.parameters()]), x[:2])
    for site, changes in bmrs.evidence_changes(guide).items():
        assert torch.equal(changes.isnan(), removed[site])
        assert torch.equal(changes[~removed[site]], expected[site][~removed[site]])
    bmrs.plot_evidence(bmrs.evidence_changes(guide), masks)
    data = bmrs.to_arviz(guide, draws=3)
    site = next(iter(masks))
    coordinates = data.posterior[f"{site}_structure"].values.tolist()
    assert coordinates == (~removed[site]).nonzero().flatten().tolist()
    torch.testing.assert_close(bmrs.predict(model, guide, x, masks), before)
    torch.testing.assert_close(bmrs.compact(model, guide, masks, x)(x), before, rtol=1e-4, atol=1e-5)
    structures = bmrs.find_structures(model.net, x)
    assert bmrs.count_parameters(model.net, structures, masks) == bmrs.count_parameters(
        bmrs.compact(model, guide, None, x)
    )
    with pytest.raises(ValueError, match=r"keeps structures \[1, 4, 7, 10\], which have been cut out"):
        bmrs.predict(model, guide, x, {site: torch.ones_like(masks[site])})


@pytest.mark.parametrize("wrong", ["result", "list", "integers", "shape", "site"])
def test_masks_that_are_none_are_refused(wrong):
    model, guide, x = build("noise_before_tanh")
    (site,) = model.sizes
    masks, error, message = {
        "result": (bmrs.FitResult({}, {}, [], 0.0), TypeError, "got a FitResult; pass its .masks"),
        "list": ([torch.ones(9, dtype=torch.bool)], TypeError, "masks must map sites to bool tensors, but got a list"),
        "integers": ({site: torch.ones(9, dtype=torch.long)}, ValueError, "must be a bool tensor.*torch.int64"),
        "shape": ({site: torch.ones(8, dtype=torch.bool)}, ValueError, r"bool tensor of shape \(9,\)"),
        "site": ({"other": torch.ones(9, dtype=torch.bool)}, ValueError, "there is no site 'other' to mask"),
    }[wrong]
    structures = bmrs.find_structures(model.net, x)
    for use in (
        lambda: bmrs.predict(model, guide, x, masks),
        lambda: bmrs.compact(model, guide, masks, x),
        lambda: bmrs.count_parameters(model.net, structures, masks),
        lambda: bmrs.count_flops(model.net, x, structures, masks),
    ):
        with pytest.raises(error, match=message):
            use()
    with pytest.raises(ValueError, match=r"removed must be a bool tensor of shape \(9,\)"):
        model.noise[site].remove(torch.ones(9, dtype=torch.long))


@pytest.mark.parametrize(("one", "zero"), [(0.5, 0.5), (1e-3, 2e-3), (47.5, 2.5), (3.0, 1e-2)])
def test_draws_of_a_beta_guide_are_those_of_a_beta(one, zero):
    model = bmrs.NoisyNetwork(nn.Sequential(nn.Linear(2, 1), bmrs.MultiplicativeNoise(1, prior=dist.Beta(1.0, 1.0))))
    guide = bmrs.BetaGuide(model)
    with torch.no_grad():
        guide.log_concentration1.fill_(math.log(one))
        guide.log_concentration0.fill_(math.log(zero))
    draws = guide.draw((100_000,))["1.theta"]
    q = guide.posterior()["1.theta"]
    assert draws.mean().item() == pytest.approx(q.mean.item(), abs=5 * q.stddev.item() / 100_000**0.5)
    assert draws.var().item() == pytest.approx(q.variance.item(), rel=0.05)
    (slope,) = torch.autograd.grad(draws.mean(), guide.log_concentration1)
    expected = one * zero / (one + zero) ** 2  # of the mean in the log concentration
    if one > 0.1:
        assert slope.item() == pytest.approx(expected, rel=0.05)
