"""What problem a fit is of, in fingerprints: only a fit of the same problem resumes from a checkpoint."""

import json
from collections.abc import Mapping
from typing import Any

from pyro_bmrs.criteria import Criterion
from pyro_bmrs.model.guides.flat import FlatGuide
from pyro_bmrs.model.network import NoisyNetwork
from pyro_bmrs.svi.data.source import Source
from pyro_bmrs.svi.fingerprint import fingerprint, network_fingerprint

__all__ = ["check_settings", "problem_fingerprints"]

_FINGERPRINTS = {"criterion", "train", "validation", "likelihood", "priors"}  # whose values say nothing to a reader


def problem_fingerprints(
    model: NoisyNetwork, guide: FlatGuide, criterion: Criterion | None, train: Source, validation: Source | None
) -> dict[str, Any]:
    """Return what a checkpoint keeps of the problem that it belongs to, by name."""
    priors = {f"{site}.{name}": each for site, layer in model.noise.items() for name, each in layer.named_buffers()}
    return {
        "criterion": fingerprint(criterion),
        "kl_weight": {site: model.kl_weight * weight for site, weight in model.kl_weights.items()},
        "num_data": model.num_data,
        "sizes": model.sizes,
        "train": train.fingerprint(),
        "validation": None if validation is None else validation.fingerprint(),
        "network": network_fingerprint(model.net),
        "likelihood": fingerprint(model.likelihood),
        "guide": f"{type(guide).__module__}.{type(guide).__qualname__}",
        "latents": None if guide.latents is None else type(guide.latents.module).__qualname__,
        "priors": {name: fingerprint(each) for name, each in priors.items() if ".prior_" in name},
    }


def check_settings(then: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raise ``ValueError`` naming the settings that are not those of a checkpoint.

    Args:
        then: Those of the checkpoint, as read from JSON.
        now: Those of the fit that is to go on from it.
    """
    changed = []
    for name, value in json.loads(json.dumps(now)).items():
        before = then.get(name)
        if name == "network" and isinstance(before, dict):
            changed += [f"the network's module {m!r} is another" for m in value if before.get(m) != value[m]][:3]
            changed += [f"the network has no module {m!r}" for m in before if m not in value][:3]
        elif name in _FINGERPRINTS and before != value:
            changed.append(f"{name} is another")
        elif before != value:
            changed.append(f"{name} was {before}, is {value}")
    if changed:
        raise ValueError(f"it is of a fit with other settings: {'; '.join(changed)}")
