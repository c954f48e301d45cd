"""Bad numbers: what is at fault where a loss or a parameter is not finite, and since when."""

from contextlib import ExitStack

import torch
from torch import Tensor, nn

from pyro_bmrs.model.guides.flat import FlatGuide
from pyro_bmrs.model.network import NoisyNetwork
from pyro_bmrs.structures.inputs import Inputs

__all__ = ["check_finite", "check_parameters", "loss_error"]

_TURN = "Lower lr or posterior_lr"


def check_finite(model: NoisyNetwork, guide: FlatGuide) -> None:
    """Raise ``ValueError`` if a parameter is not finite before a fit, naming it."""
    if culprits := _non_finite_tensors(model, guide):
        raise ValueError(f"a fit cannot begin: {_list(culprits)}; make model and guide anew, or load them")


def check_parameters(model: NoisyNetwork, guide: FlatGuide, step: int) -> None:
    """Raise ``FloatingPointError`` if a parameter is not finite after ``step``, naming it."""
    if culprits := _non_finite_tensors(model, guide):
        raise FloatingPointError(f"a parameter stopped being finite by step {step}: {_list(culprits)}. {_TURN}")


def loss_error(model: NoisyNetwork, guide: FlatGuide, x: Inputs, step: int, loss: float) -> FloatingPointError:
    """Return the error to raise where the loss of ``step`` is not finite.

    Args:
        model: The model, as the step before has left it (on a GPU, where losses are looked at late, or a later one).
        guide: Its guide.
        x: Inputs of the network, to see where its activations overflow.
        step: The step.
        loss: Its loss.
    """
    culprits = _non_finite_tensors(model, guide)
    if not culprits:
        turn = _TURN if step else "No step has been taken yet: look at the data and the network"
        where = _first_non_finite_input(model, guide, x)
        return FloatingPointError(f"the loss became {loss} at step {step}: {where}. {turn}")
    if guide.device.type == "cuda":
        return FloatingPointError(f"the loss became {loss} at step {step}: {_list(culprits)}. {_TURN}")
    return FloatingPointError(f"the gradient stopped being finite at step {step - 1}: {_list(culprits)}. {_TURN}")


def _non_finite_tensors(model: NoisyNetwork, guide: FlatGuide) -> list[str]:
    named: dict[str, Tensor] = {f"weight {name!r}": p for name, p in model.net.named_parameters()}
    for name, flat in guide.named_parameters():
        named.update({f"posterior {name} of site {site!r}": part for site, part in guide.split(flat).items()})
    if guide.latents is not None:
        others = guide.latents.module.named_parameters()
        named.update({f"{name!r} of the guide of other latent sites": p for name, p in others})
    return [name for name, tensor in named.items() if not bool(torch.isfinite(tensor).all())]


@torch.no_grad()
def _first_non_finite_input(model: NoisyNetwork, guide: FlatGuide, x: Inputs) -> str:
    """Return the noise site at whose input the network's activations first overflow."""
    found: list[str] = []
    with ExitStack() as hooks:
        for site, layer in model.noise.items():

            def check(_: nn.Module, inputs: tuple[Tensor, ...], site: str = site) -> None:
                if not bool(torch.isfinite(inputs[0]).all()):
                    found.append(site)

            hooks.callback(layer.register_forward_pre_hook(check).remove)
        model.run(x, guide.points())
    return f"the input of site {found[0]!r} is not finite" if found else "the likelihood itself is not finite"


def _list(culprits: list[str]) -> str:
    more = f" and {len(culprits) - 3} more" if len(culprits) > 3 else ""
    return f"{', '.join(culprits[:3])}{more} {'is' if len(culprits) == 1 else 'are'} not finite"
