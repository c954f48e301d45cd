r"""Evidence criteria by name, which differ in nothing but the prior log-odds of a structure being absent.

- ``bmrs_n``: 0, the paper's rule as printed (eq. 8): absent and present are equally likely beforehand.
- ``bmrs_n_reference``: :math:`\frac12 \log 2\pi`, about 0.919. The paper's reference code leaves the term
  :math:`-\frac12 \log 2\pi` of eq. 8 out, so its :math:`\Delta F` is that much too large everywhere: in effect these
  odds. Use it to reproduce the published numbers.
- ``bmrs_n_substantial``: :math:`\log 3`. Removes whatever lacks positive evidence in its favour on the scale of Kass
  and Raftery (1995), where a Bayes factor below 3 is not worth more than a bare mention. Our own recipe's default.
"""

import math

from torch import nn

from pyro_bmrs.checks import check_integer, check_module
from pyro_bmrs.criteria import BMRS_N
from pyro_bmrs.model.noise import noise_layers

__all__ = ["bmrs_n", "bmrs_n_reference", "bmrs_n_substantial", "reference_kl_weights"]

bmrs_n = BMRS_N()
bmrs_n_reference = BMRS_N(prior_log_odds=0.5 * math.log(2 * math.pi))
bmrs_n_substantial = BMRS_N(prior_log_odds=math.log(3))


def reference_kl_weights(net: nn.Module, num_data: int) -> dict[str, float]:
    r"""Return the weights of each site's KL that the paper's reference code has, for ``NoisyNetwork(kl_weight=...)``.

    Its loss is the mean cross-entropy plus the mean over layers of the mean KL over a layer's structures. Against the
    exact ELBO, mean cross-entropy plus the sum of all KL over the number of examples N, a layer of n structures among
    L layers is weighted :math:`N / (L n)` times.

    Args:
        net: Network with noise layers.
        num_data: Number of training examples N.
    """
    check_module("net", net)
    check_integer("num_data", num_data, low=1, what="the number of training examples")
    layers = noise_layers(net)
    return {site: num_data / (len(layers) * layer.size) for site, layer in layers.items()}
