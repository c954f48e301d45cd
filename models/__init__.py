"""The paper's networks: plain nn.Modules with their noise placed."""

from models.lenet import lenet5, lenet5_caffe
from models.mlp import mlp
from models.resnet import resnet

__all__ = ["lenet5", "lenet5_caffe", "mlp", "resnet"]
