"""A picture of how far predicted probabilities can be trusted."""

from matplotlib.axes import Axes

from pyro_bmrs.checks import described
from pyro_bmrs.inspection.drawing import KEPT, NEUTRAL, axes_of
from pyro_bmrs.inspection.evaluation import PredictiveScores

__all__ = ["plot_reliability"]


def plot_reliability(scores: PredictiveScores, ax: Axes | None = None) -> Axes:
    """Draw how often predicted labels are right against how probable they were: on the diagonal if calibrated.

    Args:
        scores: Of ``evaluate``: ``at_mean`` or ``over_draws``.
        ax: Axes to draw on; new ones by default.

    Raises:
        TypeError: If ``scores`` is something else, or ``ax`` no axes.
        ValueError: If the observations are not labels.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), bmrs.MultiplicativeNoise(8), nn.Linear(8, 3))
        >>> model = bmrs.NoisyNetwork(net)
        >>> guide = bmrs.TruncatedLogNormalGuide(model)
        >>> data = torch.randn(32, 4), torch.arange(32) % 3
        >>> ax = bmrs.plot_reliability(bmrs.evaluate(model, guide, data).at_mean)
        >>> ax.get_ylabel() != ""
        True
    """
    if not isinstance(scores, PredictiveScores):
        raise TypeError(f"scores must be those of evaluate, .at_mean or .over_draws, but got {described(scores)}")
    found = scores.reliability
    if found is None or scores.ece is None:
        raise ValueError("scores have no reliability, since the observations are not labels")
    ax = axes_of(ax, figsize=(4.5, 4.5))
    known = found.labels > 0
    sizes = 20 + 180 * (found.labels[known] / found.labels.max()).sqrt()
    ax.plot([0, 1], [0, 1], color=NEUTRAL, linestyle=":", linewidth=1)
    ax.plot(found.confidence[known], found.accuracy[known], color=KEPT, linewidth=1)
    ax.scatter(found.confidence[known], found.accuracy[known], color=KEPT, s=sizes, alpha=0.6)
    ax.set_xlim(0, 1.03)
    ax.set_ylim(0, 1.03)
    ax.set_xlabel("probability of the predicted label")
    ax.set_ylabel("fraction of these that is right")
    ax.set_title(f"calibration error {100 * scores.ece:.1f} %; larger dots, more labels", loc="right", fontsize=10)
    return ax
