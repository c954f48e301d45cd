"""Which set of elements to remove together, where their evidence changes do not simply add."""

from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from typing import Generic, TypeVar

from torch import Tensor

from pyro_bmrs.checks import check_function, check_list, check_number

__all__ = ["SearchResult", "greedy_search"]

Candidate = TypeVar("Candidate", bound=Hashable)


@dataclass(frozen=True)
class SearchResult(Generic[Candidate]):
    r"""What a search found.

    Attributes:
        removed: The candidates in the order of their removal.
        delta_f: :math:`\Delta F` of all removed so far, in nats, after each of them.
    """

    removed: tuple[Candidate, ...]
    delta_f: tuple[float, ...]


def greedy_search(
    delta_f_of: Callable[[tuple[Candidate, ...]], float | Tensor],
    candidates: Iterable[Candidate],
    prior_log_odds: float = 0.0,
) -> SearchResult[Candidate]:
    r"""Remove one candidate after the other, the best each time, for as long as that is no loss.

    Backward elimination: quadratic in the number of candidates where all subsets would be exponential.

    Args:
        delta_f_of: From the candidates removed together to their joint :math:`\Delta F`, as ``Reduction.joint``.
        candidates: What may be removed.
        prior_log_odds: Log-odds a priori of a candidate being absent, which count for each that is removed.

    Raises:
        TypeError, ValueError: If ``delta_f_of`` is no function, or ``prior_log_odds`` no finite number.

    Example:
        >>> joint = lambda removed: 3.0 - 2.0 * abs(len(removed) - 2)
        >>> greedy_search(joint, ["a", "b", "c"])
        SearchResult(removed=('a', 'b'), delta_f=(1.0, 3.0))
    """
    check_function("delta_f_of", delta_f_of, "of the candidates removed")
    check_number("prior_log_odds", prior_log_odds, positive=False)
    remaining = check_list("candidates", candidates, "what may be removed")
    removed: tuple[Candidate, ...] = ()
    delta_f: tuple[float, ...] = ()
    while remaining:
        gains = [float(delta_f_of((*removed, each))) for each in remaining]
        best = max(range(len(gains)), key=gains.__getitem__)
        if not gains[best] + prior_log_odds >= (delta_f[-1] if delta_f else 0.0):
            break
        removed, delta_f = (*removed, remaining.pop(best)), (*delta_f, gains[best])
    return SearchResult(removed, delta_f)
