"""What a fit that has little to show for it says at its end: one warning, with figures and what to turn."""

import warnings

import torch
from pyro.distributions import Categorical
from torch import Tensor

from pyro_bmrs.criteria import RankingCriterion
from pyro_bmrs.model.guides.flat import FlatGuide
from pyro_bmrs.model.network import NoisyNetwork
from pyro_bmrs.model.prediction import predict
from pyro_bmrs.svi.history import History
from pyro_bmrs.svi.pruner import Pruner
from pyro_bmrs.svi.result import FitWarning
from pyro_bmrs.svi.schedule import Rates

__all__ = ["Advice"]

_HARDLY_MOVED = 0.1  # median change of the posterior's parameters, in nats and in units of log theta
_NEARLY_ALL = 0.02  # fraction of structures left
_ROWS = 10_000  # of the training data, to measure accuracy on where there is no validation data


class Advice:
    """Notes how a fit begins, and says at its end what went nowhere.

    Args:
        history: Its history, before the first epoch.
        pruner: Removes its structures.
        rates: Its learning rates.
        steps_per_epoch: Its number of steps per epoch.
        data: Training inputs and observations.
    """

    def __init__(
        self, history: History, pruner: Pruner, rates: Rates, steps_per_epoch: int, data: tuple[Tensor, Tensor]
    ) -> None:
        self.history, self.pruner, self.rates = history, pruner, rates
        self.steps_per_epoch, self.data = steps_per_epoch, data
        self.model, self.guide = history.model, history.guide
        self._before = {name: p.detach().clone() for name, p in self.guide.named_parameters()}

    def text(self) -> str:
        """Return what went nowhere and what to do about it, or an empty string."""
        found = [*self._pruning(), *self._accuracy(), *self._movement()]
        reasons = "; ".join(reason for reason, _ in found)
        turns = "; ".join(dict.fromkeys(turn for _, turn in found))
        return f"{reasons}. {turns}" if found else ""

    def give(self) -> None:
        """Warn once of all that went nowhere, if anything did."""
        if text := self.text():
            warnings.warn(f"the fit has ended, but {text}", FitWarning, stacklevel=3)

    def _pruning(self) -> list[tuple[str, str]]:
        kept = {site: int(mask.sum()) for site, mask in self.pruner.masks.items()}
        total, left = sum(len(mask) for mask in self.pruner.masks.values()), sum(kept.values())
        if left <= _NEARLY_ALL * total or not all(kept.values()):
            empty = [site for site, count in kept.items() if not count]
            of = f", none of {', '.join(map(repr, empty))}" if empty else ""
            return [(f"only {left} of {total} structures are left{of}", f"Lower kl_weight (now {self._kl_weight()})")]
        if self.pruner.criterion is None or left < total:
            return []
        scores = [score[score.isfinite()] for score in self.pruner.scores.values()]
        known = torch.cat(scores) if scores else torch.empty(0)
        has_line = len(known) and not isinstance(self.pruner.criterion, RankingCriterion)
        closest = f" (the closest scores {float(known.max()):.3g}, and 0 removes)" if has_line else ""
        if not scores:
            return [
                ("nothing was removed, since the criterion was never asked", "Raise epochs beyond kl_warmup_epochs")
            ]
        return [(f"none of {total} structures was removed{closest}", self._more())]

    def _accuracy(self) -> list[tuple[str, str]]:
        x, y = self.data
        if not self.history.entries:
            return []
        if self.history.validation is not None:
            y = self.history.validation[1]
            accuracy = self.history.entries[-1].get("accuracy_validation")
        else:
            x, y = x[:_ROWS], y[:_ROWS]
            accuracy = _accuracy(self.model, self.guide, x, y)
        if accuracy is None:
            return []
        majority = float(y.long().bincount().max()) / len(y)
        if accuracy >= majority:
            return []
        return [
            (
                f"its accuracy of {100 * accuracy:.1f} % is below the {100 * majority:.1f} % of always naming the most "
                "frequent class",
                "Train for longer, raise lr, or lower kl_weight",
            )
        ]

    def _movement(self) -> list[tuple[str, str]]:
        if self.rates.noisy_epochs == 0:
            return []
        changes = {}
        for name, parameter in self.guide.named_parameters():
            before = self._before[name]
            if before.shape != parameter.shape:  # the network has shrunk: the posterior has moved enough for that
                return []
            changes[name] = float((parameter.detach() - before).abs().median())
        if max(changes.values(), default=1.0) >= _HARDLY_MOVED:
            return []
        shown = ", ".join(f"{name} {change:.2g}" for name, change in changes.items())
        return [(f"the posterior has hardly moved from where it began (median change: {shown})", self._more())]

    def _more(self) -> str:
        rates = self.rates
        return (
            f"Train for more steps (now {rates.noisy_epochs * self.steps_per_epoch} with noise), raise "
            f"posterior_lr (now {rates.posterior_lr:g}) or kl_weight (now {self._kl_weight()})"
        )

    def _kl_weight(self) -> str:
        model = self.model
        weights = sorted({model.kl_weight * each for each in model.kl_weights.values()})
        return f"{weights[0]:.3g}" if len(weights) == 1 else f"{weights[0]:.3g} to {weights[-1]:.3g}"


def _accuracy(model: NoisyNetwork, guide: FlatGuide, x: Tensor, y: Tensor) -> float | None:
    observed = model.likelihood(predict(model, guide, x))
    if not isinstance(observed, Categorical):
        return None
    return float((observed.logits.argmax(-1) == y.to(observed.logits.device)).double().mean())
