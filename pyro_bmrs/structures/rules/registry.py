"""From the name of an operation to what it does to labels."""

from collections.abc import Callable

from pyro_bmrs.structures.tracer import Call, Tracer

__all__ = ["RULES", "Rule", "rule"]

Rule = Callable[[Tracer, Call], None]

RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Return a decorator that makes a function the rule of the operations called ``names``."""

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, function))
        return function

    return register
