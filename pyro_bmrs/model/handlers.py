"""Handlers of Pyro's that a model and its guide need."""

from collections.abc import Mapping
from typing import Any

import pyro
from pyro.poutine.indep_messenger import IndepMessenger
from pyro.poutine.messenger import Messenger
from torch import Tensor

__all__ = ["check_not_vectorized", "fix_sites"]


class fix_sites(Messenger):  # noqa: N801  (a handler, named like Pyro's)
    """Give the sample sites named in ``values`` those values instead of draws.

    Unlike ``pyro.condition`` it does not declare them observed, and unlike ``pyro.poutine.replay`` it needs no trace.

    Example:
        >>> with fix_sites({"theta": torch.zeros(())}):
        ...     pyro.sample("theta", pyro.distributions.Normal(0.0, 1.0)).item()
        0.0
    """

    def __init__(self, values: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.values = values

    def _pyro_sample(self, msg: Any) -> None:
        value = self.values.get(msg["name"])
        if value is not None and not msg["is_observed"]:
            msg["value"] = value
            msg["done"] = True


def check_not_vectorized() -> None:
    """Raise ``ValueError`` inside a vectorised plate: a network takes one draw of its noise at a time."""
    for handler in pyro.poutine.runtime._PYRO_STACK:
        if isinstance(handler, IndepMessenger) and handler.dim is not None and handler.size > 1:
            raise ValueError(
                f"the plate {handler.name!r} asks for {handler.size} draws of the noise at once, but a network takes "
                "one at a time: use Predictive(..., parallel=False) and ELBOs with vectorize_particles=False"
            )
