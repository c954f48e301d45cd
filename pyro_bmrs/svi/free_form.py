"""Free-form evidence of every structure, from a pass over the data."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Categorical

from pyro_bmrs.bmr.free_form import FreeFormFactor, GradientSums, free_form_factor
from pyro_bmrs.checks import check_integer, check_seed
from pyro_bmrs.eval_mode import evaluating
from pyro_bmrs.model.guides.flat import FlatGuide
from pyro_bmrs.model.network import NoisyNetwork
from pyro_bmrs.randomness import local_seed
from pyro_bmrs.structures.inputs import Inputs, batch_size, on_device
from pyro_bmrs.structures.pair import check_pair
from pyro_bmrs.svi.data.making import source_of
from pyro_bmrs.svi.data.source import Source
from pyro_bmrs.svi.data.unpacking import Unpack

__all__ = ["FreeFormEvidence", "curvature", "evidence_of", "factors_of", "free_form_evidence", "gradient_sums"]


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
    with local_seed(seed, [guide.device], validate=False):
        sums = gradient_sums(model, guide, source, pairs)
    return evidence_of(guide, sums, num_data or model.num_data or source.size)


def evidence_of(guide: FlatGuide, sums: GradientSums, num_data: int) -> FreeFormEvidence:
    """Return the evidence that sums of gradients imply."""
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
