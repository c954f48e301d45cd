"""One model as what is trained: its objectives, its data, and its random state in every process."""

from collections.abc import Iterator
from itertools import chain
from typing import TYPE_CHECKING

import torch
from torch import Generator, Tensor

from pyro_bmrs.model.guides.flat import FlatGuide
from pyro_bmrs.model.network import NoisyNetwork
from pyro_bmrs.structures.inputs import Inputs, on_device
from pyro_bmrs.svi.checkpoint import State
from pyro_bmrs.svi.data.source import Source
from pyro_bmrs.svi.elbo import MeanFieldELBO
from pyro_bmrs.svi.nonfinite import check_parameters, loss_error
from pyro_bmrs.svi.objective import FixedNoiseObjective, NoisyObjective
from pyro_bmrs.svi.steps import Step, make_step
from pyro_bmrs.svi.training import Trainee, of_all_processes

if TYPE_CHECKING:
    from lightning_fabric import Fabric

__all__ = ["TrainedModel"]


class TrainedModel(Trainee):
    """One model and its guide.

    Args:
        fabric: Where it runs.
        model: The model, on the device.
        guide: Its guide, on the device.
        elbo: The objective of the epochs with noise.
        data: What to train on.
        order: Generator of the order of the data, in the same state in all processes.
        compile: Whether to compile steps, or on CUDA to capture them.
    """

    def __init__(
        self,
        fabric: "Fabric",
        model: NoisyNetwork,
        guide: FlatGuide,
        elbo: MeanFieldELBO,
        data: Source,
        order: Generator,
        compile: bool = False,  # noqa: A002  (torch's name for it)
    ) -> None:
        self.fabric, self.model, self.guide, self.elbo = fabric, model, guide, elbo
        self.data, self.order, self.compile = data, order, compile
        self.steps_per_epoch = data.steps

    @property
    def kl_weight(self) -> float:  # type: ignore[override]
        """The model's weight of the KL."""
        return self.model.kl_weight

    def parameters(self) -> tuple[list[Tensor], list[Tensor]]:
        others = [] if self.guide.latents is None else self.guide.latents.module.parameters()
        weights: list[Tensor] = [each for each in chain(self.model.parameters(), others) if each.requires_grad]
        return weights, list(self.guide.parameters())

    def batches(self) -> Iterator[tuple[Inputs, Tensor, float]]:
        for (x, y), batch_weight in self.data.shuffled(self.order, self.fabric):
            yield *self._placed(x, y), batch_weight

    def noisy_step(self, optimizer: torch.optim.Optimizer) -> Step:
        return make_step(NoisyObjective(self.model, self.guide, self.elbo), optimizer, self.fabric, self.compile)

    def fine_tune_step(self, optimizer: torch.optim.Optimizer) -> Step:
        return make_step(FixedNoiseObjective(self.model, self.guide.points()), optimizer, self.fabric, self.compile)

    def prepare(self) -> None:
        self.model.train()

    def after_step(self) -> None:
        self.guide.project_()

    def check_parameters(self, step: int) -> None:
        check_parameters(self.model, self.guide, step)

    def nonfinite_loss(self, losses: Tensor, step: int) -> FloatingPointError:
        return loss_error(self.model, self.guide, self._placed(*self.data.first)[0], step, float(losses))

    def state(self) -> State:
        data = self.data.state()
        tensors = {f"data.{name}": tensor for name, tensor in data.tensors.items()}
        tensors["order"] = self.order.get_state()
        tensors["random"] = of_all_processes(self.fabric, torch.get_rng_state())
        if self.fabric.device.type == "cuda":
            tensors["random_cuda"] = of_all_processes(self.fabric, torch.cuda.get_rng_state(self.fabric.device))
        return State(tensors, {"data": data.info})

    def restore(self, state: State) -> None:
        self.order.set_state(state.tensors["order"].cpu())
        of_data = {name[5:]: tensor for name, tensor in state.tensors.items() if name.startswith("data.")}
        self.data.restore(State(of_data, state.info["data"]))
        rank = self.fabric.global_rank
        torch.set_rng_state(state.tensors["random"][rank].cpu().clone())
        if "random_cuda" in state.tensors:
            torch.cuda.set_rng_state(state.tensors["random_cuda"][rank].cpu().clone(), self.fabric.device)

    def _placed(self, x: Inputs, y: Tensor) -> tuple[Inputs, Tensor]:
        """Return a batch on this process's device, as the network takes it."""
        device = self.fabric.device
        return on_device(x, device, self.model.net), y.to(device, non_blocking=True)
