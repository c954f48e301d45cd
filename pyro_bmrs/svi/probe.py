"""What a network and its likelihood compute for a few rows: two that compute otherwise are not the same."""

import torch
from torch import Tensor

from pyro_bmrs.eval_mode import evaluating
from pyro_bmrs.model.guides.flat import FlatGuide
from pyro_bmrs.model.network import NoisyNetwork
from pyro_bmrs.structures.copying import undisturbed
from pyro_bmrs.structures.equality import difference
from pyro_bmrs.structures.inputs import Inputs, first_examples, on_device, output_tensors

__all__ = ["check_probe", "probe", "probed"]

_ROWS = 2
_TOLERANCE = 1e-3  # of the outputs' spread: rounding of another device, and no other activation


def probed(batch: tuple[Inputs, Tensor]) -> tuple[Inputs, Tensor]:
    """Return the rows of a batch that a network is probed with."""
    return first_examples(batch[0], _ROWS), batch[1][:_ROWS]


@torch.no_grad()
def probe(model: NoisyNetwork, guide: FlatGuide, rows: tuple[Inputs, Tensor]) -> dict[str, Tensor]:
    """Return the network's outputs for a few rows, and how likely the model finds their observations."""
    x, y = on_device(rows[0], guide.device, model.net), rows[1].to(guide.device)
    with undisturbed(model.net), evaluating(model):
        torch.manual_seed(0)  # for networks that draw random numbers even in eval mode
        output = model.run(x, guide.points())
        log_prob = model.likelihood(output).log_prob(y)
    outputs = {f"output.{i}": each.contiguous() for i, each in enumerate(output_tensors(output))}
    return {**outputs, "log_prob": log_prob}


def check_probe(now: dict[str, Tensor], then: dict[str, Tensor]) -> None:
    """Raise ``ValueError`` unless two probes are the same up to rounding."""
    then = {name: tensor.to(now["log_prob"].device) for name, tensor in then.items()}
    outputs = [name for name in now if name != "log_prob"]
    same_names = now.keys() == then.keys()
    if not (same_names and difference([now[n] for n in outputs], [then[n] for n in outputs]) <= _TOLERANCE):
        raise ValueError("the network computes something else than the one that it was written for")
    if not difference(now["log_prob"], then["log_prob"]) <= _TOLERANCE:
        raise ValueError("the likelihood is another than the one that it was written for")
