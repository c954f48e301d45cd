"""Arguments of a fit that do not fit: one line each, before training, naming argument, value and what is wanted."""

import copy

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from nets import blobs, small_classifier
from torch import nn

import pyro_bmrs as bmrs

QUICK = {"epochs": 2, "fine_tune_epochs": 1, "batch_size": 50, "seed": 0, "progress": False}
ONE = small_classifier()


class Scores(bmrs.Criterion):
    def __init__(self, scores):
        self.returned = scores

    def scores(self, context):
        return self.returned


CHANGES = {
    "criterion": [
        ("BMRS_N", TypeError, r"criterion must be a Criterion, for instance BMRS_N\(\).*got 'BMRS_N'"),
        (bmrs.BMRS_N, TypeError, "got the class BMRS_N, not an instance"),
        (Scores(3), TypeError, "scores of Scores must map each site to a tensor"),
        (Scores({}), ValueError, r"scores of Scores must be for the sites \['2.theta'\]"),
        (Scores({"2.theta": torch.zeros(3)}), ValueError, r"for site '2.theta' must be a tensor of shape \(16,\)"),
        (Scores({"2.theta": [1.0] * 16}), TypeError, "for site '2.theta' must be a tensor"),
        (bmrs.BMRS_N(prior_log_odds={"other": 1.0}), ValueError, "prior_log_odds has no entry for site '2.theta'"),
        (
            bmrs.BMRS_N(prior_log_odds={"2.theta": torch.zeros(3)}),
            ValueError,
            r"of shape \(16,\), but has shape \(3,\)",
        ),
    ],
    "pruning": [
        (None, TypeError, r"pruning must be Continuous\(\), PostTraining\(\) or ToSize"),
        (bmrs.PostTraining, TypeError, "got the class PostTraining, not an instance"),
    ],
    "epochs": [
        (2.5, ValueError, "epochs must be an integer, but got 2.5"),
        ("3", TypeError, "epochs must be an integer, but got .3."),
        (True, TypeError, "epochs must be an integer, but got True"),
    ],
    "fine_tune_epochs": [(-1, ValueError, "fine_tune_epochs must not be negative")],
    "kl_warmup_epochs": [(0.5, ValueError, "kl_warmup_epochs must be an integer")],
    "batch_size": [(0, ValueError, "batch_size must be a positive integer"), ("8", TypeError, "batch_size")],
    "lr": [(None, TypeError, "lr must be a positive number, but got None"), (float("inf"), ValueError, "lr must be")],
    "posterior_lr": [("1", TypeError, "posterior_lr must be a positive number")],
    "decay": [("no", TypeError, "decay must be True or False, but got 'no'")],
    "granularity": [("pixel", ValueError, 'granularity must be "shared"'), (None, ValueError, "granularity")],
    "device": [
        ("tpu", ValueError, "device is 'tpu', but the devices here are"),
        ("meta", ValueError, "device is 'meta'"),
        (0, TypeError, 'device must be "auto"'),
    ],
    "precision": [
        ("64-true", ValueError, r"parameter 'net.0.weight' of the model is of torch.float32: use model.double\(\)"),
        ("fp16", ValueError, "precision must be one of"),
        (16, ValueError, "precision must be one of"),
    ],
    "fabric": [("cpu", TypeError, r"fabric must be a lightning_fabric.Fabric, but got 'cpu'")],
    "compile": [(1, TypeError, "compile must be True or False, but got 1")],
    "structures": [({"a": 1}, TypeError, "structures must be what find_structures returned, but got a dict")],
    "unremovable": [("ignore", ValueError, "unremovable must be one of")],
    "seed": [
        (-1, ValueError, "seed must not be negative, but got -1"),
        (1.5, ValueError, "seed must be"),
        ("0", TypeError, "seed must be"),
    ],
    "progress": [(None, TypeError, "progress must be True or False")],
    "callbacks": [
        (bmrs.Callback(), TypeError, "callbacks must be a sequence of Callback, but got a Callback"),
        ([print], TypeError, "callbacks must be a sequence of Callback, but got the function print"),
    ],
    "folder": [(3, TypeError, "folder must be a path, but got 3")],
    "checkpoint_every": [(0, ValueError, "checkpoint_every must be a positive integer")],
    "resume": [(1, TypeError, "resume must be True or False, but got 1")],
}
CASES = [(name, *case) for name, cases in CHANGES.items() for case in cases]


@pytest.mark.parametrize(("name", "value", "error", "message"), CASES)
def test_arguments_of_fit_are_named(name, value, error, message):
    model, guide = small_classifier()
    before = copy.deepcopy((model.state_dict(), guide.state_dict()))
    with pytest.raises(error, match=message):
        bmrs.fit(model, guide, blobs(), **{**QUICK, name: value})
    torch.testing.assert_close((model.state_dict(), guide.state_dict()), before, rtol=0, atol=0)


ENSEMBLE = {
    "seeds": [(3, TypeError, "seeds must be a sequence"), ("01", TypeError, "seeds"), ((0, -1), ValueError, "seeds")],
    "make": [
        (None, TypeError, "make must be a function that returns a model and its guide, but got None"),
        (lambda: 3, TypeError, "make must return a model and its guide, but returned 3"),
        (lambda: (small_classifier()[0], small_classifier()[1]), ValueError, "guide of another model"),
        (lambda: ONE, ValueError, "make must return a new model and guide at each call"),
    ],
    "callbacks": [([bmrs.Callback()], TypeError, "callbacks must be a function from a seed")],
    "criterion": [(Scores({}), ValueError, "scores of Scores"), (bmrs.SNR, TypeError, "criterion must be")],
    "epochs": [(1.5, ValueError, "epochs must be an integer")],
    "batch_size": [(-1, ValueError, "batch_size must be a positive integer")],
    "train": [((torch.zeros(3, 6), torch.zeros(3)), ValueError, "Categorical likelihood needs class indices")],
}


@pytest.mark.parametrize(
    ("name", "value", "error", "message"), [(name, *case) for name, cases in ENSEMBLE.items() for case in cases]
)
def test_arguments_of_an_ensemble_are_named(name, value, error, message):
    arguments = {"make": small_classifier, "train": blobs(), "seeds": (0, 1), **QUICK, name: value}
    arguments.pop("seed")
    with pytest.raises(error, match=message):
        bmrs.fit_ensemble(**arguments)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: bmrs.Continuous(every=0), ValueError, "every of Continuous must be a positive integer"),
        (lambda: bmrs.Continuous(every=None), TypeError, "every of Continuous"),
        (lambda: bmrs.Continuous(start=0), ValueError, "start of Continuous"),
        (lambda: bmrs.Continuous(start=5, stop=4), ValueError, "stop of Continuous must not come before start=5"),
        (lambda: bmrs.Continuous(shrink=1), TypeError, "shrink of Continuous must be True or False"),
        (lambda: bmrs.PostTraining(levels=(0.5, 0.2)), ValueError, r"must increase within \(0, 1\]"),
        (lambda: bmrs.PostTraining(levels=()), ValueError, "levels of PostTraining must increase"),
        (lambda: bmrs.PostTraining(levels=(0.5, 1.5)), ValueError, "levels of PostTraining must increase"),
        (lambda: bmrs.PostTraining(levels="0.5"), TypeError, "levels of PostTraining must be a tuple"),
        (lambda: bmrs.PostTraining(epochs_per_level=0), ValueError, "epochs_per_level of PostTraining"),
        (lambda: bmrs.SNR(0), ValueError, "threshold of SNR must be a positive number, but got 0"),
        (lambda: bmrs.SNR(float("nan")), ValueError, "threshold of SNR"),
        (lambda: bmrs.PosteriorMean("0.1"), TypeError, "threshold of PosteriorMean"),
        (lambda: bmrs.BMRS_U(23, 8), ValueError, "p2 of BMRS_U must be above p1=23, but got 8"),
        (lambda: bmrs.BMRS_U(float("inf")), ValueError, "p1 of BMRS_U must be a finite number"),
        (lambda: bmrs.BMRS_N(scale=0.0), ValueError, "scale of BMRS_N must be a positive number"),
        (lambda: bmrs.BMRS_N(prior_log_odds=float("inf")), ValueError, "prior_log_odds must be a finite number"),
        (lambda: bmrs.BMRS_N(prior_log_odds="3"), TypeError, "prior_log_odds must be a finite number, but got '3'"),
        (
            lambda: bmrs.BMRS_N(prior_log_odds={"a": torch.tensor([0.0, float("nan")])}),
            ValueError,
            "prior_log_odds of site 'a' must be finite numbers",
        ),
        (lambda: bmrs.Random(seed=-1), ValueError, "seed of Random must"),
        (lambda: bmrs.WeightNorm(match="BMRS_N"), TypeError, r"match must be a Criterion, for instance BMRS_N\(\)"),
        (lambda: bmrs.WeightNorm(match=bmrs.Random()), TypeError, "match must have a decision line of its own"),
        (lambda: bmrs.MeanFieldELBO(num_particles=0), ValueError, "num_particles must be a positive integer"),
    ],
)
def test_settings_are_checked_when_they_are_made(make, error, message):
    with pytest.raises(error, match=message):
        make()


def fit(train, validation=None, make=small_classifier):
    return bmrs.fit(*make(), train, validation, **QUICK)


def test_a_batch_size_above_the_data_is_all_of_them():
    whole, more = (bmrs.fit(*small_classifier(), blobs(), **{**QUICK, "batch_size": n}) for n in (200, 10_000))
    assert [each["loss"] for each in whole.history] == [each["loss"] for each in more.history]


def test_arrays_of_numpy_are_converted():
    x, y = blobs()
    expected = fit((x, y), (x, y)).history[-1]["loss"]
    for dtype in (np.float32, np.float64):
        arrays = x.numpy().astype(dtype), y.numpy()
        assert fit(arrays, arrays).history[-1]["loss"] == pytest.approx(expected)


def test_data_that_do_not_fit_are_named():
    x, y = blobs()
    with pytest.raises(ValueError, match=r"of shape \(200, 6\) and torch.float64, and parameters are of torch.float32"):
        fit((x.double(), y))
    with pytest.raises(ValueError, match=r"the network cannot take the inputs of train: they are of shape \(200, 5\)"):
        fit((x[:, :5], y))
    with pytest.raises(ValueError, match=r"the network cannot take the inputs of validation"):
        fit((x, y), (x[:, :5], y))
    with pytest.raises(TypeError, match="inputs of train must hold numbers, but are an array of dtype object"):
        fit((np.array([None] * 200), y.numpy()))
    with pytest.raises(TypeError, match=r"train must be a pair of tensors .* but got \('a', 'b'\)"):
        fit(("a", "b"))
    with pytest.raises(ValueError, match="train is empty"):
        fit((x[:, :0], y))
    with pytest.raises(ValueError, match="needs class indices"):
        fit((x, y > 0))
    with pytest.raises(TypeError, match=r"layout is torch.sparse_coo.*use .to_dense\(\)"):
        fit((x.to_sparse(), y))


def test_data_that_need_a_gradient_do_not_get_one():
    x, y = blobs()
    x = x.clone().requires_grad_()
    fit((x, y))
    assert x.grad is None


class Tuple(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = small_classifier()[0].net

    def forward(self, x):
        return self.net(x), x


def test_outputs_that_are_no_tensor_need_a_likelihood():
    def make(**more):
        model = bmrs.NoisyNetwork(Tuple(), **more)
        return model, bmrs.TruncatedLogNormalGuide(model)

    with pytest.raises(TypeError, match=r"the network returns a tuple.*lambda out: Categorical\(logits=out\[0\]\)"):
        fit(blobs(), make=make)
    fit(blobs(), make=lambda: make(likelihood=lambda out: dist.Categorical(logits=out[0])))
    with pytest.raises(TypeError, match="likelihood must return the distribution of the observations, but returned a"):
        fit(blobs(), make=lambda: make(likelihood=lambda out: out[0]))


def test_a_posterior_in_half_precision_is_refused_and_a_network_is_not():
    x, y = blobs()

    def make(half_guide=True):
        model, _ = small_classifier()
        guide = bmrs.TruncatedLogNormalGuide(model.bfloat16())
        assert guide.loc.dtype == torch.float32
        return model, guide.bfloat16() if half_guide else guide

    with pytest.raises(ValueError, match=r"parameter 'loc' of the guide is of torch.bfloat16.*use guide.float\(\)"):
        fit((x.bfloat16(), y), make=make)
    fit((x.bfloat16(), y), make=lambda: make(half_guide=False))


def test_float64_is_fitted_as_it_is():
    def make():
        model, guide = small_classifier()
        return model.double(), guide.double()

    x, y = blobs()
    losses = [
        bmrs.fit(*make(), (x.double(), y), precision=precision, **QUICK).history[-1]["loss"]
        for precision in ("32-true", "64-true")
    ]
    assert losses[0] == losses[1]


def test_structures_of_another_network_are_refused():
    x, y = blobs()
    other = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))
    with pytest.raises(ValueError, match=r"structures were found in another network: there '.*' had"):
        bmrs.fit(*small_classifier(), (x, y), structures=bmrs.find_structures(other, x), **QUICK)


def test_keywords_that_are_none_are_named():
    with pytest.raises(
        TypeError, match=r"fit got .*argument 'epoch'; did you mean epochs\? It takes .*folder, .*criterion, pruning, "
    ):
        bmrs.fit(*small_classifier(), blobs(), epoch=3)
    with pytest.raises(TypeError, match="fit_ensemble got an unexpected keyword argument 'folder'"):
        bmrs.fit_ensemble(small_classifier, blobs(), seeds=[0], folder="here")


def test_settings_are_one_record_for_every_fit():
    settings: bmrs.FitSettings = {**QUICK, "criterion": None, "lr": 1e-3}
    seed = settings.pop("seed")
    alone = bmrs.fit(*small_classifier(), blobs(), seed=seed, **settings)
    (member,) = bmrs.fit_ensemble(small_classifier, blobs(), seeds=[seed], **settings)
    assert [each["phase"] for each in alone.history] == [each["phase"] for each in member.result.history]


def test_a_likelihood_out_of_range_is_seen_behind_a_mask():
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), bmrs.MultiplicativeNoise(8), nn.Linear(8, 1))
    model = bmrs.NoisyNetwork(net, lambda out: dist.Normal(out, -1.0).to_event(1).mask(True))
    guide = bmrs.TruncatedLogNormalGuide(model)
    with pytest.raises(ValueError, match="the likelihood is a Normal whose scale must satisfy"):
        bmrs.fit(model, guide, (torch.randn(8, 6), torch.randn(8, 1)), progress=False)
