"""How good a fitted model's predictions are: with every noise at its posterior mean, and averaged over draws of it."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import torch
from pyro.distributions import Bernoulli, Categorical
from torch import Tensor
from torch.distributions import Distribution, Independent, constraints

from pyro_bmrs.checks import check_integer, check_seed
from pyro_bmrs.inspection.draws import each_draw
from pyro_bmrs.model.network import NoisyNetwork
from pyro_bmrs.randomness import local_seed
from pyro_bmrs.structures.any_guide import noise_posterior
from pyro_bmrs.structures.pair import check_model
from pyro_bmrs.svi.data.making import source_of
from pyro_bmrs.svi.data.source import Source
from pyro_bmrs.svi.data.unpacking import Unpack

__all__ = ["PredictiveEvaluation", "PredictiveScores", "Reliability", "evaluate"]

_BINS = 15  # of equal width, as Guo et al. (2017) have them


@dataclass(frozen=True)
class Reliability:
    """How often predictions come true, by how sure they are: three tensors of shape ``(bins,)``, in float64.

    Attributes:
        confidence: Mean probability of the predicted label; NaN in empty bins.
        accuracy: Fraction of these labels that are right; NaN in empty bins.
        labels: Number of labels.
    """

    confidence: Tensor
    accuracy: Tensor
    labels: Tensor

    @property
    def ece(self) -> float:
        """Expected calibration error: the mean distance of accuracy and confidence (Guo et al., 2017)."""
        gaps = (self.accuracy - self.confidence).abs().nan_to_num()
        return float((gaps * self.labels).sum() / self.labels.sum())


@dataclass(frozen=True)
class PredictiveScores:
    """How good predictions are; what does not apply to the observations is None.

    Attributes:
        log_likelihood: Mean log probability of an example's observation, in nats.
        accuracy: Fraction of labels that are the most probable ones.
        brier: Mean over labels of the squared distance of probabilities and truth, summed over classes (Brier, 1950).
        ece: Expected calibration error, over 15 bins of equal width.
        rmse: Root mean squared error of the predicted mean, of numbers.
        reliability: What ``ece`` is computed from.
    """

    log_likelihood: float
    accuracy: float | None = None
    brier: float | None = None
    ece: float | None = None
    rmse: float | None = None
    reliability: Reliability | None = None


@dataclass(frozen=True)
class PredictiveEvaluation:
    """What ``evaluate`` returns; ``print`` gives a table.

    Attributes:
        at_mean: Of the network with every noise at its posterior mean, which ``predict`` and ``compact`` stand for.
        over_draws: Of the predictive distribution: probabilities averaged over draws of the noise.
        elbo: Evidence lower bound in nats per example, over the same draws: the mean log likelihood, less the weighted
            KL over ``num_data`` (of the model; if that is None, the number of these examples).
        kl: KL from prior to posterior, in nats.
        examples: Number of examples.
        draws: Number of draws.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), bmrs.MultiplicativeNoise(8), nn.Linear(8, 3))
        >>> model = bmrs.NoisyNetwork(net)
        >>> guide = bmrs.TruncatedLogNormalGuide(model)
        >>> found = bmrs.evaluate(model, guide, (torch.randn(32, 4), torch.arange(32) % 3), draws=5)
        >>> found.examples, found.draws, 0 <= found.over_draws.accuracy <= 1
        (32, 5, True)
    """

    at_mean: PredictiveScores
    over_draws: PredictiveScores
    elbo: float
    kl: float
    examples: int
    draws: int

    def __str__(self) -> str:
        rows = [f"{self.examples:,} examples{'at the mean':>22}{f'over {self.draws} draws':>18}"]
        for each in fields(PredictiveScores):
            mean, drawn = getattr(self.at_mean, each.name), getattr(self.over_draws, each.name)
            if isinstance(mean, float):
                name = each.name.replace("_", " ")
                rows.append(f"{name:<24}{mean:>14.4f}{drawn:>18.4f}")
        return "\n".join([*rows, f"ELBO {self.elbo:.4f} nats per example, KL {self.kl:.1f} nats"])


@torch.no_grad()
def evaluate(
    model: NoisyNetwork,
    guide: Any,
    data: Any,
    draws: int = 100,
    seed: int = 0,
    *,
    unpack: Unpack | None = None,
) -> PredictiveEvaluation:
    """Return how good a fitted model's predictions are on ``data``.

    Args:
        model: The model; it runs in eval mode, once per draw and batch.
        guide: Its guide, of any kind; one that is a program is run on the first batch, see ``noise_posterior``.
        data: Whatever ``fit`` takes.
        draws: Number of draws of the noise.
        seed: Of the draws; the global random state is left alone.
        unpack: From a batch of ``data`` to inputs and observations, as for ``fit``.

    Raises:
        TypeError: If an argument is of another type.
        ValueError: If the guide is another model's, ``draws`` is not positive, or the network does not take ``data``.

    References:
        On Calibration of Modern Neural Networks (Guo et al., 2017) https://arxiv.org/abs/1706.04599
        Verification of Forecasts Expressed in Terms of Probability (Brier, 1950)

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), bmrs.MultiplicativeNoise(8), nn.Linear(8, 3))
        >>> model = bmrs.NoisyNetwork(net)
        >>> found = bmrs.evaluate(model, bmrs.TruncatedLogNormalGuide(model), (torch.randn(9, 4), torch.arange(9) % 3))
        >>> 0 <= found.at_mean.accuracy <= 1
        True
    """
    check_model(model)
    check_integer("draws", draws, low=1, high=10**6)
    check_seed("seed", seed)
    source = source_of(data, model, unpack)
    guide = noise_posterior(model, guide, *source.first)
    with local_seed(seed, [guide.device], validate=False):
        drawn, _ = guide.draw_with_log_prob(draws)
    means = {site: point.unsqueeze(0) for site, point in guide.points().items()}
    at_mean, _ = _scores(model, means, source, guide.device)
    over_draws, expected = _scores(model, drawn, source, guide.device)
    kl = float(guide.kl())
    elbo = expected - model.kl_weight * kl / (model.num_data or source.size)
    return PredictiveEvaluation(at_mean, over_draws, elbo, kl, source.size, draws)


def _scores(
    model: NoisyNetwork, thetas: Mapping[str, Tensor], source: Source, device: torch.device
) -> tuple[PredictiveScores, float]:
    """Return the scores of predictions averaged over draws, and the mean log likelihood of single draws."""
    draws = len(next(iter(thetas.values())))
    averaged, single, judged = [], [], []
    for y, distributions in each_draw(model, thetas, source, device):
        log_probs, total = [], None
        for i, observed in enumerate(distributions):
            log_probs.append(observed.log_prob(y).double())
            prediction = _Prediction.of(observed, y)
            total = prediction if i == 0 else total and total.plus(prediction)
        stacked = torch.stack(log_probs)
        averaged.append(stacked.logsumexp(0) - math.log(draws))
        single.append(stacked.mean(0))
        judged.append(total and _judged(total.kind, total.values / draws, y))
    found = _averages([each for each in judged if each is not None])
    return PredictiveScores(float(torch.cat(averaged).mean()), **found), float(torch.cat(single).mean())


def _averages(judged: Sequence["_Judged"]) -> dict[str, Any]:
    """Return the scores of labels or numbers, by name."""
    if not judged:
        return {}
    error, confidence, right = (torch.cat(each) for each in zip(*judged, strict=True))
    if not confidence.numel():
        return {"rmse": float(error.mean().sqrt())}
    reliability = _reliability(confidence, right)
    scores = {"accuracy": float(right.mean()), "brier": float(error.mean()), "ece": reliability.ece}
    return {**scores, "reliability": reliability}


class _Prediction(NamedTuple):
    """What of a distribution can be averaged over draws: probabilities, or means."""

    kind: str
    values: Tensor

    @classmethod
    def of(cls, observed: Distribution, y: Tensor) -> "_Prediction | None":
        base = observed
        while isinstance(base, Independent):
            base = base.base_dist
        if isinstance(base, Categorical):
            return cls("class", base.probs.double())
        if isinstance(base, Bernoulli):
            return cls("label", base.probs.double())
        if base.support not in (constraints.real, constraints.real_vector):
            return None
        try:
            mean = observed.mean
        except NotImplementedError:
            return None
        return cls("number", mean.double()) if mean.shape == y.shape else None

    def plus(self, other: "_Prediction | None") -> "_Prediction | None":
        return other and _Prediction(self.kind, self.values + other.values)


class _Judged(NamedTuple):
    """For each label or number, flat: squared error, and of labels the confidence and whether it is right."""

    error: Tensor
    confidence: Tensor
    right: Tensor


def _judged(kind: str, prediction: Tensor, y: Tensor) -> _Judged:
    if kind == "number":
        return _Judged((prediction - y).square().flatten(), y.new_zeros(0).double(), y.new_zeros(0).double())
    if kind == "label":
        certain = torch.maximum(prediction, 1 - prediction)
        right = (prediction > 0.5) == (y > 0.5)
        error = 2 * (prediction - y.double()).square()  # over both classes
        return _Judged(error.flatten(), certain.flatten(), right.double().flatten())
    truth = torch.nn.functional.one_hot(y.long(), prediction.shape[-1])
    confidence, label = prediction.max(-1)
    error = (prediction - truth).square().sum(-1)
    return _Judged(error.flatten(), confidence.flatten(), (label == y).double().flatten())


def _reliability(confidence: Tensor, right: Tensor) -> Reliability:
    bins = (confidence * _BINS).long().clamp(0, _BINS - 1).cpu()
    labels = bins.bincount(minlength=_BINS).double()
    mean, accuracy = (bins.bincount(each.cpu(), minlength=_BINS) / labels for each in (confidence, right))
    return Reliability(mean, accuracy, labels)
