"""Epochs: of SVI with noise, and of the weights alone with every noise at its posterior mean."""

import math
from collections.abc import Callable
from contextlib import ExitStack

import torch
from torch import Tensor

from pyro_bmrs.elbo import MeanFieldELBO
from pyro_bmrs.guide import FlatGuide
from pyro_bmrs.model import NoisyNetwork
from pyro_bmrs.noise import fix_noise

__all__ = ["Trainer"]


class Trainer:
    """Optimiser, schedule and step count of one fit.

    Args:
        model: The model, on the device of the data.
        guide: Its guide.
        elbo: The objective of the epochs with noise.
        data: Inputs and observations.
        batch_size: At most this many examples a step; batches of an epoch differ in size by at most one.
    """

    def __init__(
        self,
        model: NoisyNetwork,
        guide: FlatGuide,
        elbo: MeanFieldELBO,
        data: tuple[Tensor, Tensor],
        batch_size: int,
    ) -> None:
        self.model, self.guide, self.elbo, self.data, self.batch_size = model, guide, elbo, data, batch_size
        self.num_data = len(data[0]) if model.num_data is None else model.num_data
        model.num_data = self.num_data
        self.steps_per_epoch = math.ceil(len(data[0]) / batch_size)
        self.full_kl_weight = model.kl_weight
        self.step = 0

    def set_rates(self, lr: float, posterior_lr: float, noisy_epochs: int, epochs: int) -> None:
        """Give weights and posterior their rates, decaying to zero over all epochs and over those with noise."""
        weights = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        groups = [{"params": weights, "lr": lr}, {"params": list(self.guide.parameters()), "lr": posterior_lr}]
        self.optimizer = torch.optim.Adam(groups, fused=True)
        decays = [_cosine(count * self.steps_per_epoch) for count in (epochs, noisy_epochs)]
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, decays)

    def noisy_epoch(self, kl_warmup_epochs: int) -> float:
        """Run one epoch of SVI and return its mean loss, in nats an example."""
        warmup_steps = kl_warmup_epochs * self.steps_per_epoch

        def loss(x: Tensor, y: Tensor) -> Tensor:
            self.model.kl_weight = self.full_kl_weight * min(1.0, (self.step + 1) / (warmup_steps + 1))
            return self.elbo.differentiable_loss(self.model, self.guide, x, y) / self.num_data

        try:
            return self._epoch(loss)
        finally:
            self.model.kl_weight = self.full_kl_weight

    def fine_tune_epoch(self) -> float:
        """Run one epoch of the weights alone and return the mean negative log likelihood, in nats an example."""
        means = {site: mean.detach() for site, mean in self.guide.mean().items()}

        def loss(x: Tensor, y: Tensor) -> Tensor:
            with fix_noise(means):
                return -self.model.likelihood(self.model.net(x)).log_prob(y).mean()

        return self._epoch(loss)

    def _epoch(self, loss_of_batch: Callable[[Tensor, Tensor], Tensor]) -> float:
        self.model.train()
        x, y = self.data
        losses = []
        for batch in torch.randperm(len(x), device=x.device).tensor_split(self.steps_per_epoch):
            self.optimizer.zero_grad()
            loss = loss_of_batch(x[batch], y[batch])
            if not loss.is_cuda and not math.isfinite(loss.item()):
                raise self._not_finite(f"the loss became {loss.item()} at step {self.step}")
            loss.backward()
            self.optimizer.step()
            self.schedule.step()
            losses.append(loss.detach())
            self.step += 1
        record = torch.stack(losses)  # on a GPU, finite or not is asked once an epoch: asking stalls it
        finite = torch.isfinite(record)
        if not bool(finite.all()):
            first = int((~finite).nonzero()[0])
            raise self._not_finite(f"the loss became {record[first].item()} at step {self.step - len(losses) + first}")
        if self._non_finite_tensors():
            raise self._not_finite(f"a parameter stopped being finite by step {self.step}")
        return record.mean().item()

    def _not_finite(self, what: str) -> FloatingPointError:
        culprits = self._non_finite_tensors() or [self._first_non_finite_input()]
        return FloatingPointError(f"{what}; not finite: {', '.join(culprits[:3])}. Lower lr or posterior_lr")

    def _non_finite_tensors(self) -> list[str]:
        named: dict[str, Tensor] = {f"weight {name!r}": p for name, p in self.model.net.named_parameters()}
        for name, flat in self.guide.named_parameters():
            named.update({f"posterior {name} of site {site!r}": part for site, part in self.guide.split(flat).items()})
        return [name for name, tensor in named.items() if not bool(torch.isfinite(tensor).all())]

    @torch.no_grad()
    def _first_non_finite_input(self) -> str:
        """Return the noise site at whose input the network's activations first overflow."""
        found: list[str] = []
        with ExitStack() as hooks, fix_noise(self.guide.mean()):
            for site, layer in self.model.noise.items():

                def check(_: torch.nn.Module, inputs: tuple[Tensor, ...], site: str = site) -> None:
                    if not bool(torch.isfinite(inputs[0]).all()):
                        found.append(site)

                hooks.callback(layer.register_forward_pre_hook(check).remove)
            self.model.net(self.data[0][: self.batch_size])
        return f"the input of site {found[0]!r}" if found else "the likelihood of the network's output"


def _cosine(steps: int) -> Callable[[int], float]:
    return lambda step: 0.5 * (1 + math.cos(math.pi * min(step / max(steps, 1), 1.0)))
