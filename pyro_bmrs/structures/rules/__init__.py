"""What each operation does to labels, one file per kind of operation; one without a rule freezes what it touches."""

from pyro_bmrs.structures.rules import elementwise, moving, products, statistics
from pyro_bmrs.structures.rules.registry import RULES, rule

__all__ = ["RULES", "elementwise", "moving", "products", "rule", "statistics"]
