"""Cases in which the evidence of removing a structure can be had otherwise: what truth and predictions there are."""

import copy
import math
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from numpy.polynomial import chebyshev
from pyro.distributions import Normal
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.distributions import kl_divergence

import pyro_bmrs as bmrs
from analysis.data.sets import load
from analysis.drawing.evidence_figures import draw_pair
from models import mlp
from pyro_bmrs.bmr.free_form import log_parabola_moment
from pyro_bmrs.model.supply import supply_noise
from pyro_bmrs.randomness import local_seed
from pyro_bmrs.structures.inputs import to_input

__all__ = ["digits_case", "linear_case", "mnist_case", "refitted_case"]

_LOW, _HIGH = -20.0, 0.0
_GRID = 1200  # points of log(theta) in each dimension of the exact evidence
_STARTS = ((-0.5, -1.0), (-6.0, 1.5), (-10.0, 2.0))  # of the mean-field posteriors: near 1, and near nothing

Prediction = dict[str, Any]


def _formulas(posterior: Any, prior: Any) -> dict[str, Prediction]:
    """Return what the criteria say of a posterior."""
    reduced = {
        "BMRS_N": bmrs.spike(prior),
        "BMRS_U(8, p2=None)": bmrs.precision_window(prior, 8, None),
        "BMRS_U(4, p2=None)": bmrs.precision_window(prior, 4, None),
        "BMRS_U(8, 23)": bmrs.precision_window(prior, 8, 23),
    }
    found = {name: _prediction(bmrs.evidence_change(posterior, prior, each)) for name, each in reduced.items()}
    return {**found, "SNR": {**_prediction(-torch.log(posterior.snr)), "score": True}}


def _prediction(values: Tensor) -> Prediction:
    return {"values": values.detach().double().clamp(-1e6, 1e6).flatten().tolist()}


def linear_case(config: Any) -> list[dict[str, Any]]:
    r"""Return regressions :math:`y = a_1 \theta_1 + a_2 \theta_2 + \epsilon`, whose evidence is exact on a grid."""
    generator = torch.Generator().manual_seed(config.seed)
    gram, score = _regressions(config.problems, generator)
    prior = bmrs.LogUniform(torch.tensor(_LOW).double(), torch.tensor(_HIGH).double())
    exact, marginals = _exact(gram, score)
    with local_seed(devices=[]):
        torch.manual_seed(config.seed)
        elbo, posterior = _mean_field(gram, score, prior, torch.ones(2), config.steps)
        refitted = []
        for i in range(2):
            without = torch.ones(2)
            without[i] = 0
            refitted.append(_mean_field(gram, score, prior, without, 2 * config.steps // 3)[0] - elbo)
    other = posterior.mean.flip(1)
    slope = score - gram[:, 0, 1:2] * other
    curvature = -torch.stack([gram[:, 0, 0], gram[:, 1, 1]], 1)
    predictions = {
        "the formula, on exact marginals": _prediction(marginals),
        **_formulas(posterior, prior),
        "refitted without it": _prediction(torch.stack(refitted, 1)),
        "free form": _prediction(-log_parabola_moment(slope, curvature, prior)),
    }
    return [{"name": "Linear in the noise.", "truth": exact.flatten().tolist(), "predictions": predictions}]


def _regressions(problems: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return Gram matrices and scores of regressions, of which two noises in five are truly 0."""

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    signal = torch.exp(math.log(0.3) + math.log(100) * uniform(problems, 2))
    correlation = 1.9 * uniform(problems) - 0.95
    theta = torch.where(uniform(problems, 2) < 0.4, 0.0, uniform(problems, 2))
    gram = torch.diag_embed(signal.square())
    gram[:, 0, 1] = gram[:, 1, 0] = correlation * signal.prod(1)
    noise = torch.randn(problems, 2, 1, generator=generator, dtype=torch.float64)
    return gram, (gram @ theta.unsqueeze(-1) + torch.linalg.cholesky(gram) @ noise).squeeze(-1)


def _exact(gram: Tensor, score: Tensor) -> tuple[Tensor, Tensor]:
    """Return the exact evidence of each removal, and the formula (Savage-Dickey) on exact marginal posteriors."""
    u = torch.linspace(_LOW, _HIGH, _GRID, dtype=torch.float64)
    t, log_w = u.exp(), torch.full_like(u, -math.log(_GRID - 1))
    log_w[[0, -1]] -= math.log(2)
    single = -0.5 * gram.diagonal(dim1=1, dim2=2)[..., None] * t.square() + score[..., None] * t + log_w
    alone = torch.logsumexp(single, -1)
    whole, edges = [], []
    for i in range(len(gram)):
        joint = single[i, 0][:, None] + single[i, 1][None] - gram[i, 0, 1] * t[:, None] * t[None]
        total = torch.logsumexp(joint.flatten(), 0)
        whole.append(total)
        at_edge = torch.stack([torch.logsumexp(joint[0], 0), torch.logsumexp(joint[:, 0], 0)])
        edges.append(at_edge - total - log_w[0])
    return alone.flip(1) - torch.stack(whole)[:, None], torch.stack(edges)


def _mean_field(gram: Tensor, score: Tensor, prior: Any, present: Tensor, steps: int) -> tuple[Tensor, Any]:
    """Return the best ELBO of truncated log-normal posteriors from three starts, and the posteriors."""

    def elbo(q: Any, draws: int) -> Tensor:
        theta = q.rsample((draws,)) * present
        log_likelihood = -0.5 * torch.einsum("sri,rij,srj->sr", theta, gram, theta) + (theta * score).sum(-1)
        return log_likelihood.mean(0) - (kl_divergence(q, prior) * present).sum(-1)

    best: tuple[Tensor, Tensor, Tensor] | None = None
    for start in _STARTS:
        loc, log_scale = (torch.full_like(score, each).requires_grad_() for each in start)
        optimizer = torch.optim.Adam([loc, log_scale], lr=0.05)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        for _ in range(steps):
            optimizer.zero_grad()
            q = bmrs.TruncatedLogNormal(loc, log_scale.exp(), prior.log_low, prior.log_high, validate_args=False)
            (-elbo(q, 32).sum()).backward()
            optimizer.step()
            schedule.step()
            with torch.no_grad():
                log_scale.clamp_(-8, 4)
                loc.clamp_(-60, 30)
        with torch.no_grad():
            q = bmrs.TruncatedLogNormal(loc, log_scale.exp(), prior.log_low, prior.log_high)
            reached = elbo(q, 4000)
            if best is None:
                best = reached, loc.detach(), log_scale.detach()
            better = reached > best[0]
            pick = [torch.where(better[:, None], new, old) for new, old in zip((loc, log_scale), best[1:], strict=True)]
            best = torch.where(better, reached, best[0]), pick[0], pick[1]
    assert best is not None
    return best[0], bmrs.TruncatedLogNormal(best[1], best[2].exp(), prior.log_low, prior.log_high)


def refitted_case(config: Any) -> list[dict[str, Any]]:
    """Return small regressions, each fitted again without each of its structures."""
    return [_refitted(config, kl_weight) for kl_weight in config.kl_weights]


def _refitted(config: Any, kl_weight: float) -> dict[str, Any]:
    truth: list[float] = []
    predictions: dict[str, Prediction] = {}
    settings: dict[str, Any] = {
        "criterion": None,
        "fine_tune_epochs": 0,
        "batch_size": 50,
        "lr": 1e-2,
        "progress": False,
    }
    for network in range(config.networks):
        seed = config.seed + network
        generator = torch.Generator().manual_seed(seed)
        x = 4 * torch.rand(200, 2, generator=generator) - 2
        y = torch.sin(2 * x[:, 0]) + 0.5 * x.prod(1) + 0.2 * torch.randn(200, generator=generator)
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Linear(2, 10), nn.Tanh(), bmrs.MultiplicativeNoise(10), nn.Linear(10, 1))
        model = bmrs.NoisyNetwork(net, likelihood=_gaussian, kl_weight=kl_weight)
        guide = bmrs.TruncatedLogNormalGuide(model)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of fits that go on from others
            bmrs.fit(model, guide, (x, y), epochs=5 * config.epochs, seed=seed, **settings)
            again = {**settings, "epochs": config.epochs // 2 * 5, "kl_warmup_epochs": 0, "seed": seed, "lr": 5e-3}
            elbo = _elbo_after(model, guide, (x, y), None, again)
            for i in range(10):
                truth.append((_elbo_after(model, guide, (x, y), i, again) - elbo) / kl_weight)
        found = {**_formulas(guide.flat_posterior(), guide.prior()["2.theta"])}
        found["free form"] = _prediction(bmrs.free_form_evidence(model, guide, (x, y), pairs=10).delta_f["2.theta"])
        for name, each in found.items():
            predictions.setdefault(name, {**each, "values": []})["values"] += each["values"]
    return {"name": f"Refitted, kl_weight {kl_weight:g}.", "truth": truth, "predictions": predictions}


def _gaussian(out: Tensor) -> Any:
    return Normal(out.squeeze(-1), 0.2)


def _elbo_after(model: Any, guide: Any, data: Any, removed: int | None, settings: dict[str, Any]) -> float:
    """Return the ELBO of the whole data set once a copy without the structure has been fitted on."""
    model, guide = copy.deepcopy((model, guide))
    if removed is not None:
        model.noise["2.theta"].remove(torch.arange(10) == removed)
    bmrs.fit(model, guide, data, **settings)
    return len(data[1]) * bmrs.evaluate(model, guide, data, draws=400).elbo


def digits_case(config: Any) -> list[dict[str, Any]]:
    """Return MLPs on the digits, whose free-form evidence is also computed by brute force."""
    bunch = load_digits()
    x, y = torch.tensor(bunch.data, dtype=torch.float32)[:1347] / 16, torch.tensor(bunch.target)[:1347]
    return [_brute_forced(config, kl_weight, x, y) for kl_weight in config.kl_weights]


def _brute_forced(config: Any, kl_weight: float, x: Tensor, y: Tensor) -> dict[str, Any]:
    torch.manual_seed(config.seed)
    model = bmrs.NoisyNetwork(mlp(64, hidden=config.hidden, layers=2), kl_weight=kl_weight)
    guide = bmrs.TruncatedLogNormalGuide(model)
    gradients = bmrs.TrainingGradients(guide)
    fitted: dict[str, Any] = {"epochs": config.epochs, "fine_tune_epochs": 0, "batch_size": 32, "seed": config.seed}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = bmrs.fit(model, guide, (x, y), criterion=None, progress=False, **fitted)
    predictions = _formulas(guide.flat_posterior(), _flat_prior(guide))
    predictions["free form, one pair"] = _timed(lambda: bmrs.free_form_evidence(model, guide, (x, y)))
    predictions["free form, five pairs"] = _timed(lambda: bmrs.free_form_evidence(model, guide, (x, y), pairs=5))
    predictions["free form, from training"] = _timed(lambda: gradients.evidence(x[:256]))
    if kl_weight == config.kl_weights[0]:
        evidence = bmrs.free_form_evidence(model, guide, (x, y), pairs=20)
        draw_pair(guide, evidence, config.output / "one_goes_one_stays.png")
    first = _timed(lambda: _ByBruteForce(brute_force(model, guide, x, y, 2)))
    predictions["brute force, two draws"] = first
    chosen = {"BMRS_N", "BMRS_U(4, p2=None)", "free form, five pairs", "free form, from training"}
    again: dict[str, Any] = {"epochs": config.epochs // 2, "fine_tune_epochs": 0, "batch_size": 32, "lr": 1e-3}
    again |= {"criterion": None, "kl_warmup_epochs": 0, "seed": config.seed, "progress": False}
    together = {
        name: _together(model, guide, (x, y), torch.tensor(predictions[name]["values"]), again)
        for name in sorted(chosen)
    }
    for stages in (4, 16):
        delta_f = _in_stages(model, guide, (x, y), stages)
        together[f"free form, in {stages} stages"] = _together(model, guide, (x, y), delta_f, again)
    return {
        "together": together,
        "name": f"Digits, kl_weight {kl_weight:g}; an epoch of training takes {result.seconds / config.epochs:.2g} s.",
        "truth": brute_force(model, guide, x, y, 8).tolist(),
        "predictions": predictions,
    }


def _flat_prior(guide: Any) -> bmrs.LogUniform:
    """Return the prior of all structures of a guide."""
    priors = list(guide.prior().values())
    return bmrs.LogUniform(torch.cat([each.log_low for each in priors]), torch.cat([each.log_high for each in priors]))


def mnist_case(config: Any) -> list[dict[str, Any]]:
    """Return the study's MLP on MNIST, some of whose structures' free-form evidence is computed by brute force."""
    x, y = load("mnist", config.data_dir, size=32).train
    x = to_input(x)
    torch.manual_seed(config.seed)
    model = bmrs.NoisyNetwork(mlp(1024, hidden=100, layers=8), kl_weight=6.0)
    guide = bmrs.TruncatedLogNormalGuide(model)
    gradients = bmrs.TrainingGradients(guide, epochs=3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = bmrs.fit(
            model, guide, (x, y), criterion=None, epochs=12, fine_tune_epochs=0, batch_size=128, lr=8.5e-4,
            posterior_lr=50 * 8.5e-4, seed=config.seed, progress=False,
        )  # fmt: skip
    predictions = _formulas(guide.flat_posterior(), _flat_prior(guide))
    predictions["free form, one pair"] = _timed(lambda: bmrs.free_form_evidence(model, guide, (x, y)))
    predictions["free form, a tenth of the data"] = _timed(
        lambda: bmrs.free_form_evidence(model, guide, (x[::10], y[::10]), num_data=len(x))
    )
    predictions["free form, from training"] = _timed(lambda: gradients.evidence(x[:512]))
    few = torch.arange(0, 800, 33)  # of each layer, three or four
    truth = brute_force(model, guide, x, y, 1, structures=few.tolist())
    for prediction in predictions.values():
        for name in ("values", "standard_errors"):
            if name in prediction:
                prediction[name] = [prediction[name][i] for i in few.tolist()]
    seconds = result.seconds / 12
    return [
        {
            "name": f"MNIST, MLP of 8 layers of 100, kl_weight 6; an epoch of training takes {seconds:.2g} s.",
            "truth": truth.tolist(),
            "predictions": predictions,
        }
    ]


def _together(model: Any, guide: Any, data: Any, delta_f: Tensor, again: dict[str, Any]) -> dict[str, float]:
    """Return what becomes of the ELBO, over kl_weight, if all goes at once that the evidence with log 3 supports.

    Its changes are of the whole data set: at once, and once the rest has been fitted on, beside a fit without removal.
    """
    removed = delta_f + math.log(3) >= 0
    scale = len(data[1]) / model.kl_weight
    before = bmrs.evaluate(model, guide, data, draws=200).elbo
    smaller, its_guide = copy.deepcopy((model, guide))
    for site, mask in guide.split(removed).items():
        smaller.noise[site].remove(mask)
    at_once = bmrs.evaluate(smaller, its_guide, data, draws=200).elbo
    whole, whole_guide = copy.deepcopy((model, guide))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of fits that go on from others
        for each in ((smaller, its_guide), (whole, whole_guide)):
            bmrs.fit(*each, data, **again)
    after, without = (
        bmrs.evaluate(*each, data, draws=200).elbo for each in ((smaller, its_guide), (whole, whole_guide))
    )
    return {
        "removed": int(removed.sum()),
        "sum": float(delta_f[removed].sum()),
        "at_once": scale * (at_once - before),
        "refitted": scale * (after - without),
    }


def _in_stages(model: Any, guide: Any, data: Any, stages: int) -> Tensor:
    """Return the evidence of each structure without those that were removed before it."""
    x, y = data
    structures = bmrs.find_structures(model.net, x[:2])
    context = bmrs.PruningContext(model.eval(), guide, structures, x[:256], y[:256])
    criterion = bmrs.FreeFormCriterion(data, pairs=5, stages=stages, prior_log_odds=math.log(3))
    return torch.cat(list(criterion.scores(context).values())) - math.log(3)


class _ByBruteForce:
    """Looks like free-form evidence."""

    def __init__(self, values: Tensor) -> None:
        self.delta_f = {"": values}
        self.standard_error = {"": torch.zeros_like(values)}


def _timed(compute: Callable[[], Any]) -> Prediction:
    started = time.perf_counter()
    found = compute()
    seconds = time.perf_counter() - started
    errors = torch.cat(list(found.standard_error.values())).tolist()
    return {**_prediction(torch.cat(list(found.delta_f.values()))), "standard_errors": errors, "seconds": seconds}


@torch.no_grad()
def brute_force(
    model: Any,
    guide: Any,
    x: Tensor,
    y: Tensor,
    draws: int,
    nodes: int = 9,
    structures: Sequence[int] | None = None,
) -> Tensor:
    """Return free-form evidence by one pass over the data for each structure, draw and value of its noise."""
    posterior = guide.flat_posterior()
    chosen = range(posterior.batch_shape[0]) if structures is None else structures
    at = (1 - torch.cos(torch.arange(nodes).double() * math.pi / (nodes - 1))) / 2
    total = torch.zeros(len(chosen), nodes, dtype=torch.float64)
    for _ in range(draws):
        theta = posterior.sample((len(x),))
        for i, structure in enumerate(chosen):
            for j in range(nodes):
                changed = theta.clone()
                changed[:, structure] = at[j]
                with supply_noise(model.noise, guide.split(changed)):
                    total[i, j] += model.likelihood(model.net(x)).log_prob(y).double().sum() / draws
    series = chebyshev.chebfit(2 * at.numpy() - 1, (total - total[:, :1]).T.numpy(), nodes - 1)
    u = torch.linspace(_LOW, _HIGH, 20_001, dtype=torch.float64)
    gain = torch.from_numpy(chebyshev.chebval(2 * u.exp().numpy() - 1, series))
    return -(torch.logsumexp(gain / model.kl_weight, -1) - math.log(len(u)))
