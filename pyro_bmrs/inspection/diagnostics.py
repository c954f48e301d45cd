"""The posterior in numbers: draws for ArviZ, and the evidence of every structure."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution

from pyro_bmrs.bmr import evidence_change, spike
from pyro_bmrs.checks import check_function, check_integer, check_seed, described
from pyro_bmrs.model.guides.flat import FlatGuide

__all__ = ["evidence_changes", "to_arviz"]


@torch.no_grad()
def evidence_changes(guide: FlatGuide, reduced_prior: Callable[[Any], Distribution] = spike) -> dict[str, Tensor]:
    r"""Return :math:`\Delta F` of every structure, in nats, by site; >= 0 favours removal.

    Of shape ``(size,)``, in the numbering of the original network. A structure that has been cut out by shrinking has
    no posterior left to judge, and NaN here; ``FitResult.scores`` holds the last score of it.

    Args:
        guide: The fitted guide.
        reduced_prior: From a site's prior to the prior that would remove its structures; ``spike`` is BMRS_N's.
    """
    _check_guide(guide)
    check_function("reduced_prior", reduced_prior, "of a prior, as spike is")
    priors, layers = guide.prior(), guide.noise
    return {
        site: layers[site].in_original(evidence_change(posterior, priors[site], reduced_prior(priors[site])), math.nan)
        for site, posterior in guide.posterior().items()
    }


@torch.no_grad()
def to_arviz(guide: FlatGuide, draws: int = 1000, seed: int = 0) -> Any:
    r"""Return draws of the noise as ArviZ's InferenceData (0.x) or DataTree (1.x).

    Groups ``posterior`` and ``prior`` hold one variable a site, of shape ``(1, draws, size)``: a variational posterior
    has independent draws and no chains, so read it with ``arviz.summary(..., kind="stats")``. ``constant_data`` holds
    ``<site>.kept``, 1 for what remains; removed structures keep the posterior for which they were removed, unless they
    have been cut out by shrinking. Coordinates are the structures' numbers in the original network.
    ArviZ's ``to_netcdf`` needs the extra ``netcdf``.

    Args:
        guide: The fitted guide.
        draws: Number of draws.
        seed: Their seed; the global random state is left alone.

    Raises:
        TypeError: If ``guide`` is not a ``FlatGuide``, or another argument is not an integer.
        ValueError: If ``draws`` is not positive.
    """
    from pyro_bmrs._arviz import from_dict  # noqa: PLC0415  (ArviZ takes as long to import as torch)

    _check_guide(guide)
    check_integer("draws", draws, low=1, high=10**7)
    check_seed("seed", seed)
    with torch.random.fork_rng(devices=[guide.device] if guide.device.type == "cuda" else []):
        torch.manual_seed(seed)
        posterior = guide.draw((1, draws))
        prior = {site: distribution.sample((1, draws)) for site, distribution in guide.prior().items()}
    kept = guide.split(guide.keep)
    return from_dict(
        {
            "posterior": {site: values.cpu().numpy() for site, values in posterior.items()},
            "prior": {site: values.cpu().numpy() for site, values in prior.items()},
            "constant_data": {f"{site}.kept": mask.cpu().numpy().astype("int8") for site, mask in kept.items()},
        },
        coords={f"{site}_structure": layer.index.tolist() for site, layer in guide.noise.items()},
        dims={name: [f"{site}_structure"] for site in guide.sizes for name in (site, f"{site}.kept")},
    )


def _check_guide(guide: Any) -> None:
    if not isinstance(guide, FlatGuide):
        raise TypeError(f"guide must be a guide such as TruncatedLogNormalGuide(model), but got {described(guide)}")
