"""From a network and data to a smaller network, in one call."""

from pyro_bmrs.pipeline.prune import Pruned, prune

__all__ = ["Pruned", "prune"]
