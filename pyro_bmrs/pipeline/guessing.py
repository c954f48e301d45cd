"""The likelihood that observations call for, where there is only one; otherwise an error with the lines to write."""

from functools import partial
from typing import Any

from pyro.distributions import Categorical, TorchDistribution
from torch import Tensor

from pyro_bmrs.checks import described
from pyro_bmrs.model.network import Likelihood, categorical

__all__ = ["after", "guessed"]

_NORMAL = "likelihood=lambda out: pyro.distributions.Normal(out.squeeze(-1), 0.1)"
_BERNOULLI = "likelihood=lambda out: pyro.distributions.Bernoulli(logits=out)"


def guessed(output: Any, y: Tensor) -> Likelihood:
    """Return the likelihood of class labels, of one or of a sequence for each example.

    Args:
        output: What the network returns for a few examples.
        y: Their observations.

    Raises:
        TypeError: If the output is no tensor, or observations are not integers.
        ValueError: If their shapes do not say where the classes are.
    """
    if not isinstance(output, Tensor):
        names = [name for name in ("logits", "prediction_logits") if hasattr(output, name)]
        hint = f"output=lambda out: out.{names[0]}" if names else "output=lambda out: out[0]"
        raise TypeError(f"the network returns {described(output)}: say which part of it to use, for instance {hint}")
    if y.is_floating_point() or y.is_complex():
        kind = f"observations are numbers ({y.dtype}, of shape {tuple(y.shape)} for outputs of {tuple(output.shape)})"
        more = "" if y.dim() == 1 else " (for several an example, with .to_event(1) behind it)"
        raise TypeError(
            f"{kind}, so prune needs their distribution: for a regression, with its noise in the "
            f"place of 0.1, {_NORMAL}; for labels of 0 and 1, {_BERNOULLI}{more}"
        )
    if output.dim() == y.dim() == 1 or output.shape[1:] in {(1,), ()}:
        raise ValueError(
            f"the network has one output per example, so its labels are 0 and 1: use {_BERNOULLI[:-1]}.squeeze(-1)) "
            "with observations .float()"
        )
    if y.dim() == 1 and output.dim() == 2:
        return categorical
    if y.dim() > 1 and output.shape[:-1] == y.shape:
        return partial(_of_positions, y.dim() - 1)
    images = (
        "for images of labels, with the classes in dimension 1, use likelihood=lambda out: "
        "pyro.distributions.Categorical(logits=out.movedim(1, -1)).to_event(2)"
    )
    columns = "for one label per example give labels of shape (n,): y.squeeze(1), or y.argmax(1) of one-hot rows"
    raise ValueError(
        f"the network's outputs are of shape {tuple(output.shape)} for observations of {tuple(y.shape)}, which leaves "
        f"open where the classes are: {columns if output.dim() == y.dim() == 2 else images}"
    )


def after(output: Any, likelihood: Likelihood, result: Any) -> TorchDistribution:
    """Return the likelihood of what ``output`` takes out of a network's result."""
    return likelihood(output(result))


def _of_positions(dimensions: int, logits: Tensor) -> TorchDistribution:
    return Categorical(logits=logits).to_event(dimensions)
