"""The module that multiplies structures by their noise, whose values are supplied from outside."""

import math
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, cast

import pyro
import torch
from pyro import poutine
from pyro.distributions import TorchDistribution
from pyro.distributions.torch_distribution import TorchDistributionMixin
from torch import Tensor, nn
from torch.distributions import Distribution

from pyro_bmrs.checks import check_integer, check_number, described
from pyro_bmrs.distributions import LogUniform
from pyro_bmrs.numerics import can_branch_on
from pyro_bmrs.structures.points import NoiseError, NoisePoint, noise_points
from pyro_bmrs.structures.removal import aligned

__all__ = ["MultiplicativeNoise", "PendingPass", "noise_layers"]


class MultiplicativeNoise(NoisePoint):
    r"""Multiply each structure of the input by its own noise, :math:`h_i \mapsto \theta_i h_i`.

    A structure is one index along ``dim``: a neuron, a filter, a channel. A ``NoisyNetwork`` makes one sample site
    ``"<name of this module>.theta"`` of event shape ``(size,)``, and has the forward pass use its value. A network that
    is called otherwise has no noise: the module only applies its mask.

    Args:
        size: Number of structures, the input's extent along ``dim``.
        prior: Prior on :math:`\theta`, of ``batch_shape`` ``()`` or ``(size,)``; by default the paper's
            ``LogUniform(-20, 0)``.
        dim: Dimension of the input that indexes structures.

    Attributes:
        keep: Buffer of shape ``(size,)``, bool; False where a structure has been removed.
        kl_weight: Weight of this site's KL relative to the model's; the ``kl_weights`` of the ``NoisyNetwork`` made
            last around this layer hold it.

    Raises:
        TypeError: If ``size`` or ``dim`` is no integer, or ``prior`` no distribution.
        ValueError: If ``size`` is not positive or does not fit the prior, or (when called) the input; or if the prior
            is not determined by tensors that its class takes as arguments.

    References:
        Structured Bayesian Pruning via Log-Normal Multiplicative Noise (Neklyudov et al., 2017)
        https://arxiv.org/abs/1705.07283

    Example:
        >>> net = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), bmrs.MultiplicativeNoise(8), nn.Linear(8, 2))
        >>> model = bmrs.NoisyNetwork(net, num_data=100)
        >>> model.sizes
        {'2.theta': 8}
    """

    def __init__(self, size: int, prior: TorchDistribution | None = None, dim: int = 1) -> None:
        size = check_integer("size", size, low=1, high=10**8, what="the number of structures")
        super().__init__(size, check_integer("dim", dim, low=-1000))
        if self.dim == 0:
            raise ValueError("dim must not be 0, which indexes examples; neurons and filters are along dimension 1")
        prior = LogUniform() if prior is None else prior
        if not isinstance(prior, TorchDistributionMixin):
            hint = f"pyro.distributions.{type(prior).__name__}" if isinstance(prior, Distribution) else "LogUniform()"
            raise TypeError(f"prior must be a distribution of Pyro's, for instance {hint}, but got {described(prior)}")
        if prior.event_shape or prior.batch_shape not in (torch.Size(), torch.Size([size])):
            raise ValueError(
                f"the prior on {size} structures must have batch_shape () or ({size},) and no event dimensions, but "
                f"got batch_shape {tuple(prior.batch_shape)} and event_shape {tuple(prior.event_shape)}"
            )
        self.site: str | None = None
        self._weights: dict[str | None, float] = {None: 1.0}
        # The prior's parameters are buffers, so that it moves between devices with the network.
        self._prior_type = type(prior)
        self._prior_names = tuple(prior.arg_constraints)
        for name in self._prior_names:
            self.register_buffer(f"prior_{name}", torch.as_tensor(getattr(prior, name)).detach().clone())
        _check_rebuilt(prior, self._rebuilt_prior)
        self._declared: _Declaration | None = None
        self._watchers: list[Callable[[str, tuple[int, ...]], None]] = []
        self._waiting: list[weakref.ref[PendingPass]] = []
        self._held: dict[str, Tensor] = {}  # a dictionary, since setting a module's attributes is slow

    @property
    def prior(self) -> TorchDistribution:
        """The prior on theta, of ``batch_shape`` ``(size,)``, on this module's device."""
        return self._rebuilt_prior().expand([self.size])

    @property
    def kl_weight(self) -> float:
        """Weight of this site's KL relative to the model's."""
        return self._weights.get(self.site, 1.0)

    @kl_weight.setter
    def kl_weight(self, value: float) -> None:
        self._weights[self.site] = check_number("kl_weight", value)

    def belong(self, site: str, kl_weights: dict[str, float]) -> None:
        """Become the site called ``site`` of a model that keeps the weights of its sites' KL in ``kl_weights``."""
        self.site, self._weights = site, cast(dict[str | None, float], kl_weights)

    def _rebuilt_prior(self) -> TorchDistribution:
        parameters = {name: getattr(self, f"prior_{name}") for name in self._prior_names}
        return self._prior_type(**parameters, validate_args=False)

    def remove(self, removed: Tensor) -> None:
        """Remove the structures where ``removed`` is True, on top of those removed before.

        Args:
            removed: A bool tensor of shape ``(size,)``.

        Raises:
            ValueError: If it is something else.
        """
        if not (isinstance(removed, Tensor) and removed.dtype == torch.bool and removed.shape == self.keep.shape):
            found = f"{removed.dtype} of shape {tuple(removed.shape)}" if isinstance(removed, Tensor) else repr(removed)
            raise ValueError(f"removed must be a bool tensor of shape ({self.size},), but got {found}")
        self.keep.logical_and_(~removed.to(self.keep.device))

    def after_loading(self) -> None:
        self.forget()

    def select(self, kept: Tensor) -> None:
        """Become a layer of the structures at the positions ``kept``, in place, whether removed or not."""
        self.size = len(kept)
        for name, buffer in self.named_buffers(recurse=False):
            if buffer.dim() > 0:
                setattr(self, name, buffer[kept.to(buffer.device)])

    def site_distribution(self, distribution: TorchDistribution) -> TorchDistribution:
        """Return ``distribution`` over the structures as a site declares it: removed ones count for nothing."""
        if self._masks():
            distribution = distribution.mask(self.keep)
        return distribution.to_event(1)

    def forward(self, x: Tensor) -> Tensor:
        if not (-x.dim() <= self.dim < x.dim() and x.shape[self.dim] == self.size):
            raise NoiseError(
                f"{self.site or 'this noise layer'} is for {self.size} structures along dimension {self.dim}, but its "
                f"input has shape {tuple(x.shape)}: give it the size of that dimension"
            )
        factors = self.factors()
        return x if factors is None else self.multiply(x, factors, self.dim)

    def multiply(self, x: Tensor, factors: Tensor, dim: int, batch: int | None = None) -> Tensor:
        """Return ``x`` with its channels along ``dim`` multiplied by factors of shape ``(*leading, channels)``.

        Noise with a draw for each example is of shape ``(examples, channels)``. Where a network folds other dimensions
        into the batch (windows, time steps), each draw serves all parts of its example.

        Args:
            x: What is multiplied.
            factors: What it is multiplied with.
            dim: The dimension of ``x`` that indexes channels.
            batch: The dimension of ``x`` that indexes examples, or None for the first one that could.

        Raises:
            ValueError: If there is a draw for each example, and no dimension of ``x`` holds the examples.
        """
        dim %= x.dim()
        if dim == 1 and not batch and factors.dim() == 2 and len(factors) == len(x) and not self._watchers:
            factors = factors.to(x.dtype)  # the usual case, of a draw for each example, without looking further
            return x * (factors if x.dim() == 2 else factors.reshape(*factors.shape, *(1,) * (x.dim() - 2)))
        own = [*x.shape[:dim], *x.shape[dim + 1 :]]
        for watcher in self._watchers:
            watcher(self.site or "", tuple(own))
        leading = list(factors.shape[:-1])
        if len(leading) > 1 and leading != own:  # a draw for each element of another layer's input
            factors = _as_many(factors.reshape(-1, factors.shape[-1]), own)
        elif len(leading) == 1 and own and leading[0] != 1:
            factors = self._for_examples(factors, own, None if batch is None else batch - (batch > dim))
        return x * aligned(factors.to(x.dtype), x, dim)

    def _for_examples(self, factors: Tensor, own: list[int], batch: int | None) -> Tensor:
        """Put draws where the examples are, ``own`` being the sizes of all dimensions but that of channels."""
        examples = len(factors)
        if batch is None:
            batch = own.index(examples) if examples in own else 0
        if own[batch] % examples == 0:
            repeats = own[batch] // examples
            spread = factors.repeat_interleave(repeats, 0) if repeats > 1 else factors
            return spread.reshape(*(1,) * batch, len(spread), *(1,) * (len(own) - 1 - batch), spread.shape[-1])
        raise ValueError(
            f"noise of site {self.site!r} has a draw for each of {examples} examples, but what it multiplies has no "
            f"dimension of that size (besides channels its shape is {tuple(own)}); draw once for each batch: "
            'granularity="batch"'
        )

    def sample(self, site: str, kl_weight: float = 1.0) -> Tensor:
        """Return a draw at a sample site for this layer's noise, of shape ``(size,)``.

        Args:
            site: Its name.
            kl_weight: Scale of its log probability.
        """
        if kl_weight == 1:
            return pyro.sample(site, self._declaration()[0])
        with poutine.scale(scale=kl_weight):
            return pyro.sample(site, self._declaration()[0])

    @contextmanager
    def watched(self, record: Callable[[str, tuple[int, ...]], None]) -> Iterator[None]:
        """Call ``record`` with the site and the shape of whatever is multiplied inside, structures left out."""
        self._watchers.append(record)
        try:
            yield
        finally:
            self._watchers.remove(record)

    def hold(self, theta: Tensor, masked: bool, waiting: "PendingPass | None") -> None:
        """Take the noise of the forward pass that begins.

        Args:
            theta: Of shape ``(*leading, size)``.
            masked: Whether structures that have been removed are to be at 0 whatever it is.
            waiting: The pass, where it has a gradient.
        """
        masks = masked and self._declaration()[1]
        self._held["now"] = theta * self.keep if masks else theta
        if waiting is not None:
            self._waiting[:] = [each for each in self._waiting if each() is not None]
            self._waiting.append(weakref.ref(waiting))

    def release(self) -> None:
        """End the forward pass: keep its noise for its gradient only."""
        if "now" in self._held:
            theta = self._held.pop("now")
            if torch.is_grad_enabled():
                self._held["last"] = theta

    def forget(self) -> None:
        """Drop the last pass's noise, and the graph behind it, whose parameters are about to change their sizes."""
        self._held.clear()

    def held(self) -> Tensor | None:
        """Return what the forward pass that is running multiplies structures with, removed ones at 0, if that is known.

        While gradients are computed, where activation checkpointing runs a pass again, it is the noise of the last one.

        Raises:
            RuntimeError: If several passes wait for their gradients, so that it is not known which one runs again.
        """
        if "now" in self._held:
            return self._held["now"]
        if not _in_backward():
            return None
        waiting = [each for reference in self._waiting if (each := reference()) is not None and not each.done]
        if len(waiting) > 1:
            raise RuntimeError(
                f"activation checkpointing runs a forward pass with the noise of {self.site!r} again, but "
                f"{len(waiting)} passes wait for their gradients: call backward after each of them (num_particles=1)"
            )
        return self._held.get("last")

    def factors(self) -> Tensor | None:
        """Return what is held, or where nothing is the mask alone, of shape ``(size,)``; None where nothing changes."""
        held = self.held()
        if held is None and self._declaration()[1]:
            return self.keep.float()
        return held

    def _declaration(self) -> tuple[TorchDistribution, bool]:
        """Return the site's distribution, and whether its noise has to be masked; anew only after a buffer changes."""
        known, buffers = self._declared, [each for each in self._buffers.values() if each is not None]
        if known is not None and known.is_of(buffers):
            return known.distribution, known.masks
        distribution, masks = self.site_distribution(self.prior), self._masks()
        if can_branch_on(self.keep, on_device=True):
            self._declared = _Declaration(buffers, [each._version for each in buffers], distribution, masks)
        return distribution, masks

    def _masks(self) -> bool:
        """Return whether anything has been removed; always where it might be, and Python cannot see."""
        if not can_branch_on(self.keep, on_device=True):
            return True
        try:
            return not bool(self.keep.all())
        except RuntimeError:  # under vmap
            return True

    def __getstate__(self) -> dict[str, Any]:
        return {
            **self.__dict__,
            "_declared": None,
            "_held": {},
            "_waiting": [],
            "_watchers": [],
        }  # a copy counts the versions of its tensors anew

    def extra_repr(self) -> str:
        return f"{self.size}, prior={self._prior_type.__name__}, dim={self.dim}"


class PendingPass:
    """A forward pass whose gradient is to come; called when it has been computed, after which none of it runs again."""

    def __init__(self) -> None:
        self.done = False

    def __call__(self, gradient: Tensor) -> None:
        self.done = True


class _Declaration(NamedTuple):
    """What a site declares, as long as no buffer is replaced or changed in place."""

    buffers: list[Tensor]
    versions: list[int]
    distribution: TorchDistribution
    masks: bool

    def is_of(self, buffers: list[Tensor]) -> bool:
        """Return whether these are the buffers that it was made of, unchanged."""
        return all(
            now is then and now._version == version
            for now, then, version in zip(buffers, self.buffers, self.versions, strict=True)
        )


def _check_rebuilt(prior: TorchDistribution, rebuild: Callable[[], TorchDistribution]) -> None:
    """Raise ``ValueError`` unless a prior is what its class makes of its parameters."""
    kind = type(prior).__name__
    try:
        again = rebuild()
        same = bool(prior.arg_constraints) and again.batch_shape == prior.batch_shape and again.event_shape == ()
    except Exception:  # classes refuse their arguments as they like
        same = False
    if not same:
        raise ValueError(
            f"prior is a {kind}, which cannot be rebuilt from its parameters {list(prior.arg_constraints)}: use a "
            "LogUniform, TruncatedLogNormal, Beta, Gamma, or another distribution whose class takes just these"
        )


def _in_backward() -> bool:
    """Return whether autograd is computing gradients right now."""
    return torch._C._current_graph_task_id() != -1


def noise_layers(net: nn.Module) -> dict[str, MultiplicativeNoise]:
    """Return the noise layers of ``net`` by site name, in the order in which they were registered."""
    return {site: point for site, point in noise_points(net).items() if isinstance(point, MultiplicativeNoise)}


def _as_many(factors: Tensor, shape: list[int]) -> Tensor:
    """Return as many of the draws, of shape ``(draws, channels)``, as there are elements in ``shape``."""
    count = math.prod(shape)
    repeats = -(-count // len(factors))
    return factors.repeat(repeats, 1)[:count].reshape(*shape, factors.shape[-1])
