"""A Lightning module: python -m analysis.examples.lightning_module (extra log)."""

from typing import Any

import lightning
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import pyro_bmrs as bmrs
from analysis.data.sets import digits
from analysis.examples.plain_loop import compacted, mlp, report

__all__ = ["NoisyModule", "main"]


class NoisyModule(lightning.LightningModule):
    """Trains any network with noise on its structures.

    Args:
        net: The network.
        example: Inputs of a few examples.
        num_data: Number of training examples.
        warm_up: Number of epochs over which the KL's weight rises.
    """

    def __init__(self, net: nn.Module, example: Tensor, num_data: int, warm_up: int = 10) -> None:
        super().__init__()
        structures = bmrs.find_structures(net, example)
        self.model = bmrs.NoisyNetwork(bmrs.attach_noise(net, structures), num_data=num_data)
        self.guide = bmrs.TruncatedLogNormalGuide(self.model)
        self.elbo = bmrs.MeanFieldELBO()
        self.num_data, self.warm_up = num_data, warm_up

    def training_step(self, batch: list[Tensor], _: int) -> Tensor:
        """Return the negative ELBO of a batch, in nats per example."""
        self.model.kl_weight = min((self.current_epoch + 1) / self.warm_up, 1.0)
        loss = self.elbo.differentiable_loss(self.model, self.guide, *batch) / self.num_data
        self.log("loss", loss, prog_bar=True)
        return loss

    def on_train_batch_end(self, *_: Any) -> None:
        """Keep the posterior's parameters within their range."""
        self.guide.project_()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return Adam, with a faster rate for the posterior: its locations have to travel."""
        posterior = {"params": self.guide.parameters(), "lr": 0.1}
        return torch.optim.Adam([{"params": self.model.parameters(), "lr": 2e-3}, posterior])


def main(epochs: int = 40) -> nn.Module:
    """Prune a network on the digits and return the smaller one."""
    lightning.seed_everything(0)
    split = digits(8)
    net = mlp()
    x, y = split.train
    module = NoisyModule(net, x[:8], len(x), warm_up=max(epochs // 4, 1))
    trainer = lightning.Trainer(
        max_epochs=epochs, accelerator="cpu", logger=False, enable_checkpointing=False, enable_model_summary=False
    )
    trainer.fit(module, DataLoader(TensorDataset(x, y), batch_size=64, shuffle=True))
    small = compacted(module.model, module.guide, x[:8])
    report(net, small, small(split.test[0]), split.test[1])
    return small


if __name__ == "__main__":
    main()
