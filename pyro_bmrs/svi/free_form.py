"""Free-form evidence of every structure from a pass over the data, as a number to look at and as a criterion."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Categorical

from pyro_bmrs.bmr.free_form import FreeFormFactor, GradientSums, free_form_factor
from pyro_bmrs.checks import check_integer, check_seed
from pyro_bmrs.criteria.base import PruningContext, Scores
from pyro_bmrs.criteria.evidence import EvidenceCriterion
from pyro_bmrs.model.guides.flat import FlatGuide, check_guide
from pyro_bmrs.model.network import NoisyNetwork
from pyro_bmrs.modes import evaluating
from pyro_bmrs.structures.inputs import Inputs, batch_size, on_device
from pyro_bmrs.structures.pair import check_pair
from pyro_bmrs.svi.data.making import source_of
from pyro_bmrs.svi.data.source import Source
from pyro_bmrs.svi.data.unpacking import Unpack
from pyro_bmrs.svi.isolation import local_seed

__all__ = ["FreeFormCriterion", "FreeFormEvidence", "TrainingGradients", "free_form_evidence"]


@dataclass(frozen=True)
class FreeFormEvidence:
    r"""Free-form evidence of every structure.

    Attributes:
        delta_f: :math:`\Delta F` of removing each structure alone, in nats: for each site of shape
            ``(original_size,)``, in the numbering of the original network; >= 0 favours removal. NaN where a structure
            has been removed.
        standard_error: Its standard error, in the same form. On MLPs errors near zero were 0.7 to 1.2 times it.
        factors: The factors of the structures that are physically there, by site.
    """

    delta_f: Mapping[str, Tensor]
    standard_error: Mapping[str, Tensor]
    factors: Mapping[str, FreeFormFactor]


def free_form_evidence(
    model: NoisyNetwork,
    guide: FlatGuide,
    data: Any,
    pairs: int = 1,
    seed: int = 0,
    *,
    num_data: int | None = None,
    unpack: Unpack | None = None,
) -> FreeFormEvidence:
    r"""Return the evidence of removing each structure, without a family for its posterior.

    ``BMRS_N`` is an exact formula of an approximate posterior, a truncated log-normal, whose tail towards zero is
    nothing like that of the posterior. Here the posterior of a structure's noise is the best one given all others',
    :math:`q^*(\theta) \propto p(\theta) \exp(E[\log p(D | \theta)] / \lambda)`: near the decision line its evidence is
    right within a few hundredths to tenths of a nat. It takes two passes forward and four backward over the data for
    each pair of draws: on MNIST the time of two epochs.

    Args:
        model: The fitted model, best before fine-tuning; it runs in eval mode.
        guide: Its guide.
        data: The training data: whatever ``fit`` takes. Distinct examples matter more than draws.
        pairs: Number of antithetic pairs of draws of the noise for each example.
        seed: Of the draws; the global random state is left alone.
        num_data: Number of examples that the likelihood counts, if ``data`` are only some of them; by default the
            model's ``num_data``, or else their number.
        unpack: From a batch of ``data`` to inputs and observations, as for ``fit``.

    Raises:
        TypeError, ValueError: If an argument is of another type or value, or the guide is another model's.
        NotImplementedError: If a prior is neither log-uniform nor truncated log-normal, or the guide has other latent
            sites.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), bmrs.MultiplicativeNoise(8), nn.Linear(8, 3))
        >>> model = bmrs.NoisyNetwork(net)
        >>> guide = bmrs.TruncatedLogNormalGuide(model)
        >>> found = bmrs.free_form_evidence(model, guide, (torch.randn(50, 4), torch.arange(50) % 3))
        >>> found.delta_f["2.theta"].shape
        torch.Size([8])
    """
    check_pair(model, guide)
    check_integer("pairs", pairs, low=1, high=10**6)
    check_seed("seed", seed)
    if num_data is not None:
        check_integer("num_data", num_data, low=1)
    source = source_of(data, model, unpack)
    with local_seed(seed, [guide.device]):
        sums = gradient_sums(model, guide, source, pairs)
    return _evidence(guide, sums, num_data or model.num_data or source.size)


def _evidence(guide: FlatGuide, sums: GradientSums, num_data: int) -> FreeFormEvidence:
    factors = factors_of(guide, sums, num_data)
    by_site: dict[str, dict[str, Tensor]] = {"delta_f": {}, "standard_error": {}}
    for site, factor in factors.items():
        layer = guide.noise[site]
        for name, found in by_site.items():
            found[site] = layer.in_original(getattr(factor, name).masked_fill(~layer.keep, math.nan), math.nan)
    return FreeFormEvidence(by_site["delta_f"], by_site["standard_error"], factors)


def factors_of(guide: FlatGuide, sums: GradientSums, num_data: int) -> dict[str, FreeFormFactor]:
    """Return the factors of each site."""
    model, priors = guide.model, guide.prior()
    curvatures, values = guide.split(sums.curvature), guide.split(sums.values)
    return {
        site: free_form_factor(
            GradientSums(values[site], curvatures[site], sums.curvature_count),
            prior,
            num_data,
            model.kl_weight * model.kl_weights[site],
        )
        for site, prior in priors.items()
    }


def gradient_sums(model: NoisyNetwork, guide: FlatGuide, source: Source, pairs: int) -> GradientSums:
    """Return the sums of gradients at antithetic draws for every example, and the Gauss-Newton curvature."""
    if guide.latents is not None:
        raise NotImplementedError("free-form evidence is of noise alone, but the guide has other latent sites")
    total: GradientSums | None = None
    with evaluating(model):
        for _ in range(pairs):
            for x, y in source.ordered():
                inputs, observed = on_device(x, guide.device, model.net), y.to(guide.device)
                for theta in _antithetic(guide, batch_size(inputs)):
                    sums = _of_batch(model, guide, theta, inputs, observed)
                    total = sums if total is None else total + sums
    assert total is not None
    return total


@torch.no_grad()
def _antithetic(guide: FlatGuide, examples: int) -> list[Tensor]:
    """Return two draws for each example, of shape ``(examples, structures)``, opposite to each other where that can be.

    A family without quantiles is drawn from twice.
    """
    posterior: Any = guide.flat_posterior()
    if not hasattr(posterior, "rsample_at"):
        return [posterior.sample((examples,)) for _ in range(2)]
    uniform = torch.rand(examples, *posterior.batch_shape, device=guide.device).to(posterior.mean.dtype)
    return [posterior.rsample_at(each).detach() for each in (uniform, (1 - uniform).clamp_max(1 - 2**-24))]


def curvature(model: NoisyNetwork, guide: FlatGuide, x: Inputs) -> GradientSums:
    """Return the Gauss-Newton curvature of some inputs, at a draw for each, and no other sums."""
    inputs = on_device(x, guide.device, model.net)
    with evaluating(model), torch.enable_grad():
        theta = _antithetic(guide, batch_size(inputs))[0].clone().requires_grad_()
        observed = model.observed(model.run(inputs, guide.split(theta)), batch_size(inputs))
        (score,) = torch.autograd.grad(_sampled_score(observed), theta)
    nothing = torch.zeros(6, theta.shape[1], dtype=torch.float64, device=theta.device)
    return GradientSums(nothing, nothing[0]).with_curvature(score)


def _of_batch(model: NoisyNetwork, guide: FlatGuide, theta: Tensor, inputs: Any, y: Tensor) -> GradientSums:
    with torch.enable_grad():
        theta = theta.clone().requires_grad_()
        observed = model.observed(model.run(inputs, guide.split(theta)), batch_size(inputs))
        (gradient,) = torch.autograd.grad(observed.log_prob(y).sum(), theta, retain_graph=True)
        (score,) = torch.autograd.grad(_sampled_score(observed), theta)
    return GradientSums.of(theta, gradient).with_curvature(score)


def _sampled_score(observed: Any) -> Tensor:
    """Return a scalar whose gradient in an example's outputs has the Fisher information as its second moment.

    Of class labels a random vector of signs does so with less variance than a label drawn from the prediction.
    """
    if type(observed).__name__ == "Categorical" and isinstance(observed, Categorical) and observed.logits.dim() == 2:
        logits = observed.logits
        p = torch.softmax(logits.detach(), -1)
        signs = p.sqrt() * (2 * torch.randint(0, 2, p.shape, device=p.device) - 1)
        return (logits * (signs - p * signs.sum(-1, keepdim=True))).sum()
    return observed.log_prob(observed.sample()).sum()


class TrainingGradients:
    r"""Takes the sums of gradients from training's own backward passes, which cost next to nothing more.

    It listens to the guide from its creation on: make it before ``fit``, and give it to ``FreeFormCriterion`` or ask it
    for ``evidence()``. Noise must have a draw for each example, or draws that examples share (``granularity`` of
    ``"example"`` or ``"shared"``). Steps must be neither compiled nor in less than float32, and of one process. A
    resumed fit listens anew.

    Args:
        guide: The guide.
        epochs: Number of last passes over the data that count: fewer are noisier, more are of older weights.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), bmrs.MultiplicativeNoise(8), nn.Linear(8, 3))
        >>> model = bmrs.NoisyNetwork(net)
        >>> guide = bmrs.TruncatedLogNormalGuide(model)
        >>> gradients = bmrs.TrainingGradients(guide)
        >>> data = torch.randn(50, 4), torch.arange(50) % 3
        >>> few = {"epochs": 3, "fine_tune_epochs": 0, "progress": False}
        >>> _ = bmrs.fit(model, guide, data, criterion=bmrs.FreeFormCriterion(gradients), **few)
        >>> gradients.evidence(data[0]).standard_error["2.theta"].shape
        torch.Size([8])
    """

    def __init__(self, guide: FlatGuide, epochs: int = 10) -> None:
        check_guide(guide)
        self.guide, self._epochs = guide, check_integer("epochs", epochs, low=1, high=10**6)
        self._passes: list[GradientSums] = []
        self._current: GradientSums | None = None
        self._steps = 0
        guide.listeners.append(self._listen)

    @property
    def sums(self) -> GradientSums | None:
        """The sums so far, of the structures that there are; None where no step with noise has been taken."""
        now = [] if self._current is None else [_of_mean_loss(self._current, self._steps)]
        structures = sum(self.guide.sizes.values())
        known = [each for each in (*self._passes, *now) if each.values.shape[1] == structures]
        return _added(known) if known else None

    def evidence(self, x: Inputs) -> FreeFormEvidence:
        """Return the free-form evidence that the sums so far imply.

        Args:
            x: Inputs of a hundred training examples or more, for the Gauss-Newton curvature: gradients alone leave that
                of a narrow posterior open.

        Raises:
            ValueError: If there are none: no step with noise has been taken.
        """
        sums = self.sums
        if sums is None:
            raise ValueError("no gradients have been taken yet: train with noise first, not compiled")
        with local_seed(0, [self.guide.device]):
            sums = sums + curvature(self.guide.model, self.guide, x)
        return _evidence(self.guide, sums, self.examples)

    @property
    def examples(self) -> int:
        """Number of examples that the likelihood counts: the model's, or those of a pass."""
        if self.guide.model.num_data is not None:
            return self.guide.model.num_data
        last = self._passes[-1] if self._passes else self._current
        return 0 if last is None else int(last.values[0, 0])

    def __deepcopy__(self, memo: Any) -> "TrainingGradients":
        return self  # of the guide that it listens to, whoever copies a criterion to try it

    def _listen(self, draws: Mapping[str, Tensor]) -> None:
        parts: dict[str, tuple[Tensor, Tensor]] = {}
        for site, theta in draws.items():
            if not theta.requires_grad:
                return
            if theta.dim() != 2:
                raise ValueError(
                    "training's gradients tell of each structure only where examples have noise of their own: use "
                    'granularity="example" or "shared"'
                )
            theta.register_hook(partial(self._hear, parts, list(draws), site, theta.detach()))

    def _hear(
        self, parts: dict[str, tuple[Tensor, Tensor]], sites: list[str], site: str, theta: Tensor, gradient: Tensor
    ) -> None:
        parts[site] = theta, gradient
        if len(parts) == len(sites):
            self._add(*(torch.cat([parts[name][i] for name in sites], -1) for i in range(2)))

    def _add(self, theta: Tensor, gradient: Tensor) -> None:
        """Add the sums of one step, whose loss falls as the log likelihood grows."""
        sums = GradientSums.of(theta, -gradient)
        fresh = self._current is None or self._current.values.shape != sums.values.shape  # or the network has shrunk
        self._current = sums if fresh or self._current is None else self._current + sums
        self._steps = 1 if fresh else self._steps + 1
        if float(self._current.values[0, 0]) >= (self.guide.model.num_data or math.inf):
            self._passes = [*self._passes, _of_mean_loss(self._current, self._steps)][-self._epochs :]
            self._current, self._steps = None, 0


def _of_mean_loss(sums: GradientSums, steps: int) -> GradientSums:
    """Return the sums for gradients of single examples, from those of losses that are means over batches.

    Each batch counts by its size over the mean size, so that the latter is the factor for all of them.
    """
    size = sums.values[0] / steps
    powers = torch.stack([torch.ones_like(size)] * 3 + [size, size, size * size])
    return GradientSums(sums.values * powers, sums.curvature, sums.curvature_count)


def _added(sums: list[GradientSums]) -> GradientSums:
    first, *others = sums
    for each in others:
        first = first + each
    return first


@dataclass(frozen=True)
class FreeFormCriterion(EvidenceCriterion):
    r"""Remove where the free-form evidence, with the prior odds, favours absence.

    Marginal evidence is not joint evidence: what may go alone may not go together. Prune in stages, as ``Continuous``
    does, and the posterior of what remains adapts between them.

    Args:
        data: The training data, whatever ``fit`` takes, of which each pruning takes a pass; or ``TrainingGradients`` of
            the guide, which take none.
        pairs: As for ``free_form_evidence``.
        prior_log_odds: As for ``BMRS_N``.
    """

    data: Any = field(repr=False)
    pairs: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.data is None:
            raise TypeError("FreeFormCriterion needs the training data, or TrainingGradients(guide)")
        check_integer("pairs of FreeFormCriterion", self.pairs, low=1, high=10**6)

    def scores(self, context: PruningContext) -> Scores:
        guide: Any = context.guide
        check_pair(context.model, guide)
        self._check_sites(list(guide.sizes))
        sums, num_data = self._sums(context, guide)
        if sums is None:  # before the first step: nothing is known, and nothing goes
            return {site: torch.full((size,), -math.inf, device=guide.device) for site, size in guide.sizes.items()}
        factors = factors_of(guide, sums, num_data)
        return {
            site: factor.delta_f + torch.as_tensor(self.log_odds(site, context)).to(factor.delta_f)
            for site, factor in factors.items()
        }

    def __deepcopy__(self, memo: Any) -> "FreeFormCriterion":
        return self  # it has no state, and its data may be large

    def _sums(self, context: PruningContext, guide: FlatGuide) -> tuple[GradientSums | None, int]:
        """Return the sums of gradients, and the number of examples that the likelihood counts."""
        model = context.model
        if isinstance(self.data, TrainingGradients):
            if self.data.guide is not guide:
                raise ValueError("the TrainingGradients of FreeFormCriterion are of another guide than is fitted")
            if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
                raise ValueError("TrainingGradients are of one process alone: give FreeFormCriterion the data")
            with local_seed(0, [guide.device]):
                sums = self.data.sums
                return sums and sums + curvature(model, guide, context.x), self.data.examples
        source = source_of(self.data, model, None)
        with local_seed(0, [guide.device]):
            return gradient_sums(model, guide, source, self.pairs), model.num_data or source.size
