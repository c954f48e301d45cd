"""What a fit that has little to show for it says at its end: one warning, with figures and what to turn."""

import warnings
from typing import Any

import torch
from pyro.distributions import Categorical
from torch import Tensor

from pyro_bmrs.model.prediction import predict
from pyro_bmrs.svi.result import FitWarning
from pyro_bmrs.svi.run import Run

__all__ = ["Advice"]

_HARDLY_MOVED = 0.1  # median change of the posterior's parameters, in nats and in units of log theta
_NEARLY_ALL = 0.02  # fraction of structures left
_ROWS = 10_000  # of the training data, to measure accuracy on where there is no validation data


class Advice:
    """Notes how a fit begins, and says at its end what went nowhere.

    Args:
        run: The fit, before its first epoch.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        self._before = {name: p.detach().clone() for name, p in run.guide.named_parameters()}
        self._removed_before = {site: ~mask for site, mask in run.pruner.masks.items()}

    def give(self) -> None:
        """Warn once of all that went nowhere, if anything did."""
        found = [*self._pruning(), *self._accuracy(), *self._movement()]
        if found:
            reasons, turns = zip(*found, strict=True)
            what = "; ".join(dict.fromkeys(turn for turn in turns if turn))
            warnings.warn(f"the fit has ended, but {'; '.join(reasons)}. {what}", FitWarning, stacklevel=4)

    def _pruning(self) -> list[tuple[str, str]]:
        run = self.run
        kept = {site: int(mask.sum()) for site, mask in run.pruner.masks.items()}
        total, left = sum(len(mask) for mask in run.pruner.masks.values()), sum(kept.values())
        if left <= _NEARLY_ALL * total or not all(kept.values()):
            empty = [site for site, count in kept.items() if not count]
            of = f", none of {', '.join(map(repr, empty))}" if empty else ""
            return [(f"only {left} of {total} structures are left{of}", f"Lower kl_weight (now {self._kl_weight()})")]
        if run.pruner.criterion is None or left < total:
            return []
        scores = [score[score.isfinite()] for score in run.pruner.scores.values()]
        known = torch.cat(scores) if scores else torch.empty(0)
        closest = f" (the closest scores {float(known.max()):.3g}, and 0 removes)" if len(known) else ""
        if not scores:
            return [
                ("nothing was removed, since the criterion was never asked", "Raise epochs beyond kl_warmup_epochs")
            ]
        return [(f"none of {total} structures was removed{closest}", self._more())]

    def _accuracy(self) -> list[tuple[str, str]]:
        run, (x, y) = self.run, self.run.trainer.data
        if not run.history.entries:
            return []
        if run.validation is not None:
            y = run.validation[1]
            accuracy = run.history.entries[-1].get("accuracy_validation")
        else:
            x, y = x[:_ROWS], y[:_ROWS]
            accuracy = _accuracy(run, x, y)
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
        run = self.run
        if run.trainer.rates.noisy_epochs == 0:
            return []
        changes = {}
        for name, parameter in run.guide.named_parameters():
            before = self._before[name]
            if before.shape != parameter.shape:  # the network has shrunk: the posterior has moved enough for that
                return []
            changes[name] = float((parameter.detach() - before).abs().median())
        if max(changes.values(), default=1.0) >= _HARDLY_MOVED:
            return []
        shown = ", ".join(f"{name} {change:.2g}" for name, change in changes.items())
        return [(f"the posterior has hardly moved from where it began (median change: {shown})", self._more())]

    def _more(self) -> str:
        rates = self.run.trainer.rates
        return (
            f"Train for more steps (now {rates.noisy_epochs * self.run.trainer.steps_per_epoch} with noise), raise "
            f"posterior_lr (now {rates.posterior_lr:g}) or kl_weight (now {self._kl_weight()})"
        )

    def _kl_weight(self) -> str:
        model: Any = self.run.model
        weights = sorted({model.kl_weight * each for each in model.kl_weights.values()})
        return f"{weights[0]:.3g}" if len(weights) == 1 else f"{weights[0]:.3g} to {weights[-1]:.3g}"


def _accuracy(run: Run, x: Tensor, y: Tensor) -> float | None:
    observed = run.model.likelihood(predict(run.model, run.guide, x))
    if not isinstance(observed, Categorical):
        return None
    return float((observed.logits.argmax(-1) == y.to(observed.logits.device)).double().mean())
