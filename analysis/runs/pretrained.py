"""The networks of the paper's second table, from transformers: trained before they are pruned.

Their weights come from a folder, as ``save_pretrained`` writes it, where there is one; a copy that is small enough for
a CPU is trained here first, without noise.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import pyro_bmrs as bmrs
from analysis.data.sets import Split
from analysis.runs.config import Placement, Pretrained, RunConfig, select_config
from analysis.runs.dense import train_dense
from analysis.runs.execution import Execution, run_lock
from pyro_bmrs.structures.inputs import to_input

__all__ = ["Logits", "architecture", "trained", "with_noise"]

_SMALL_IMAGES = 64  # pixels: below, strides and patches are those that such images call for
_LR = 1e-3  # of the training before


class Logits(nn.Module):
    """Returns only the logits of what a classifier of transformers returns; grey images become coloured ones.

    Args:
        model: The classifier.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.model(x.expand(-1, 3, -1, -1)).logits
        return logits


def architecture(net: Pretrained, image_size: int, classes: int) -> Logits:
    """Return a network with random weights, drawn from the global random state."""
    return Logits((_resnet if net.network.startswith("resnet") else _vit)(net, image_size, classes))


def _resnet(net: Pretrained, image_size: int, classes: int) -> nn.Module:
    from transformers import ResNetConfig, ResNetForImageClassification  # noqa: PLC0415  (slow)

    basic = net.network == "resnet18"
    first = net.hidden or (64 if basic else 256)
    stem = min(first, 64)
    found: Any = ResNetForImageClassification(
        ResNetConfig(
            embedding_size=stem,
            hidden_sizes=[first, 2 * first, 4 * first, 8 * first],
            depths=[2, 2, 2, 2] if basic else [3, 4, 6, 3],
            layer_type="basic" if basic else "bottleneck",
            num_labels=classes,
        )
    )
    if image_size < _SMALL_IMAGES:
        embedder = found.resnet.embedder
        embedder.embedder.convolution = nn.Conv2d(3, stem, 3, 2, padding=1, bias=False)
        embedder.pooler = nn.Identity()
    return found


def _vit(net: Pretrained, image_size: int, classes: int) -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification  # noqa: PLC0415  (slow)

    width = net.hidden or (384 if net.network == "vit_s" else 768)
    found: nn.Module = ViTForImageClassification(
        ViTConfig(
            hidden_size=width,
            num_hidden_layers=net.layers or 12,
            num_attention_heads=width // 64 if width >= 192 else width // 16,
            intermediate_size=4 * width,
            image_size=image_size,
            patch_size=4 if image_size < _SMALL_IMAGES else 16,
            num_labels=classes,
        )
    )
    return found


def trained(config: RunConfig, execution: Execution, split: Split, classes: int) -> Logits:
    """Return a network with the weights that it has before it is pruned, the same ones for every seed and method.

    Raises:
        FileNotFoundError: If they should come from a folder, and there is none.
    """
    assert isinstance(config.net, Pretrained), config.net
    if config.net.pretrain_epochs == 0:
        return Logits(_from_folder(config.network, execution, classes))
    before = _pretraining(config, config.net.pretrain_epochs)
    torch.manual_seed(before.seed)
    net = architecture(config.net, before.image_size, classes).to(split.train[0].device)
    with execution.first_alone(), run_lock(before, execution) as folder:
        rates = (before.epochs, before.batch_size, before.lr, before.seed)
        train_dense(net, split.train, *rates, validation=split.validation, folder=folder)
    return net


def _from_folder(network: str, execution: Execution, classes: int) -> nn.Module:
    import transformers  # noqa: PLC0415  (slow)

    folder = None if execution.weights is None else Path(execution.weights) / network
    if folder is None or not (folder / "config.json").is_file():
        raise FileNotFoundError(
            f"pretrained weights of {network} should be in {folder or 'a folder'}, as save_pretrained writes "
            "them: give --weights-dir, the folder above, or --pretrain-epochs to train them here"
        )
    return transformers.AutoModelForImageClassification.from_pretrained(
        folder, num_labels=classes, ignore_mismatched_sizes=True, local_files_only=True
    )


def _pretraining(config: RunConfig, epochs: int) -> RunConfig:
    """Return what names the training before, which all runs of one network share."""
    own = {"method": "pretraining", "recipe": "ours", "seed": 0, "epochs": epochs, "lr": _LR, "decay": True}
    return select_config({**config.all_settings, **own, "best_of": 0})


def with_noise(net: nn.Module, placement: Placement, log_high: float, images: Tensor) -> nn.Module:
    """Return a network with noise there, and a prior with that upper bound."""
    example = to_input(images[:2]).to(next(net.parameters()).device)
    if placement == "readers":
        structures = bmrs.find_structures(net, example)
    else:
        structures = bmrs.find_structures(net, example, outputs=_outputs(net)).select(kinds="output")
    return bmrs.attach_noise(net, structures, bmrs.LogUniform(-20.0, log_high) if log_high else None)


def _outputs(net: nn.Module) -> list[str]:
    """Return where the paper's noise stands: behind every batch norm, or on a ViT block's two output projections."""
    norms = [name for name, module in net.named_modules() if isinstance(module, nn.BatchNorm2d)]
    blocks = [name for name, module in net.named_modules() if type(module).__name__ == "ViTLayer"]
    if norms:
        return norms
    found = []
    for block in blocks:
        linear = [name for name, each in net.get_submodule(block).named_modules() if isinstance(each, nn.Linear)]
        found += [f"{block}.{name}" for name in linear if _is_output(name)]
    return found


def _is_output(name: str) -> bool:
    return any(name.endswith(end) for end in ("attention.output.dense", "o_proj", "output.dense", "fc2"))
