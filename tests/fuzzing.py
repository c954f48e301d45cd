"""Call the library with arguments that are wrong or odd: python tests/fuzzing.py --first SEED --count N.

Each call has good arguments but for one, or sometimes two, of a pool of odd values. It must return, with a result that
makes sense, or be refused: by an error that the library itself raises, before anything has been changed. Prints every
other outcome, grouped.
"""

import argparse
import contextlib
import copy
import functools
import random
import sys
import tempfile
import traceback
import warnings
from collections import Counter
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pyro
import pyro.distributions as dist
import torch
from nets import blobs, small_classifier
from pyro.infer.autoguide import AutoNormal
from torch import nn

import pyro_bmrs as bmrs
from analysis.runs.reference import reference_kl_weights
from pyro_bmrs.bmr.latents import posterior_and_prior
from pyro_bmrs.io.files import prepare_run_folder

LIBRARY = str(Path(bmrs.__file__).parent)
REFUSALS = (TypeError, ValueError, NotImplementedError, OSError, RuntimeError, ImportError)
DOCUMENTED = (FloatingPointError,)  # of a learning rate of 1e300, say, once training has begun


class World:
    """Good arguments, made afresh for each call."""

    def __init__(self, folder):
        self.folder = folder
        self.model, self.guide = small_classifier(hidden=8)
        self.x, self.y = blobs(32)
        self.optimizer = torch.optim.Adam([*self.model.parameters(), *self.guide.parameters()])
        self.masks = {"2.theta": torch.arange(8) < 5}
        self.plain = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))

    def around(self):
        """Return all that a refused call must leave as it was."""
        tensors = (*self.model.state_dict().values(), *self.guide.state_dict().values())
        modules = (*self.model.modules(), *self.guide.modules(), *self.plain.modules())
        return (
            [tensor.flatten().tolist() for tensor in tensors],
            [module.training for module in modules],
            [parameter.requires_grad for module in modules for parameter in module.parameters(recurse=False)],
            self.model.num_data,
            self.model.kl_weight,
            dict(self.model.kl_weights),
            torch.get_rng_state().tolist(),
            torch.get_default_dtype(),
            len(pyro.poutine.runtime._PYRO_STACK),
            torch.distributions.Distribution._validate_args,
            torch.is_grad_enabled(),
            [sum(len(hooks) for hooks in (m._forward_hooks, m._forward_pre_hooks)) for m in modules],
            sorted(str(path) for path in Path(self.folder).rglob("*")),
        )


def pool(world):
    """Return odd values for any argument."""
    other, guide = small_classifier(seed=1, hidden=8)
    x, y = world.x, world.y
    return [
        None,
        True,
        False,
        0,
        1,
        -1,
        2.5,
        -0.5,
        float("nan"),
        float("inf"),
        10**12,
        1j,
        "",
        "cpu",
        "nonsense",
        b"bytes",
        (),
        [],
        {},
        [1, 2],
        {"a": 1},
        {"2.theta": 1.0},
        object(),
        int,
        print,
        lambda *args: None,
        world.model,
        other,
        world.guide,
        guide,
        copy.deepcopy(world.guide),
        bmrs.NoisyNetwork,
        bmrs.TruncatedLogNormalGuide,
        world.plain,
        AutoNormal(world.model),
        nn.CrossEntropyLoss(),
        bmrs.BMRS_N,
        bmrs.BMRS_N(),
        bmrs.SNR(1.0),
        bmrs.Continuous,
        bmrs.Continuous(),
        bmrs.Continuous(shrink=True),
        bmrs.PostTraining(levels=(0.2, 0.4)),
        bmrs.LogUniform(),
        dist.Normal(0.0, 1.0),
        dist.Beta(1.0, 1.0),
        torch.distributions.Gamma(1.0, 1.0),
        dist.Categorical(torch.ones(3)),
        dist.Delta(torch.tensor(0.5)),
        dist.RelaxedBernoulli(torch.tensor(0.5), torch.tensor(0.5)),
        bmrs.TruncatedLogNormal(torch.tensor(-1.0), torch.tensor(0.5)),
        dist.Normal(torch.zeros(3), 1.0).to_event(1),
        bmrs.LogUniform(torch.full((2,), -9.0), torch.zeros(2)),
        bmrs.LogUniform(torch.full((3,), -9.0), torch.zeros(3)),
        torch.tensor(1.0),
        torch.tensor(float("nan")),
        torch.zeros(0),
        torch.zeros(8),
        torch.ones(8, dtype=torch.bool),
        torch.ones(8, dtype=torch.long),
        x,
        x.double(),
        x.half(),
        x.numpy(),
        x[:, :3],
        x[:0],
        x.clone().requires_grad_(),
        x.to(torch.complex64),
        y,
        y.int(),
        y.float(),
        y[:5],
        y + 7,
        (x, y),
        (x, y, y),
        [x, y],
        (x.numpy(), y.numpy()),
        (x.double().numpy(), y.numpy()),
        (x * float("nan"), y),
        (x, y.float()),
        (x[:3], y[:3]),
        (x.numpy().tolist(), y),
        np.array(["a"]),
        np.float64(2.0),
        np.int64(3),
        torch.utils.data.TensorDataset(x, y),
        {"2.theta": torch.zeros(8)},
        {"2.theta": torch.zeros(8, dtype=torch.bool)},
        {"2.theta": torch.ones(3, dtype=torch.bool)},
        {"other": torch.ones(8, dtype=torch.bool)},
        {"2.theta": torch.full((8,), float("nan"))},
        {"2.theta": None},
        bmrs.FitResult({}, {}, [], 0.0),
        bmrs.find_structures(world.plain, x),
        torch.device("cpu"),
        torch.device("meta"),
        "meta",
        "cuda:7",
        "cpu:3",
        range(2),
        {1, 2},
        iter([1, 2]),
        bmrs.Callback(),
        [bmrs.Callback()],
        Path("/dev/null/a"),
        world.optimizer,
        torch.optim.LBFGS([torch.zeros(1, requires_grad=True)]),
        "example",
        "element",
        "parameters",
        "bf16-mixed",
        "64-true",
        "mask",
        3,
        7,
        (0.5, 0.2),
        (0.1, 2.0),
        1e300,
        -1e300,
        1e-300,
    ]


FIT = {"epochs": 2, "fine_tune_epochs": 1, "batch_size": 16, "seed": 0, "progress": False, "device": "cpu"}
FIT_MORE = {
    "criterion": bmrs.BMRS_N(),
    "pruning": bmrs.Continuous(),
    "lr": 1e-2,
    "posterior_lr": 0.1,
    "kl_warmup_epochs": 0,
    "decay": True,
    "granularity": "example",
    "precision": "32-true",
    "fabric": None,
    "compile": False,
    "structures": None,
    "unremovable": "refuse",
    "callbacks": (),
    "folder": None,
    "checkpoint_every": 1,
    "resume": False,
    "validation": None,
}


def distributions():
    return {
        "posterior": bmrs.TruncatedLogNormal(torch.tensor(-1.0), torch.tensor(0.5)),
        "prior": bmrs.LogUniform(),
        "reduced_prior": bmrs.spike(bmrs.LogUniform()),
    }


def make():
    return small_classifier(hidden=8)


CALLS = {
    bmrs.fit: lambda w: {"model": w.model, "guide": w.guide, "train": (w.x, w.y), "unpack": None, **FIT_MORE, **FIT},
    bmrs.prune: lambda w: {
        "net": w.plain,
        "train": (w.x, w.y),
        "validation": (w.x, w.y),
        "remove": 0.5,
        "cost": "parameters",
        "likelihood": None,
        "output": None,
        "unpack": None,
        "structures": None,
        "prior": None,
        "kl_weight": 1.0,
        **FIT,
    },
    bmrs.sampled_noise: lambda w: {"model": w.model, "guide": w.guide, "examples": 4},
    bmrs.ToSize: lambda w: {"remove": 0.5, "cost": "flops"},
    bmrs.fit_ensemble: lambda w: {
        "make": make,
        "train": (w.x, w.y),
        "validation": None,
        "seeds": (0, 1),
        "criterion": bmrs.BMRS_N(),
        "pruning": bmrs.Continuous(),
        "callbacks": None,
        "granularity": "example",
        "unremovable": "refuse",
        "lr": 1e-2,
        "posterior_lr": 0.1,
        "decay": True,
        "kl_warmup_epochs": 0,
        **{name: value for name, value in FIT.items() if name != "seed"},
    },
    bmrs.predict: lambda w: {"model": w.model, "guide": w.guide, "x": w.x, "masks": w.masks, "batch_size": 8},
    bmrs.compact: lambda w: {
        "model": w.model,
        "guide": w.guide,
        "masks": w.masks,
        "example_input": w.x,
        "structures": None,
    },
    bmrs.shrink: lambda w: {"model": w.model, "guide": w.guide, "optimizer": w.optimizer, "example_input": w.x},
    bmrs.find_structures: lambda w: {"net": w.plain, "example_inputs": w.x, "outputs": (), "trial": True},
    bmrs.attach_noise: lambda w: {"net": w.plain, "structures": bmrs.find_structures(w.plain, w.x), "prior": None},
    bmrs.count_parameters: lambda w: {
        "net": w.model.net,
        "structures": bmrs.find_structures(w.model.net, w.x),
        "masks": w.masks,
    },
    bmrs.count_flops: lambda w: {
        "net": w.model.net,
        "example_input": w.x,
        "structures": bmrs.find_structures(w.model.net, w.x),
        "masks": w.masks,
    },
    bmrs.cost_log_odds: lambda w: {"net": w.model.net, "example_input": w.x, "mean": 1.0, "cost": "parameters"},
    bmrs.cost_kl_weights: lambda w: {
        "net": w.model.net,
        "example_input": w.x,
        "mean": 1.0,
        "cost": "flops",
        "masks": w.masks,
    },
    bmrs.measure_latency: lambda w: {"nets": [w.plain], "example_input": w.x, "rounds": 1},
    bmrs.NoisyNetwork: lambda w: {
        "net": copy.deepcopy(w.model.net),
        "likelihood": None,
        "num_data": 32,
        "kl_weight": 1.0,
    },
    bmrs.MultiplicativeNoise: lambda w: {"size": 8, "prior": bmrs.LogUniform(), "dim": 1},
    bmrs.TruncatedLogNormalGuide: lambda w: {"model": w.model, "init_loc": 0.0, "init_log_scale": -3.0},
    bmrs.BetaGuide: lambda w: {"model": w.model, "init_mean": 0.9, "init_concentration": 10.0},
    bmrs.MeanFieldELBO: lambda w: {"granularity": "example", "num_particles": 1},
    bmrs.Continuous: lambda w: {"start": 1, "every": 1, "stop": 4, "shrink": False},
    bmrs.PostTraining: lambda w: {"levels": (0.1, 0.2), "epochs_per_level": 1, "stop": True},
    bmrs.BMRS_N: lambda w: {"scale": 1e-6, "prior_log_odds": 0.0},
    bmrs.BMRS_U: lambda w: {"p1": 8, "p2": 23, "prior_log_odds": 0.0},
    bmrs.SNR: lambda w: {"threshold": 1.0},
    bmrs.PosteriorMean: lambda w: {"threshold": 0.1},
    bmrs.WeightNorm: lambda w: {"match": bmrs.BMRS_N(), "match_by": "parameters"},
    bmrs.Random: lambda w: {"match": bmrs.BMRS_N(), "match_by": "structures", "seed": 0},
    bmrs.evidence_change: lambda w: distributions(),
    bmrs.reduced_posterior: lambda w: {**distributions(), "reduced_prior": bmrs.precision_window(bmrs.LogUniform(), 8)},
    bmrs.estimate_evidence_change: lambda w: {
        **distributions(),
        "reduced_prior": bmrs.precision_window(bmrs.LogUniform(), 8, None),
        "num_samples": 50,
        "seed": 0,
    },
    bmrs.spike: lambda w: {"prior": bmrs.LogUniform(), "scale": 1e-6},
    bmrs.precision_window: lambda w: {"prior": bmrs.LogUniform(), "p1": 8, "p2": 23},
    bmrs.reduce: lambda w: {
        "guide": w.guide,
        "model": w.model,
        "reduced_priors": {"2.theta": bmrs.spike(bmrs.LogUniform())},
    },
    posterior_and_prior: lambda w: {"guide": w.guide, "model": w.model, "site": "2.theta"},
    bmrs.greedy_search: lambda w: {"delta_f_of": lambda removed: -1.0, "candidates": range(3), "prior_log_odds": 0.0},
    bmrs.LogUniform: lambda w: {"log_low": -9.0, "log_high": 0.0},
    bmrs.TruncatedLogNormal: lambda w: {
        "loc": torch.tensor(0.0),
        "scale": torch.tensor(1.0),
        "log_low": -9.0,
        "log_high": 0.0,
    },
    bmrs.evidence_changes: lambda w: {"guide": w.guide, "reduced_prior": bmrs.spike},
    bmrs.to_arviz: lambda w: {"model": w.model, "guide": w.guide, "data": (w.x, w.y), "draws": 3, "seed": 0},
    bmrs.guide_to_arviz: lambda w: {"model": w.model, "guide": w.guide, "x": w.x, "y": w.y, "draws": 2, "seed": 0},
    bmrs.evaluate: lambda w: {"model": w.model, "guide": w.guide, "data": (w.x, w.y), "draws": 3, "seed": 0},
    bmrs.noise_posterior: lambda w: {"model": w.model, "guide": w.guide},
    bmrs.free_form_evidence: lambda w: {
        "model": w.model,
        "guide": w.guide,
        "data": (w.x, w.y),
        "pairs": 1,
        "seed": 0,
        "num_data": None,
    },
    bmrs.FreeFormCriterion: lambda w: {"data": (w.x, w.y), "pairs": 1, "prior_log_odds": 0.0},
    bmrs.TrainingGradients: lambda w: {"guide": w.guide, "epochs": 3},
    bmrs.plot_ridge: lambda w: {"guide": w.guide, "site": "2.theta", "ax": None},
    bmrs.plot_network: lambda w: {"delta_f": bmrs.evidence_changes(w.guide), "masks": w.masks, "ax": None},
    bmrs.plot_forest: lambda w: {"guide": w.guide, "mass": 0.9, "ax": None},
    bmrs.plot_evidence: lambda w: {
        "delta_f": bmrs.evidence_changes(w.guide),
        "masks": w.masks,
        "prior_log_odds": 0.0,
        "ax": None,
    },
    bmrs.plot_evidence_snr: lambda w: {
        "delta_f": bmrs.evidence_changes(w.guide),
        "snr": {"2.theta": torch.rand(8)},
        "prior_log_odds": 0.0,
        "ax": None,
        "masks": None,
    },
    bmrs.plot_reduction: lambda w: {**distributions(), "ax": None, "name": ""},
    bmrs.plot_history: lambda w: {
        "history": [{"epoch": 1, "phase": "noisy", "compression": 0.1}],
        "ax": None,
        "dense": None,
    },
    bmrs.save: lambda w: {"net": w.plain, "path": Path(w.folder) / "net"},
    bmrs.load: lambda w: {"path": saved(w), "module": None},
    prepare_run_folder: lambda w: {"path": Path(w.folder) / "run", "overwrite": False, "resume": False},
    reference_kl_weights: lambda w: {"net": w.model.net, "num_data": 32},
}


def saved(world):
    bmrs.save(world.plain, Path(world.folder) / "saved")
    return Path(world.folder) / "saved"


@functools.cache
def weights(functions):
    """Return how many arguments each function has: so often it is called."""
    with tempfile.TemporaryDirectory() as folder:
        return [len(CALLS[function](World(folder))) for function in functions]


def check(function, result, arguments):
    """Return what is wrong with a result, or an empty string."""
    if function is bmrs.fit:
        if not all(np.isfinite(record["loss"]) for record in result.history):
            return "a loss that is not finite"
        model, guide = arguments["model"], arguments["guide"]
        if any(mask.dtype != torch.bool for mask in result.masks.values()):
            return "masks that are not bool"
        x = torch.randn(4, 6, dtype=next(model.parameters()).dtype)
        small = bmrs.compact(model, guide, result.masks, x)
        if not torch.allclose(small(x), bmrs.predict(model, guide, x, result.masks), rtol=1e-3, atol=1e-3):
            return "a compacted network that differs from the masked one"
    if isinstance(result, torch.Tensor) and result.isnan().any() and function is not bmrs.predict:
        return "NaN"
    return ""


def outcome(seed, functions=tuple(CALLS)):
    """Make one call and return its outcome, and what to group it by."""
    chance = random.Random(seed)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        world = World(folder)
        (function,) = chance.choices(functions, weights(functions))
        arguments = CALLS[function](world)
        odd = chance.sample(sorted(arguments), 1 if chance.random() < 0.8 else min(2, len(arguments)))
        values = pool(world)
        chosen = {name: chance.choice(values) for name in odd}
        label = (function.__name__, ", ".join(f"{name}={_short(value)}" for name, value in chosen.items()))
        arguments |= chosen
        before = world.around()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                result = function(**arguments)
            wrong = check(function, result, arguments)
            mpl.pyplot.close("all")
            return ("surprise", (*label, wrong)) if wrong else ("right", label)
        except REFUSALS as error:
            frame = traceback.extract_tb(error.__traceback__)[-1]
            where = f"{type(error).__name__} at {Path(frame.filename).name}:{frame.lineno} {str(error)[:120]!r}"
            of_torch = str(error).startswith("Expected parameter ")  # what its distributions say of their parameters
            if not (frame.filename.startswith(LIBRARY) or of_torch):
                return "surprise", (*label, f"another's {where}")
            if len(str(error)) < 20:
                return "surprise", (*label, f"terse {where}")
            after = world.around()
            changed = [i for i, (one, other) in enumerate(zip(before, after, strict=True)) if one != other]
            return ("surprise", (*label, f"changed {changed} before {where}")) if changed else ("refused", label)
        except DOCUMENTED:
            return "refused", label
        except Exception as error:  # the library should have said it better
            frame = traceback.extract_tb(error.__traceback__)[-1]
            where = f"{Path(frame.filename).name}:{frame.lineno}"
            return "surprise", (*label, f"{type(error).__name__} at {where} {str(error)[:120]!r}")


def _short(value):
    return f"{type(value).__name__} {str(value)[:40]!r}".replace("\n", " ")


def campaign(first, count):
    """Return counts of outcomes, and the surprises by function and place."""
    counts, surprises = Counter(), {}
    mpl.use("Agg")
    for seed in range(first, first + count):
        kind, label = outcome(seed)
        counts[kind] += 1
        if kind == "surprise":
            surprises.setdefault((label[0], label[2][:60]), []).append((seed, *label[1:]))
        if (seed - first) % 500 == 499:
            print(dict(counts), flush=True)
    return counts, surprises


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--count", type=int, default=10_000)
    chosen_arguments = parser.parse_args()
    torch.set_num_threads(1)
    counted, odd_ones = campaign(chosen_arguments.first, chosen_arguments.count)
    for (name, place), cases in sorted(odd_ones.items(), key=lambda item: -len(item[1])):
        print(f"{len(cases):4} {name}: {place}\n       {cases[0]}")
    print(f"{sum(counted.values())} calls: {dict(counted)}")
    sys.exit(bool(odd_ones))
