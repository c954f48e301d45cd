"""Noise on a structure is a Pyro sample site: the module that makes it, and the handler that gives it values."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.distributions import TorchDistribution
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn

from pyro_bmrs.distributions import LogUniform
from pyro_bmrs.numerics import may_ask

__all__ = ["MultiplicativeNoise", "fix_noise", "noise_layers", "supply_noise"]


class MultiplicativeNoise(nn.Module):
    r"""Multiply each structure of the input by its own noise, :math:`h_i \mapsto \theta_i h_i`.

    A structure is one index along ``dim``: a neuron, a filter, a channel. Inside a ``NoisyNetwork`` the forward pass
    makes one sample site ``"<name of this module>.theta"`` of event shape ``(size,)``; anywhere else the module
    only applies its mask, so that the same network can be trained without noise.

    Args:
        size: Number of structures, the input's extent along ``dim``.
        prior: Prior on :math:`\theta`, of ``batch_shape`` ``()`` or ``(size,)``; by default the paper's
            ``LogUniform(-20, 0)``.
        dim: Dimension of the input that indexes structures.

    Attributes:
        keep: Buffer of shape ``(size,)``, bool; False where a structure has been removed.
        kl_weight: Weight of this site's KL relative to the model's, which ``NoisyNetwork`` sets.

    Raises:
        ValueError: If ``size`` is not positive or does not fit the prior, or (when called) the input.

    References:
        Structured Bayesian Pruning via Log-Normal Multiplicative Noise (Neklyudov et al., 2017)
        https://arxiv.org/abs/1705.07283

    Example:
        >>> net = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), bmrs.MultiplicativeNoise(8), nn.Linear(8, 2))
        >>> model = bmrs.NoisyNetwork(net, num_data=100)
        >>> model.sizes
        {'2.theta': 8}
    """

    keep: Tensor

    def __init__(self, size: int, prior: TorchDistribution | None = None, dim: int = 1) -> None:
        super().__init__()
        if not (isinstance(size, int) and size > 0):
            raise ValueError(f"size must be a positive integer, the number of structures, but got {size!r}")
        prior = LogUniform() if prior is None else prior
        if prior.event_shape or prior.batch_shape not in (torch.Size(), torch.Size([size])):
            raise ValueError(
                f"the prior on {size} structures must have batch_shape () or ({size},) and no event dimensions, but "
                f"got batch_shape {tuple(prior.batch_shape)} and event_shape {tuple(prior.event_shape)}"
            )
        self.size, self.dim = size, dim
        self.site: str | None = None
        self.kl_weight: float = 1.0
        self.register_buffer("keep", torch.ones(size, dtype=torch.bool))
        # The prior's parameters are buffers, so that it moves between devices with the network.
        self._prior_type = type(prior)
        self._prior_names = tuple(prior.arg_constraints)
        for name in self._prior_names:
            self.register_buffer(f"prior_{name}", getattr(prior, name).detach().clone())
        self._declared: tuple[Tensor, int, TorchDistribution, bool] | None = None
        self._supplied: dict[str, Tensor] = {}  # a dictionary, since setting a module's attributes is slow

    @property
    def prior(self) -> TorchDistribution:
        """The prior on theta, of ``batch_shape`` ``(size,)``, on this module's device."""
        parameters = {name: getattr(self, f"prior_{name}") for name in self._prior_names}
        return self._prior_type(**parameters, validate_args=False).expand([self.size])

    def remove(self, removed: Tensor) -> None:
        """Remove the structures where ``removed`` is True, on top of those removed before."""
        self.keep.logical_and_(~removed.to(self.keep.device))

    def select(self, kept: Tensor) -> None:
        """Become a layer of the structures at the positions ``kept``, in place, whether removed or not."""
        self.size = len(kept)
        for name, buffer in self.named_buffers(recurse=False):
            if buffer.dim() > 0:
                setattr(self, name, buffer[kept.to(buffer.device)])
        self._declared = None

    def site_distribution(self, distribution: TorchDistribution) -> TorchDistribution:
        """Return ``distribution`` over the structures as a site declares it: removed ones count for nothing."""
        if self._masks():
            distribution = distribution.mask(self.keep)
        return distribution.to_event(1)

    def forward(self, x: Tensor) -> Tensor:
        if not (-x.dim() <= self.dim < x.dim() and x.shape[self.dim] == self.size):
            raise ValueError(
                f"{self.site or 'this noise layer'} is for {self.size} structures along dimension {self.dim}, but its "
                f"input has shape {tuple(x.shape)}"
            )
        distribution, masks = self._declaration()
        if self.site is None:
            return x * self._aligned(self.keep.to(x), x) if masks else x
        theta = self._supplied.get(self.site)
        if theta is None:
            theta = self._sample(self.site, distribution)
        if masks:
            theta = theta * self.keep
        return x * self._aligned(theta.to(x.dtype), x)

    def _sample(self, site: str, distribution: TorchDistribution) -> Tensor:
        if self.kl_weight == 1:
            return pyro.sample(site, distribution)
        with poutine.scale(scale=self.kl_weight):
            return pyro.sample(site, distribution)

    def _declaration(self) -> tuple[TorchDistribution, bool]:
        """Return the site's distribution, and whether its noise has to be masked; anew only after ``keep`` changes."""
        version = self.keep._version
        if self._declared is not None and self._declared[0] is self.keep and self._declared[1] == version:
            return self._declared[2:]
        declaration = self.site_distribution(self.prior), self._masks()
        if may_ask(self.keep, on_device=True):
            self._declared = self.keep, version, *declaration
        return declaration

    def _masks(self) -> bool:
        """Return whether anything has been removed; always where it might be, and Python cannot see."""
        if not may_ask(self.keep, on_device=True):
            return True
        try:
            return not bool(self.keep.all())
        except RuntimeError:  # under vmap
            return True

    def _aligned(self, theta: Tensor, x: Tensor) -> Tensor:
        """Broadcast noise of shape ``(*leading, size)`` to ``x``, its leading dimensions to the first ones of ``x``."""
        if theta.shape == x.shape and self.dim in (-1, x.dim() - 1):
            return theta
        leading, size = theta.shape[:-1], theta.shape[-1]
        spread = theta.reshape(*leading, *(1,) * (x.dim() - 1 - len(leading)), size)
        return spread.movedim(-1, self.dim)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_declared": None, "_supplied": {}}  # a copy counts the versions of its tensors anew

    def _apply(self, *args: Any, **kwargs: Any) -> "MultiplicativeNoise":
        self._declared = None  # its tensors are about to move
        return super()._apply(*args, **kwargs)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._declared = None
        super()._load_from_state_dict(*args, **kwargs)

    def extra_repr(self) -> str:
        return f"{self.size}, prior={self._prior_type.__name__}, dim={self.dim}"


def noise_layers(net: nn.Module) -> dict[str, MultiplicativeNoise]:
    """Return the noise layers of ``net`` by site name, in the order in which they were registered."""
    return {
        f"{name}.theta" if name else "theta": module
        for name, module in net.named_modules()
        if isinstance(module, MultiplicativeNoise)
    }


class fix_noise(Messenger):  # noqa: N801  (a handler, named like Pyro's)
    """Give the sample sites named in ``values`` those values instead of draws.

    Unlike ``pyro.condition`` it does not declare them observed, and unlike ``pyro.poutine.replay`` it needs no trace.

    Example:
        >>> model = bmrs.NoisyNetwork(nn.Sequential(nn.Linear(2, 3), bmrs.MultiplicativeNoise(3)), num_data=10)
        >>> with fix_noise({"1.theta": torch.zeros(3)}):
        ...     model.net(torch.ones(1, 2)).norm().item()
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


@contextmanager
def supply_noise(layers: Mapping[str, MultiplicativeNoise], values: Mapping[str, Tensor]) -> Iterator[None]:
    """Have ``layers``, by site, use ``values`` and make no sample sites: what ``fix_noise`` does, unseen by Pyro.

    For an objective that knows all values beforehand, every step, and asks nothing of the sites.
    """
    for site, layer in layers.items():
        layer._supplied[site] = values[site]
    try:
        yield
    finally:
        for layer in layers.values():
            layer._supplied.clear()
