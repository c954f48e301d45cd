"""The Hugging Face Trainer: python -m analysis.examples.hugging_face (extra hf, and accelerate)."""

import tempfile
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments, ViTConfig, ViTForImageClassification

import pyro_bmrs as bmrs
from analysis.data.sets import digits
from analysis.examples.plain_loop import compacted, report

__all__ = ["Images", "NoisyTrainer", "main"]


class Images(Dataset[dict[str, Tensor]]):
    """Images and labels by the names that transformers gives them."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x, self.y = x, y

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {"pixel_values": self.x[i], "labels": self.y[i]}


class NoisyTrainer(Trainer):
    """A Trainer whose loss is the negative ELBO of an example: the model's own loss under noise, and the KL.

    Args:
        noisy: The Pyro model around the network that is trained.
        guide: Its guide.
        arguments: As for ``Trainer``.
    """

    def __init__(self, noisy: bmrs.NoisyNetwork, guide: bmrs.TruncatedLogNormalGuide, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.noisy, self.guide = noisy, guide

    def compute_loss(self, model: nn.Module, inputs: dict[str, Tensor], *_: Any, **__: Any) -> Tensor:
        """Return the loss of a batch."""
        self.guide.project_()
        with bmrs.sampled_noise(self.noisy, self.guide, examples=len(inputs["labels"])):
            loss = model(**inputs).loss
        warm_up = min(4 * (self.state.global_step + 1) / self.state.max_steps, 1.0)
        return loss + warm_up * self.guide.kl() / len(self.train_dataset)


def main(epochs: int = 15) -> nn.Module:
    """Prune a small vision transformer on the digits and return the smaller one."""
    torch.manual_seed(0)
    split = digits(16)
    config = ViTConfig(
        image_size=16, patch_size=4, num_channels=1, hidden_size=48, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_labels=10,
    )  # fmt: skip
    net = ViTForImageClassification(config)
    x, y = split.train
    example = {"pixel_values": x[:8]}
    structures = bmrs.find_structures(net, example)
    model = bmrs.NoisyNetwork(bmrs.attach_noise(net, structures), num_data=len(x))
    guide = bmrs.TruncatedLogNormalGuide(model)
    groups = [{"params": net.parameters(), "lr": 2e-3}, {"params": guide.parameters(), "lr": 0.1}]
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, num_train_epochs=epochs, per_device_train_batch_size=64, lr_scheduler_type="cosine", use_cpu=True,
            save_strategy="no", report_to=[], logging_strategy="epoch", dataloader_pin_memory=False,
        )  # fmt: skip
        trainer = NoisyTrainer(
            model, guide, model=net, args=arguments, train_dataset=Images(x, y),
            optimizers=(torch.optim.Adam(groups), None),
        )  # fmt: skip
        trainer.train()
    small = compacted(model, guide, example)
    report(net, small, small(pixel_values=split.test[0]).logits, split.test[1])
    return small


if __name__ == "__main__":
    main()
