"""Epochs: of SVI with noise, and of the weights alone with every noise at its posterior mean."""

from collections.abc import Callable
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import Generator, Tensor, nn

from pyro_bmrs.checks import check_number
from pyro_bmrs.model.guides.flat import FlatGuide
from pyro_bmrs.model.network import NoisyNetwork
from pyro_bmrs.structures.inputs import Inputs, on_device
from pyro_bmrs.svi.checkpoint import State, optimizer_tensors, restore_optimizer
from pyro_bmrs.svi.data.source import Source
from pyro_bmrs.svi.devices import keep_freed_memory
from pyro_bmrs.svi.elbo import MeanFieldELBO
from pyro_bmrs.svi.faults import check_parameters, loss_error
from pyro_bmrs.svi.objective import FixedNoiseObjective, NoisyObjective
from pyro_bmrs.svi.schedule import Rates
from pyro_bmrs.svi.steps import NonFiniteLossError, Step, make_step

if TYPE_CHECKING:
    from lightning_fabric import Fabric

__all__ = ["Trainer"]

_CHECK_EVERY = 100  # steps between looks at the losses


class Trainer:
    """Optimiser, schedule, data order and step count of one fit.

    Args:
        fabric: Where it runs.
        model: The model, on the device.
        guide: Its guide, likewise.
        elbo: The objective of the epochs with noise.
        data: What to train on.
        rates: Learning rates and KL weight over the epochs.
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
        rates: Rates,
        order: Generator,
        compile: bool = False,  # noqa: A002  (torch's name for it)
    ) -> None:
        self.fabric, self.model, self.guide, self.elbo = fabric, model, guide, elbo
        self.rates, self.order, self.compile = rates, order, compile
        self.data, self.steps_per_epoch = data, data.steps
        self.multiplier = 1.0  # of the KL's weight
        self.step = 0
        self.optimizer = self._make_optimizer()
        keep_freed_memory(fabric.device)
        self._noisy_step: Step | None = None
        self._fixed_noise_step: Step | None = None

    def noisy_epoch(self, between: Callable[[], None] | None = None) -> float:
        """Run one epoch of SVI and return its mean loss, in nats per example; call ``between`` after each step."""
        if self._noisy_step is None:
            self._noisy_step = self._prepare(NoisyObjective(self.model, self.guide, self.elbo))
        return self._epoch(self._noisy_step, between)

    def fine_tune_epoch(self) -> float:
        """Run one epoch of the weights alone and return the mean negative log likelihood, in nats per example."""
        if self._fixed_noise_step is None:
            self._fixed_noise_step = self._prepare(FixedNoiseObjective(self.model, self.guide.points()))
        return self._epoch(self._fixed_noise_step)

    def network_changed(self) -> None:
        """Hear that parameters have been replaced by smaller ones."""
        self._noisy_step = self._fixed_noise_step = None

    def state(self) -> State:
        """Return all that a resumed fit needs to know: optimiser, step, data order and random state."""
        data = self.data.state()
        info = {"step": self.step, "multiplier": self.multiplier, "data": data.info}
        tensors = optimizer_tensors(self.optimizer)
        tensors |= {f"data.{name}": tensor for name, tensor in data.tensors.items()}
        tensors["order"] = self.order.get_state()
        tensors["random"] = self._of_all_processes(torch.get_rng_state())
        if self.fabric.device.type == "cuda":
            tensors["random_cuda"] = self._of_all_processes(torch.cuda.get_rng_state(self.fabric.device))
        return State(tensors, info)

    def restore(self, state: State) -> None:
        """Take up what ``state`` returned; parameters must have their shapes already."""
        self.step = state.info["step"]
        self.multiplier = check_number("its multiplier", state.info["multiplier"])
        restore_optimizer(self.optimizer, state.tensors)
        self.order.set_state(state.tensors["order"].cpu())
        of_data = {name[5:]: tensor for name, tensor in state.tensors.items() if name.startswith("data.")}
        self.data.restore(State(of_data, state.info["data"]))
        rank = self.fabric.global_rank
        torch.set_rng_state(state.tensors["random"][rank].cpu().clone())
        if "random_cuda" in state.tensors:
            torch.cuda.set_rng_state(state.tensors["random_cuda"][rank].cpu().clone(), self.fabric.device)

    def _of_all_processes(self, tensor: Tensor) -> Tensor:
        """Return the tensors of all processes, stacked."""
        gathered: Any = self.fabric.all_gather(tensor)
        return gathered.reshape(self.fabric.world_size, *tensor.shape)

    def _make_optimizer(self) -> torch.optim.Optimizer:
        others = [] if self.guide.latents is None else self.guide.latents.module.parameters()
        weights = [parameter for parameter in chain(self.model.parameters(), others) if parameter.requires_grad]
        captured = self.compile and self.fabric.device.type == "cuda"
        rates = [torch.tensor(rate, device=self.fabric.device) if captured else rate for rate in self._rates()]
        groups = [{"params": weights, "lr": rates[0]}, {"params": list(self.guide.parameters()), "lr": rates[1]}]
        return torch.optim.Adam(groups, fused=True, capturable=captured)

    def _rates(self) -> tuple[float, float]:
        return self.rates.learning_rates(self.step / self.steps_per_epoch)

    def _set_rates(self) -> None:
        for group, rate in zip(self.optimizer.param_groups, self._rates(), strict=True):
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate

    def _prepare(self, objective: nn.Module) -> Step:
        return make_step(objective, self.optimizer, self.fabric, self.compile)

    def _epoch(self, step: Step, between: Callable[[], None] | None = None) -> float:
        self.model.train()
        losses: list[Tensor] = []
        total = torch.zeros((), dtype=torch.float64, device=self.fabric.device)
        for (x, y), share in self.data.shuffled(self.order, self.fabric):
            self._set_rates()
            kl_share = self.rates.kl_share(self.step, self.steps_per_epoch)
            try:
                losses.append(step(*self._placed(x, y), self.multiplier * self.model.kl_weight * kl_share, share))
            except NonFiniteLossError as error:
                raise self._not_finite(self.step, error.loss) from None
            self.guide.project_()
            self.step += 1
            if between is not None:
                between()
                self.model.train()
            if len(losses) == _CHECK_EVERY or self.step % self.steps_per_epoch == 0:
                total += self._finite_sum(losses)
                losses = []
        check_parameters(self.model, self.guide, self.step - 1)
        return float(self._of_all_processes(total / self.steps_per_epoch).mean())

    def _placed(self, x: Inputs, y: Tensor) -> tuple[Inputs, Tensor]:
        """Return a batch on this process's device, as the network takes it."""
        device = self.fabric.device
        return on_device(x, device, self.model.net), y.to(device, non_blocking=True)

    def _finite_sum(self, losses: list[Tensor]) -> Tensor:
        """Return the sum of the last losses; on a GPU this is where they are first looked at, which stalls it."""
        values = torch.stack(losses).double()
        finite = torch.isfinite(values)
        if not bool(finite.all()):
            first = int((~finite).nonzero()[0])
            raise self._not_finite(self.step - len(losses) + first, float(values[first]))
        return values.sum()

    def _not_finite(self, step: int, loss: float) -> FloatingPointError:
        return loss_error(self.model, self.guide, self._placed(*self.data.first)[0], step, loss)
