"""Training many replicas of one model at once: one stacked tensor for each of their tensors, one step for all."""

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Generator, Tensor, nn
from torch.func import functional_call, vmap

from pyro_bmrs.eval_mode import evaluating
from pyro_bmrs.model.guides.flat import FlatGuide
from pyro_bmrs.model.network import NoisyNetwork
from pyro_bmrs.structures.inputs import to_input
from pyro_bmrs.svi.devices import place
from pyro_bmrs.svi.elbo import MeanFieldELBO
from pyro_bmrs.svi.nonfinite import check_parameters, loss_error
from pyro_bmrs.svi.objective import FixedNoiseObjective, NoisyObjective
from pyro_bmrs.svi.steps import Step, eager_step
from pyro_bmrs.svi.training import Trainee

if TYPE_CHECKING:
    from lightning_fabric import Fabric

__all__ = ["Stack", "TrainedReplicas"]

Losses = Callable[[Tensor, Tensor, float, float], Tensor]
"""From inputs and observations ``(K, batch, ...)``, KL weight and batch weight, which is 1, to losses ``(K,)``."""


class Stack:
    """The tensors of K modules alike as one ``(K, ...)`` each, of which the modules' own become views.

    So what is done to the stacked tensors is done to the modules, and the other way round (in place). Parameters that
    are trained are leaves here, in ``parameters``; everything else is in ``constants``.

    Args:
        modules: The modules.

    Raises:
        ValueError: If they differ in their tensors' names, shapes or dtypes.
    """

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        _check_alike(modules)
        self._modules = modules
        self.parameters: dict[str, Tensor] = {}
        self.constants: dict[str, Tensor] = {}
        for name, like in modules[0].named_parameters():
            own = [module.get_parameter(name) for module in modules]
            stacked = torch.stack([parameter.detach() for parameter in own])
            for parameter, view in zip(own, stacked, strict=True):
                parameter.data = view
            (self.parameters if like.requires_grad else self.constants)[name] = stacked
        for name, _ in modules[0].named_buffers():
            stacked = torch.stack([module.get_buffer(name) for module in modules])
            self._set_buffers(name, stacked)
            self.constants[name] = stacked
        for stacked in self.parameters.values():
            stacked.requires_grad_()

    @torch.no_grad()
    def release(self) -> None:
        """Give each module tensors of its own."""
        for module in self._modules:
            for parameter in module.parameters():
                parameter.data = parameter.data.clone()
        for name, _ in self._modules[0].named_buffers():
            self._set_buffers(name, [module.get_buffer(name).clone() for module in self._modules])

    def _set_buffers(self, name: str, values: Sequence[Tensor] | Tensor) -> None:
        owner, _, buffer = name.rpartition(".")
        for module, value in zip(self._modules, values, strict=True):
            setattr(module.get_submodule(owner), buffer, value)


class TrainedReplicas(Trainee):
    """K models alike, trained by one step at a time.

    Adam works element by element, so one on the stacked parameters is K of them.

    Args:
        fabric: Where it runs, of one process.
        models: The models, on the device.
        guides: Their guides.
        seeds: Of the order of each one's data.
        elbo: The objective of the epochs with noise.
        data: Inputs and observations.
        batch_size: At most this many examples per step and replica.

    Raises:
        ValueError: If the replicas are not alike.
    """

    def __init__(
        self,
        fabric: "Fabric",
        models: Sequence[NoisyNetwork],
        guides: Sequence[FlatGuide],
        seeds: Sequence[int],
        elbo: MeanFieldELBO,
        data: tuple[Tensor, Tensor],
        batch_size: int,
    ) -> None:
        self.fabric, self.models, self.guides, self.seeds = fabric, models, guides, seeds
        self.device = fabric.device
        self.orders = [Generator().manual_seed(seed) for seed in seeds]
        self.data = (place(data[0], self.device), place(data[1], self.device))
        self.batch_size = batch_size
        self.steps_per_epoch = math.ceil(len(data[0]) / batch_size)
        self.kl_weight = models[0].kl_weight
        objectives = [NoisyObjective(model, guide, elbo) for model, guide in zip(models, guides, strict=True)]
        self.stack = Stack(objectives)
        self._template = copy.deepcopy(objectives[0])
        with evaluating(self._template), torch.no_grad():  # noise layers keep what they find, which vmap would spoil
            ones = {site: torch.ones(size, device=self.device) for site, size in models[0].sizes.items()}
            self._template.model.run(self._inputs(torch.arange(1)), ones)

    def parameters(self) -> tuple[list[Tensor], list[Tensor]]:
        weights: list[Tensor] = []
        posterior: list[Tensor] = []
        for name, parameter in self.stack.parameters.items():
            (posterior if name.startswith("guide.") else weights).append(parameter)
        return weights, posterior

    def batches(self) -> Iterator[tuple[Tensor, Tensor, float]]:
        orders = torch.stack([torch.randperm(len(self.data[0]), generator=order) for order in self.orders])
        for rows in orders.to(self.data[0].device).tensor_split(self.steps_per_epoch, dim=1):
            yield self._inputs(rows), self._fetch(self.data[1], rows), 1.0

    def noisy_step(self, optimizer: torch.optim.Optimizer) -> Step:
        def losses_of(*batch: Any) -> Tensor:  # of this epoch's masks
            return self._noisy(*batch)

        return eager_step(losses_of, optimizer)

    def fine_tune_step(self, optimizer: torch.optim.Optimizer) -> Step:
        means = [guide.mean() for guide in self.guides]
        apart = [FixedNoiseObjective(model, mean) for model, mean in zip(self.models, means, strict=True)]
        objective = FixedNoiseObjective(self._template.model, means[0])
        thetas = {name: torch.stack([each.get_buffer(name) for each in apart]) for name in objective._buffers}
        return eager_step(_together(objective, self.stack, thetas), optimizer)

    def prepare(self) -> None:
        self._template.model.train()
        self._noisy = _together(self._template, self.stack, {})  # anew, since masks may have changed

    def after_step(self) -> None:
        for guide in self.guides:
            guide.project_()

    def check_parameters(self, step: int) -> None:
        for seed, model, guide in zip(self.seeds, self.models, self.guides, strict=True):
            try:
                check_parameters(model, guide, step)
            except FloatingPointError as error:
                raise _of_seed(seed, error) from None

    def nonfinite_loss(self, losses: Tensor, step: int) -> FloatingPointError:
        i = int((~torch.isfinite(losses)).nonzero()[0])
        x = self._inputs(torch.arange(self.batch_size))
        return _of_seed(self.seeds[i], loss_error(self.models[i], self.guides[i], x, step, float(losses[i])))

    def _fetch(self, tensor: Tensor, index: Tensor) -> Tensor:
        return tensor[index.to(tensor.device)].to(self.device, non_blocking=True)

    def _inputs(self, index: Tensor) -> Tensor:
        return to_input(self._fetch(self.data[0], index), self.models[0].net)


def _together(objective: nn.Module, stack: Stack, own: Mapping[str, Tensor]) -> Losses:
    """Return ``objective`` as a function of K batches, with the stacked tensors, and its ``own``, for its own.

    Masks that remove nothing from any replica are left to the objective, whose noise layers then need not multiply.
    """
    tensors = {**stack.parameters, **stack.constants, **own}
    names = {id(tensor): name for name, tensor in _named_tensors(objective)}
    used = {
        name: tensors[names[id(tensor)]]
        for name, tensor in _named_tensors(objective, all_names=True)
        if not (name.endswith(".keep") and bool(tensors[names[id(tensor)]].all()))
    }

    def one(used: dict[str, Tensor], x: Tensor, y: Tensor, kl_weight: float) -> Tensor:
        return functional_call(objective, used, (x, y, kl_weight), tie_weights=False)  # every name is there

    mapped = vmap(one, in_dims=(0, 0, 0, None), randomness="different")
    return lambda x, y, kl_weight, batch_weight: mapped(used, x, y, kl_weight)


def _named_tensors(module: nn.Module, all_names: bool = False) -> list[tuple[str, Tensor]]:
    """Return parameters and buffers, those with several names by the first one, or by all."""
    tensors = (module.named_parameters, module.named_buffers)
    return [named for each in tensors for named in each(remove_duplicate=not all_names)]


def _check_alike(modules: Sequence[nn.Module]) -> None:
    described = [
        {name: (tuple(t.shape), t.dtype) for name, t in (*module.named_parameters(), *module.named_buffers())}
        for module in modules
    ]
    for i, found in enumerate(described):
        for name in {**described[0], **found}:
            if described[0].get(name) != found.get(name):
                raise ValueError(
                    f"replicas must have tensors of the same names, shapes and dtypes, but {name!r} is "
                    f"{described[0].get(name)} in the first and {found.get(name)} in number {i + 1}"
                )


def _of_seed(seed: int, error: FloatingPointError) -> FloatingPointError:
    return FloatingPointError(f"the replica of seed {seed} failed: {error}")
