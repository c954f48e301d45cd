"""Noise switched on around a forward pass of the caller's own."""

from collections.abc import Iterator
from contextlib import contextmanager

from pyro_bmrs.checks import check_integer
from pyro_bmrs.model.guides.flat import FlatGuide
from pyro_bmrs.model.network import NoisyNetwork
from pyro_bmrs.model.supply import supply_noise
from pyro_bmrs.structures.copying import no_fast_path
from pyro_bmrs.structures.pair import check_pair

__all__ = ["sampled_noise"]


@contextmanager
def sampled_noise(model: NoisyNetwork, guide: FlatGuide, examples: int | None = None) -> Iterator[None]:
    """Have the network inside ``model`` run with noise drawn from the posterior, however it is called.

    For training loops of one's own, with any loss: add ``guide.kl() / n`` to a mean loss over ``n`` training examples
    that is a negative log likelihood, and the sum is the negative ELBO of an example.

    Args:
        model: The model, whose ``net`` is run inside.
        guide: Its guide.
        examples: Number of examples in the batch, which then share draws as ``guide.draw_shared`` has it: gradients are
            far less noisy. By default all share one draw.

    Raises:
        TypeError, ValueError: If the guide is another model's or has other latent sites, or ``examples`` is not
            positive.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), bmrs.MultiplicativeNoise(8), nn.Linear(8, 3))
        >>> model = bmrs.NoisyNetwork(net, num_data=100)
        >>> guide = bmrs.TruncatedLogNormalGuide(model)
        >>> with bmrs.sampled_noise(model, guide, examples=5):
        ...     loss = net(torch.randn(5, 4)).square().mean()
        >>> (loss + guide.kl() / 100).backward()
    """
    check_pair(model, guide)
    if guide.latents is not None:
        raise ValueError(
            "sampled_noise switches on noise alone, but the guide has other latent sites: use MeanFieldELBO"
        )
    if examples is not None:
        check_integer("examples", examples, low=1)
    noise = guide.draw() if examples is None else guide.draw_shared(examples)
    with supply_noise(model.noise, noise), no_fast_path():
        yield
