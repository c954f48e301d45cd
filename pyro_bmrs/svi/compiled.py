"""A training step traced once, handlers and all, and compiled: from a batch to the loss and every gradient."""

import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, _inductor, nn
from torch.func import functional_call
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from pyro_bmrs.randomness import local_seed
from pyro_bmrs.warn import warn

__all__ = ["CompiledStep"]

Backend = Literal["inductor", "eager"]

# What ATen computes several times faster on a CPU than the compiler's own code does.
_LEFT_TO_ATEN = {
    torch.ops.aten.erfinv.default,
    torch.ops.aten.erfinv_.default,
    torch.ops.aten.special_erfcx.default,
}

_OPTIONS: dict[str, Any] = {
    "layout_optimization": False,  # copying to channels-last and back costs more than small convolutions gain
    "fallback_random": True,  # the same stream of random numbers as without compilation
    "realize_opcount_threshold": 4,  # store what more than so many operations make, and do not make it again
}


class CompiledStep:
    """Compute a batch's loss and leave its gradients in every parameter's ``grad``, as forward and backward would.

    The objective is traced through Pyro's handlers into one flat graph, once for each layout of the batch, of the
    parameters and of the buffers, and for each train mode of the modules: a last batch of another size gets a graph of
    its own, and nothing else traces again. Parameters and buffers are inputs, so a mask or a batch norm's statistics
    may change between two calls; random numbers are drawn afresh from torch's generator at each. What a forward
    changes in place, a compiled step changes in place. Python numbers that the forward reads are constants of the
    graph, and hooks on parameters do not run.

    An objective that cannot be traced or compiled is computed as usual, after a warning that says why. The gradient of
    a parameter that the loss does not depend on is None, as it is without compilation.

    Args:
        objective: From ``(x, y, kl_weight, batch_weight)`` to a loss of shape ``()``, for instance a
            ``NoisyObjective``. All its tensors that change are parameters and buffers.
        backend: ``"inductor"`` compiles the graph, which takes from ten seconds to a few minutes for each; ``"eager"``
            runs it as it is, which takes a second or two and is what to test with.

    Attributes:
        traces: How often the objective has been traced.

    Raises:
        ValueError: If ``backend`` is neither.

    Example:
        >>> from pyro_bmrs.svi.objective import NoisyObjective
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), bmrs.MultiplicativeNoise(8), nn.Linear(8, 3))
        >>> model = bmrs.NoisyNetwork(net, num_data=100)
        >>> guide = bmrs.TruncatedLogNormalGuide(model)
        >>> step = CompiledStep(NoisyObjective(model, guide, bmrs.MeanFieldELBO()), backend="eager")
        >>> step(torch.randn(5, 4), torch.tensor([0, 1, 2, 0, 1]), kl_weight=1.0).shape
        torch.Size([])
        >>> guide.loc.grad.shape
        torch.Size([8])
    """

    def __init__(self, objective: nn.Module, backend: Backend = "inductor") -> None:
        if backend not in ("inductor", "eager"):
            raise ValueError(f'backend must be "inductor" or "eager", but got {backend!r}')
        self.objective, self.backend = objective, backend
        self.traces = 0
        self._graphs: dict[Any, Callable[..., Sequence[Any]]] = {}
        self._given_up = False

    def __call__(self, x: Tensor, y: Tensor, kl_weight: float, batch_weight: float = 1.0) -> Tensor:
        """Return the loss of a batch, of shape ``()`` and detached, and accumulate gradients.

        Args:
            x: Inputs, of shape ``(batch, ...)``.
            y: Observations, of shape ``(batch, ...)``.
            kl_weight: Weight of the KL in this step.
            batch_weight: Size of this batch over the mean size of those whose losses will be averaged with it.
        """
        state = _State.of(self.objective)
        numbers = state.number(kl_weight), state.number(batch_weight)
        if self._given_up:
            return self._eager(x, y, *numbers)
        inputs = (*state.parameters.values(), *state.buffers.values(), x, y, *numbers)
        key = (state.training, tuple(_layout(each) for each in inputs))
        if key not in self._graphs:
            self._fill_caches(state, inputs)
            try:
                self._graphs[key] = self._prepare(state, inputs)
            except Exception as error:  # tracers and compilers raise whatever they like
                self._given_up = True
                reason = f"{type(error).__name__}: {str(error).strip()[:500]}"
                warn(f"the step cannot be compiled and runs as usual, more slowly ({reason})", RuntimeWarning)
                return self._eager(x, y, *numbers)
        with torch.no_grad():
            loss, *gradients = self._graphs[key](*inputs)
            for parameter, gradient in zip(state.trained, gradients, strict=True):
                _accumulate(parameter, gradient)
        return loss

    def _eager(self, x: Tensor, y: Tensor, kl_weight: Tensor, batch_weight: Tensor) -> Tensor:
        loss = self.objective(x, y, kl_weight, batch_weight)
        loss.backward()
        return loss.detach()

    def _prepare(self, state: "_State", inputs: tuple[Tensor, ...]) -> Callable[..., Sequence[Any]]:
        """Trace, and compile, for inputs of these layouts; neither draws from the caller's random stream."""
        with _own_random_state(inputs, validate=False), warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # torch's own, of torch
            graph = _trace(self.objective, state, inputs)
            self.traces += 1
            return graph if self.backend == "eager" else _compile(graph, inputs)

    def _fill_caches(self, state: "_State", inputs: tuple[Tensor, ...]) -> None:
        """Run the objective once, so that nothing is cached while tracing, and a mistake in it shows as what it is."""
        before = [buffer.clone() for buffer in state.buffers.values()]
        with _own_random_state(inputs), torch.no_grad():
            self.objective(*inputs[-4:])
            for buffer, value in zip(state.buffers.values(), before, strict=True):
                buffer.copy_(value)


class _State(NamedTuple):
    """What of a module a step reads and changes."""

    parameters: dict[str, Tensor]
    buffers: dict[str, Tensor]
    training: tuple[bool, ...]

    @classmethod
    def of(cls, module: nn.Module) -> "_State":
        training = tuple(each.training for each in module.modules())
        return cls(dict(module.named_parameters()), dict(module.named_buffers()), training)

    @property
    def trained(self) -> list[Tensor]:
        return [parameter for parameter in self.parameters.values() if parameter.requires_grad]

    def number(self, value: float) -> Tensor:
        """Return a number as a tensor of the parameters' dtype and device."""
        like = next(iter(self.parameters.values()))
        return torch.as_tensor(value, dtype=like.dtype, device=like.device)


def _own_random_state(inputs: Sequence[Tensor], validate: bool = True) -> AbstractContextManager[None]:
    return local_seed(devices={each.device for each in inputs}, validate=validate)


def _layout(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device, tensor.requires_grad


def _accumulate(parameter: Tensor, gradient: Tensor | None) -> None:
    if gradient is None:
        return
    if parameter.grad is None:
        # A fused optimiser walks through memory, where another layout would be other elements.
        same = gradient.stride() == parameter.stride()
        parameter.grad = gradient if same else torch.empty_like(parameter).copy_(gradient)
    else:
        parameter.grad.add_(gradient)


def _trace(objective: nn.Module, state: _State, inputs: tuple[Tensor, ...]) -> GraphModule:
    """Return the graph from the flat inputs to the loss and the gradients of the trained parameters."""
    names, count = [*state.parameters, *state.buffers], len(state.parameters)
    trained = [parameter.requires_grad for parameter in state.parameters.values()]

    def loss_and_gradients(*flat: Tensor) -> list[Tensor | None]:
        parameters = [each.detach().requires_grad_(needs) for each, needs in zip(flat[:count], trained, strict=True)]
        values = dict(zip(names, (*parameters, *flat[count : len(names)]), strict=True))
        with torch.enable_grad():
            loss = functional_call(objective, values, flat[len(names) :])
        wanted = [each for each, needs in zip(parameters, trained, strict=True) if needs]
        return [loss.detach(), *_own(torch.autograd.grad(loss, wanted, allow_unused=True))]

    with torch.no_grad():
        graph = make_fx(loss_and_gradients)(*(each.detach().clone() for each in inputs))
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return graph


def _own(gradients: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Copy gradients that share their memory, with each other or with themselves: they may be changed in place."""
    seen: set[int] = set()
    owned: list[Tensor | None] = []
    for gradient in gradients:
        if gradient is not None:
            memory = gradient.untyped_storage().data_ptr()
            if memory in seen or not gradient.is_contiguous():
                gradient = gradient.clone(memory_format=torch.contiguous_format)  # noqa: PLW2901
            seen.add(memory)
        owned.append(gradient)
    return owned


def _compile(graph: GraphModule, inputs: tuple[Tensor, ...]) -> Callable[..., Sequence[Any]]:
    for node in graph.graph.nodes:
        if node.target in _LEFT_TO_ATEN and not inputs[0].is_cuda:
            node.meta["custom"] = {"fallback_to_eager": True}
    with torch.no_grad():
        examples: list[Any] = [each.detach().clone() for each in inputs]
        compiled = _inductor.compile(graph, examples, options=_OPTIONS)
        compiled(*examples)  # what fails at the first call only fails here
    return compiled
