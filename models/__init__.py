"""The paper's networks: plain nn.Modules with their noise placed."""

from models.lenet import lenet5
from models.mlp import mlp

__all__ = ["lenet5", "mlp"]
