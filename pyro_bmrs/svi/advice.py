"""What a fit that has little to show for it says at its end: one warning, with figures and what to change."""

import math
import statistics

import torch

from pyro_bmrs.criteria.base import Criterion
from pyro_bmrs.criteria.evidence import LACKING_EVIDENCE, EvidenceCriterion
from pyro_bmrs.svi.data.source import Source
from pyro_bmrs.svi.history import History
from pyro_bmrs.svi.pruner import Pruner
from pyro_bmrs.svi.result import FitWarning
from pyro_bmrs.svi.schedule import Rates
from pyro_bmrs.warn import warn

__all__ = ["Advice"]

_HARDLY_MOVED = 0.1  # median change of the posterior's parameters, in nats and in units of log theta
_NEARLY_ALL = 0.02  # fraction of structures left
_FEW_STEPS = 2000  # in which weights may not have learned anything before the KL has its full weight
_FAR = 20.0  # nats that a posterior may travel until its structure goes
_NEEDED_TRAVEL = 2 * _FAR  # there and back
_LOST_RECALL = 0.1
_BEST_EPOCHS = 5  # whose median recall is what a class could be recognised with
_ROWS = 10_000  # of the training data, to measure accuracy on where there is no validation data


class Advice:
    """Notes how a fit begins, and says at its end what went nowhere.

    Args:
        history: Its history, before the first epoch.
        pruner: Removes its structures.
        rates: Its learning rates.
        data: What it trains on.
    """

    def __init__(self, history: History, pruner: Pruner, rates: Rates, data: Source) -> None:
        self.history, self.pruner, self.rates, self.data = history, pruner, rates, data
        self.model, self.guide = history.model, history.guide
        self._before = {name: p.detach().clone() for name, p in self.guide.named_parameters()}

    def text(self) -> str:
        """Return what went nowhere and what to do about it, or an empty string."""
        found = [*self._pruning(), *self._accuracy(), *self._movement(), *self._steps()]
        reasons = "; ".join(reason for reason, _ in found)
        turns = "; ".join(dict.fromkeys(turn for _, turn in found))
        return f"{reasons}. {turns}" if found else ""

    def give(self) -> None:
        """Warn once of all that went nowhere, if anything did."""
        if text := self.text():
            warn(f"the fit has ended, but {text}", FitWarning)

    def _pruning(self) -> list[tuple[str, str]]:
        kept = {site: int(mask.sum()) for site, mask in self.pruner.masks.items()}
        total, left = sum(len(mask) for mask in self.pruner.masks.values()), sum(kept.values())
        nearly_all = left <= max(_NEARLY_ALL * total, len(kept)) < total or not all(kept.values())
        if nearly_all and not self._is_as_good_as_ever():
            empty = [site for site, count in kept.items() if not count]
            of = f", none of {', '.join(map(repr, empty))}" if empty else ""
            steps = self.rates.noisy_epochs * self.data.steps
            more = f", or train for more steps (now {steps} with noise)" if steps < _FEW_STEPS else ""
            turn = f"Lower kl_weight (now {self._kl_weight()}){more}"
            return [(f"only {left} of {total} structures are left{of}", turn)]
        if self.pruner.criterion is None or left < total:
            return []
        return [self._nothing_removed(total)]

    def _nothing_removed(self, total: int) -> tuple[str, str]:
        """Return why nothing was removed, as far as scores say it."""
        criterion, none = self.pruner.criterion, f"none of {total} structures was removed"
        scores = [score[score.isfinite()] for score in self.pruner.scores.values()]
        if not scores:
            return "nothing was removed, since the criterion was never asked", "Raise epochs beyond kl_warmup_epochs"
        known = torch.cat(scores)
        if criterion is None or not criterion.has_line or not len(known):
            return none, self._more()
        could = int((known >= 0).sum())
        if could and type(criterion).removable is Criterion.removable:
            return f"{none}, though {could} could be: size or levels are too small for any of them", "Raise them"
        closest = f"{none} (the closest scores {float(known.max()):.3g}, and 0 removes)"
        odds = criterion.prior_log_odds if isinstance(criterion, EvidenceCriterion) else LACKING_EVIDENCE
        undecided = int((known >= odds - LACKING_EVIDENCE).sum()) if isinstance(odds, int | float) else 0
        if undecided and odds != LACKING_EVIDENCE:
            turn = "Give it prior_log_odds=math.log(3), which a fit has by default: a prior that favours absence"
            return f"{closest}, though the evidence for {undecided} of them is not positive", turn
        return closest, self._more()

    def _is_as_good_as_ever(self) -> bool:
        """Return whether the validation accuracy in the end is about what it was at its best, and that is something."""
        known = [entry["accuracy_validation"] for entry in self.history.entries if "accuracy_validation" in entry]
        found = self.history.evaluation
        if not known or found is None or found.majority is None:
            return False
        best = statistics.median_high(sorted(known)[-_BEST_EPOCHS:])
        return bool(known[-1] >= best - _LOST_RECALL / 2 and known[-1] > (1 + found.majority) / 2)

    def _accuracy(self) -> list[tuple[str, str]]:
        if not self.history.entries:
            return []
        found = self.history.evaluation or self.history.evaluate(self.history.validation or self.data, _ROWS)
        accuracy, majority = found.accuracy, found.majority
        if accuracy is None or majority is None:
            return []
        if accuracy >= majority:
            return self._recall()
        reason = (
            f"its accuracy of {100 * accuracy:.1f} % is below the {100 * majority:.1f} % of always naming the most "
            "frequent class"
        )
        return [(reason, "Train for longer, raise lr, or lower kl_weight")]

    def _recall(self) -> list[tuple[str, str]]:
        """Return which classes have been given up for the others since pruning began."""
        if self.history.evaluation is None or self.history.evaluation.labels is None:
            return []
        recalls = [entry["recall_validation"] for entry in self.history.entries if "recall_validation" in entry]
        counts = self.history.evaluation.labels.bincount(minlength=self.history.evaluation.classes).tolist()
        lost = []
        for label, count in enumerate(counts):
            values = [recall[label] for recall in recalls if recall[label] is not None]
            if not values:
                continue
            best, last = statistics.median_high(sorted(values)[-_BEST_EPOCHS:]), values[-1]
            error = math.sqrt(max(best * (1 - best), last * (1 - last), 1 / count) / count)
            if best - last > max(_LOST_RECALL, 2 * error):
                lost.append(
                    (
                        best - last,
                        f"class {label} is recognised in {100 * last:.0f} % of its {count} examples, "
                        f"after {100 * best:.0f} % in earlier epochs",
                    )
                )
        if not lost:
            return []
        reasons = "; ".join(reason for _, reason in sorted(lost, reverse=True)[:3])
        return [(reasons, f"Lower kl_weight (now {self._kl_weight()})")]

    def _movement(self) -> list[tuple[str, str]]:
        if self.rates.noisy_epochs == 0:
            return []
        changes: dict[str, float] = {}
        if not bool(self.guide.keep.any()):
            return []
        for name, parameter in self.guide.named_parameters():
            before = self._before[name]
            if before.shape != parameter.shape:  # the network has shrunk: the posterior has moved enough for that
                return []
            changes[name] = float((parameter.detach() - before).abs()[self.guide.keep].median())
        if max(changes.values(), default=1.0) >= _HARDLY_MOVED:
            return []
        shown = ", ".join(f"{name} {change:.2g}" for name, change in changes.items())
        return [(f"the posterior has hardly moved from where it began (median change: {shown})", self._more())]

    def _steps(self) -> list[tuple[str, str]]:
        """Return whether the posterior could get to where structures are removed at all."""
        steps = self.rates.noisy_epochs * self.data.steps
        travel = self.rates.travel(self.data.steps)
        removed = not all(bool(mask.all()) for mask in self.pruner.masks.values())
        if steps == 0 or travel >= (_FAR if removed else _NEEDED_TRAVEL):
            return []
        reason = f"its posterior could travel {travel:.2g} nats at most, of the 10 to 20 there and 10 to 20 back"
        turn = self._longer() if removed else self._more()
        return [(f"{reason} that it may take to decide on a structure", turn)]

    def _more(self) -> str:
        """Return how to have more removed."""
        now = f"posterior_lr (now {self.rates.posterior_lr:g}) or kl_weight (now {self._kl_weight()})"
        return f"{self._longer()}, raise {now}"

    def _longer(self) -> str:
        steps, travel = self.rates.noisy_epochs * self.data.steps, self.rates.travel(self.data.steps)
        few = 0 < travel < _NEEDED_TRAVEL
        wanted = f"at least {math.ceil(steps * _NEEDED_TRAVEL / travel)}" if few else "more"
        return f"Train for {wanted} steps with noise (now {steps})"

    def _kl_weight(self) -> str:
        model = self.model
        weights = sorted({model.kl_weight * each for each in model.kl_weights.values()})
        return f"{weights[0]:.3g}" if len(weights) == 1 else f"{weights[0]:.3g} to {weights[-1]:.3g}"
