"""How learning rates and the KL's weight run over the epochs."""

import math
from dataclasses import dataclass

from pyro_bmrs.checks import check_flag, check_integer, check_number

__all__ = ["MOST_EPOCHS", "Rates"]

MOST_EPOCHS = 10**6
_NOISY_STEPS = 5000  # of a fit, by default
_FEWEST_EPOCHS = 3
_TRAVEL = 500.0  # nats that a posterior location must be able to travel
_LARGEST_POSTERIOR_LR = 0.3


@dataclass(frozen=True)
class Rates:
    """Learning rates and KL weight of each step of a fit.

    Args:
        lr: Initial learning rate of the weights, which falls along a cosine to zero over all epochs.
        posterior_lr: That of the posterior's parameters, over the epochs with noise.
        epochs: Number of all epochs.
        noisy_epochs: Number of those with noise.
        kl_warmup_epochs: Number of epochs over which the KL's weight rises linearly.
        decay: Whether they fall at all.
    """

    lr: float
    posterior_lr: float
    epochs: int
    noisy_epochs: int
    kl_warmup_epochs: float
    decay: bool = True

    def travel(self, steps_per_epoch: int) -> float:
        """Return how far a posterior location can get, in nats: Adam moves it by the rate in a step, at most."""
        return self.posterior_lr * self.noisy_epochs * steps_per_epoch * (0.5 if self.decay else 1.0)

    @classmethod
    def planned(
        cls,
        lr: float,
        posterior_lr: float | None,
        noisy_epochs: int | None,
        fine_tune_epochs: int | None,
        kl_warmup_epochs: float | None,
        steps_per_epoch: int,
        levels: int = 0,
        decay: bool = True,
    ) -> "Rates":
        """Return the rates with the defaults of ``fit`` filled in; ``levels`` is the epochs in between.

        What is left out follows from the number of steps, since it takes steps for weights to learn and for locations
        to travel, whatever the number of examples.

        Raises:
            TypeError: If an argument is of another type.
            ValueError: If a rate is not positive and finite, or a number of epochs is negative.
        """
        check_number("lr", lr)
        if noisy_epochs is None:
            noisy_epochs = min(max(math.ceil(_NOISY_STEPS / steps_per_epoch), _FEWEST_EPOCHS), MOST_EPOCHS)
        check_integer("epochs", noisy_epochs, high=MOST_EPOCHS)
        if fine_tune_epochs is None:
            fine_tune_epochs = math.ceil(noisy_epochs / 3) if noisy_epochs else 10
        check_integer("fine_tune_epochs", fine_tune_epochs, high=MOST_EPOCHS)
        if posterior_lr is None:
            needed = 2 * _TRAVEL / max(noisy_epochs * steps_per_epoch, 1)
            posterior_lr = max(50 * lr, min(needed, _LARGEST_POSTERIOR_LR))
        check_number("posterior_lr", posterior_lr)
        if kl_warmup_epochs is None:
            kl_warmup_epochs = noisy_epochs // 4 or noisy_epochs / 4
        else:
            check_integer("kl_warmup_epochs", kl_warmup_epochs, high=MOST_EPOCHS)
        check_flag("decay", decay)
        epochs = noisy_epochs + levels + fine_tune_epochs
        return cls(lr, posterior_lr, epochs, noisy_epochs, kl_warmup_epochs, decay)

    def learning_rates(self, epoch: float) -> tuple[float, float]:
        """Return the rates of weights and posterior after ``epoch`` epochs, a fraction inside one."""
        if not self.decay:
            return self.lr, self.posterior_lr
        return self.lr * _cosine(epoch, self.epochs), self.posterior_lr * _cosine(epoch, self.noisy_epochs)

    def kl_warmup_factor(self, step: int, steps_per_epoch: int) -> float:
        """Return the fraction of its full weight that the KL has at ``step``, counted from 0."""
        return min(1.0, (step + 1) / (self.kl_warmup_epochs * steps_per_epoch + 1))


def _cosine(epoch: float, epochs: int) -> float:
    return 0.5 * (1 + math.cos(math.pi * min(epoch / max(epochs, 1e-9), 1.0)))
