"""How a posterior moves while it is fitted: a callback that notes it after every epoch."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution

from pyro_bmrs.bmr import spike
from pyro_bmrs.checks import check_function
from pyro_bmrs.inspection.evidence import evidence_changes
from pyro_bmrs.model.guides.flat import FlatGuide, check_guide
from pyro_bmrs.svi.callbacks import Callback, Record

__all__ = ["Trajectories"]


class Trajectories(Callback):
    r"""Notes every parameter of a guide, and the evidence of every structure, after each epoch with noise.

    Pass it to ``fit(..., callbacks=[trajectories])`` and draw it with ``plot_trajectories``. A resumed fit is noted
    from where it goes on. It keeps one float32 number per structure, epoch and quantity.

    Args:
        guide: The guide that is fitted.
        reduced_prior: From a site's prior to the prior that would remove its structures; ``spike`` is BMRS_N's.

    Attributes:
        epochs: Numbers of the epochs that have been noted, from 1.
        guide: The guide.

    Raises:
        TypeError: If ``guide`` is no ``FlatGuide``, or ``reduced_prior`` no function.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), bmrs.MultiplicativeNoise(8), nn.Linear(8, 3))
        >>> model = bmrs.NoisyNetwork(net)
        >>> guide = bmrs.TruncatedLogNormalGuide(model)
        >>> seen = bmrs.Trajectories(guide)
        >>> few = {"epochs": 3, "fine_tune_epochs": 1, "criterion": None, "progress": False, "posterior_lr": 1.0}
        >>> data = torch.randn(64, 4), torch.arange(64) % 3
        >>> _ = bmrs.fit(model, guide, data, callbacks=[seen], kl_warmup_epochs=0, **few)
        >>> seen.of("loc")["2.theta"].shape
        torch.Size([3, 8])
    """

    def __init__(self, guide: FlatGuide, reduced_prior: Callable[[Any], Distribution] = spike) -> None:
        check_guide(guide)
        check_function("reduced_prior", reduced_prior, "of a prior, as spike is")
        self.guide, self._reduced_prior = guide, reduced_prior
        self.epochs: list[int] = []
        self._noted: dict[str, list[dict[str, Tensor]]] = {}

    @property
    def quantities(self) -> list[str]:
        """What has been noted: ``"delta_f"``, and the names of the guide's parameters."""
        return list(self._noted)

    def of(self, quantity: str) -> dict[str, Tensor]:
        """Return for each site the values of a quantity, of shape ``(epochs, size)``, in the original numbering.

        NaN where a structure had been cut out by shrinking.

        Raises:
            ValueError: If it has not been noted.
        """
        if quantity not in self._noted:
            raise ValueError(f"quantity must be one of {self.quantities}, but got {quantity!r}")
        noted = self._noted[quantity]
        return {site: torch.stack([each[site] for each in noted]) for site in noted[0]}

    @torch.no_grad()
    def on_epoch_end(self, record: Record) -> None:
        if record["phase"] != "noisy":
            return
        self.epochs.append(record["epoch"])
        self._noted.setdefault("delta_f", []).append(
            {site: each.float().cpu() for site, each in evidence_changes(self.guide, self._reduced_prior).items()}
        )
        for name, parameter in self.guide.named_parameters():
            by_site = self.guide.split(parameter.detach()).items()
            self._noted.setdefault(name, []).append(
                {site: self.guide.noise[site].in_original(each.float(), math.nan).cpu() for site, each in by_site}
            )
