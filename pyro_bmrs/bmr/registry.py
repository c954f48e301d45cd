"""The change of evidence under another prior, looked up by the types of the three distributions.

``evidence_change`` is to Bayesian model reduction what ``torch.distributions.kl_divergence`` is to variational
inference: an open registry of closed forms, and an honest refusal where there is none.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Any, TypeVar

import torch
from pyro.distributions import Delta
from torch import Tensor
from torch.distributions import Distribution, Independent
from torch.distributions.utils import _sum_rightmost

from pyro_bmrs.checks import described

__all__ = [
    "DivergentIntegralError",
    "check_convergence",
    "check_distributions",
    "evidence_change",
    "is_point_mass",
    "reduced_posterior",
    "register_evidence_change",
    "register_reduced_posterior",
]

Triple = tuple[type[Distribution], type[Distribution], type[Distribution]]
Rule = TypeVar("Rule", bound=Callable[..., Any])


class DivergentIntegralError(ValueError):
    """There is no reduced posterior: q times reduced prior over prior does not integrate, and Delta F is +inf."""


_EVIDENCE_CHANGES: dict[Triple, Callable[..., Any]] = {}
_REDUCED_POSTERIORS: dict[Triple, Callable[..., Any]] = {}


def register_evidence_change(
    type_q: type[Distribution], type_p: type[Distribution], type_reduced: type[Distribution]
) -> Callable[[Rule], Rule]:
    """Register a closed form for ``evidence_change`` with these types of posterior, prior and reduced prior.

    The decorated function takes the three distributions and returns a tensor of their broadcast
    ``batch_shape``. A rule also serves subclasses; the most specific one wins: the one registered for the
    closest ancestor of the posterior's type, then of the prior's, then of the reduced prior's. So no two rules
    tie, and a later rule for the same three types replaces the earlier.

    Raises:
        TypeError: If one of the three is not a subclass of ``torch.distributions.Distribution``.

    Example:
        >>> from torch.distributions import Gumbel
        >>> @bmrs.register_evidence_change(Gumbel, Gumbel, Gumbel)
        ... def _no_change(posterior, prior, reduced_prior):
        ...     return torch.zeros(posterior.batch_shape)
        >>> q = Gumbel(0.0, 1.0)
        >>> bmrs.evidence_change(q, q, q)
        tensor(0.)
    """
    return _register(_EVIDENCE_CHANGES, (type_q, type_p, type_reduced))


def register_reduced_posterior(
    type_q: type[Distribution], type_p: type[Distribution], type_reduced: type[Distribution]
) -> Callable[[Rule], Rule]:
    """Register a closed form for ``reduced_posterior``; see ``register_evidence_change``.

    Example:
        >>> from torch.distributions import Gumbel
        >>> @bmrs.register_reduced_posterior(Gumbel, Gumbel, Gumbel)
        ... def _the_same(posterior, prior, reduced_prior):
        ...     return posterior
        >>> q = Gumbel(0.0, 1.0)
        >>> bmrs.reduced_posterior(q, q, q) is q
        True
    """
    return _register(_REDUCED_POSTERIORS, (type_q, type_p, type_reduced))


def _register(table: dict[Triple, Callable[..., Any]], triple: Triple) -> Callable[[Rule], Rule]:
    for kind in triple:
        if not (isinstance(kind, type) and issubclass(kind, Distribution)):
            raise TypeError(f"expected subclasses of torch.distributions.Distribution, but got {kind!r}")

    def decorate(rule: Rule) -> Rule:
        table[triple] = rule
        _find_rule.cache_clear()
        for question, documented in ((evidence_change, _EVIDENCE_CHANGES), (reduced_posterior, _REDUCED_POSTERIORS)):
            if table is documented:
                question.__doc__ = _with_table(question.__doc__, table)
        return rule

    return decorate


_TABLE_TITLE = "\n\n    Registered for posterior, prior and reduced prior (and their subclasses):\n"


def _with_table(doc: str | None, table: dict[Triple, Callable[..., Any]]) -> str | None:
    """Return ``doc`` with the list of the registered triples at its end; None, as under ``python -OO``, stays."""
    if doc is None:
        return None
    rows = sorted(", ".join(f"``{kind.__name__}``" for kind in triple) for triple in table)
    text = doc.partition(_TABLE_TITLE)[0].rstrip()
    return text + _TABLE_TITLE + "".join(f"\n    * {row}" for row in rows) + "\n"


@lru_cache(maxsize=256)
def _find_rule(question: str, triple: Triple) -> Callable[..., Any]:
    table = _EVIDENCE_CHANGES if question == "evidence_change" else _REDUCED_POSTERIORS
    matches = [
        registered
        for registered in table
        if all(issubclass(kind, base) for kind, base in zip(triple, registered, strict=True))
    ]
    if not matches:
        q, p, reduced = (kind.__name__ for kind in triple)
        sampled = ", or sample it: estimate_evidence_change(posterior, prior, reduced_prior)"
        raise NotImplementedError(
            f"no {question} is registered for a {q} posterior, {p} prior and {reduced} reduced prior; "
            f"register one with register_{question}({q}, {p}, {reduced})"
            + (sampled if question == "evidence_change" else "")
        )
    return table[min(matches, key=lambda match: _specificity(triple, match))]


def _specificity(triple: Triple, registered: Triple) -> tuple[int, ...]:
    """Order rules by how far up the inheritance their types stand, posterior first: smaller is closer."""
    return tuple(kind.__mro__.index(base) for kind, base in zip(triple, registered, strict=True))


def evidence_change(posterior: Distribution, prior: Distribution, reduced_prior: Distribution) -> Tensor:
    r"""Return how the log evidence changes when ``prior`` is replaced by ``reduced_prior``.

    .. math:: \Delta F = \log \tilde p(D) - \log p(D) = \log E_{q(\theta)}
        \Big[\frac{\tilde p(\theta)}{p(\theta)}\Big]

    with :math:`q` the posterior under ``prior`` and the same likelihood: eq. 6 of the paper, exact when
    :math:`q` is. **>= 0 favours the reduced prior.**

    Args:
        posterior: :math:`q(\theta)`.
        prior: :math:`p(\theta)`, under which the posterior was found.
        reduced_prior: :math:`\tilde p(\theta)`, whose support lies within the prior's. A
            ``pyro.distributions.Delta`` is a point null: :math:`\Delta F` is then the Savage-Dickey density ratio.

    Returns:
        :math:`\Delta F` in nats, of shape ``batch_shape``; computed in float64, in the posterior's dtype. It is
        +inf where the expectation diverges: the reduced prior has the heavier tails, and more so than the
        posterior's are lighter than the prior's.

    Raises:
        TypeError: If one of the three is no distribution.
        NotImplementedError: If no rule is registered for the three types, or the posterior is a point mass.
        ValueError: If shapes do not broadcast, or a support does not lie within the prior's.

    References:
        BMRS: Bayesian Model Reduction for Structured Pruning (Wright et al., 2024)
        https://arxiv.org/abs/2406.01345

    Example:
        >>> prior = bmrs.LogUniform()
        >>> q = bmrs.TruncatedLogNormal(torch.tensor([-18.0, -0.5]), torch.tensor([1.0, 0.1]))
        >>> bmrs.evidence_change(q, prior, bmrs.spike(prior))
        tensor([ 9.9808e-02, -1.9008e+04])
    """
    check_distributions(posterior, prior, reduced_prior, same_events=False)
    reduced_prior = _merge_event_dims(reduced_prior)
    if isinstance(posterior, Independent) and not isinstance(reduced_prior, Delta):
        return _sum_rightmost(
            evidence_change(*_unwrap(posterior, prior, reduced_prior)), posterior.reinterpreted_batch_ndims
        )
    rule = _find_rule("evidence_change", (type(posterior), type(prior), type(reduced_prior)))
    return rule(posterior, prior, reduced_prior)


def reduced_posterior(posterior: Distribution, prior: Distribution, reduced_prior: Distribution) -> Distribution:
    r"""Return the posterior that ``reduced_prior`` would have given, without fitting again.

    .. math:: \tilde q(\theta) \propto q(\theta) \, \tilde p(\theta) / p(\theta)

    Args and errors are those of ``evidence_change``.

    Raises:
        DivergentIntegralError: If there is none in any element of the batch, where ``evidence_change`` is +inf.

    Example:
        >>> prior = bmrs.LogUniform()
        >>> q = bmrs.TruncatedLogNormal(torch.tensor(-4.0), torch.tensor(1.0))
        >>> bmrs.reduced_posterior(q, prior, bmrs.spike(prior, scale=1.0)).loc
        tensor(-12.)
    """
    check_distributions(posterior, prior, reduced_prior, same_events=False)
    reduced_prior = _merge_event_dims(reduced_prior)
    if isinstance(posterior, Independent) and not isinstance(reduced_prior, Delta):
        base = reduced_posterior(*_unwrap(posterior, prior, reduced_prior))
        return Independent(base, posterior.reinterpreted_batch_ndims)
    rule = _find_rule("reduced_posterior", (type(posterior), type(prior), type(reduced_prior)))
    return rule(posterior, prior, reduced_prior)


def check_distributions(posterior: Any, prior: Any, reduced_prior: Any, same_events: bool = True) -> torch.Size:
    """Return the broadcast ``batch_shape`` of the three, or raise naming the one that does not fit.

    Raises:
        TypeError: If one of them is no distribution.
        NotImplementedError: If the posterior is a point mass.
        ValueError: If they differ in ``event_shape``, or their ``batch_shape`` do not broadcast.
    """
    named = {"posterior": posterior, "prior": prior, "reduced_prior": reduced_prior}
    for name, each in named.items():
        if not isinstance(each, Distribution):
            raise TypeError(f"{name} must be a distribution, but got {described(each)}")
    if is_point_mass(posterior):
        raise NotImplementedError(f"the posterior {POINT_MASS}")
    shapes = {name: (tuple(each.batch_shape), tuple(each.event_shape)) for name, each in named.items()}
    one_event = len({event for _, event in shapes.values()}) == 1
    if not (one_event or same_events):
        return torch.Size()  # the rules for events say what does not fit
    try:
        if one_event:
            return torch.broadcast_shapes(*(batch for batch, _ in shapes.values()))
    except RuntimeError:
        pass
    raise ValueError(
        "posterior, prior and reduced prior need one event_shape and batch_shapes that broadcast, but their "
        f"(batch_shape, event_shape) are {', '.join(map(str, shapes.values()))}; .expand() or .to_event() them"
    )


POINT_MASS = "is a point mass, which leaves no posterior to reduce; fit another guide, AutoNormal for one"


def is_point_mass(distribution: Distribution) -> bool:
    """Return whether a distribution has all its mass at one point."""
    while isinstance(distribution, Independent):
        distribution = distribution.base_dist
    return isinstance(distribution, Delta)


def check_convergence(converges: Tensor, reason: str) -> None:
    """Raise ``DivergentIntegralError`` with the reason and the failing elements unless all of ``converges`` hold."""
    if not bool(converges.all()):
        failing = torch.nonzero(~converges).tolist()
        shown = ", ".join(str(tuple(index)) for index in failing[:5]) + (", ..." if len(failing) > 5 else "")
        where = f"at {len(failing)} of {converges.numel()} elements, {shown}" if converges.dim() else "here"
        raise DivergentIntegralError(
            f"there is no reduced posterior {where}: {reason}, so posterior * reduced prior / prior does not integrate "
            "and the evidence change is +inf; choose a reduced prior that is nowhere heavier-tailed than the prior"
        )


def _merge_event_dims(reduced_prior: Distribution) -> Distribution:
    """Return an ``Independent`` point mass as the point mass with more event dimensions that it is."""
    base = reduced_prior.base_dist if isinstance(reduced_prior, Independent) else None
    if not isinstance(base, Delta):
        return reduced_prior
    event_dim = len(reduced_prior.event_shape)
    return Delta(base.v, _sum_rightmost(base.log_density, event_dim - base.event_dim), event_dim=event_dim)


def _unwrap(posterior: Any, *others: Any) -> tuple[Distribution, ...]:
    dims = posterior.reinterpreted_batch_ndims
    for other in others:
        if not isinstance(other, Independent) or other.reinterpreted_batch_ndims != dims:
            raise ValueError(
                f"posterior, prior and reduced prior need the same event dimensions, but the posterior reinterprets "
                f"{dims} and {other} does not; call .to_event({dims}) on it"
            )
    return (posterior.base_dist, *(other.base_dist for other in others))
