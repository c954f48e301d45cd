"""Principled structured pruning of neural networks, as a probabilistic program in Pyro.

Noise on a structure is a Pyro sample site; a reduced prior is another distribution at that site; Bayesian model
reduction compares the two in closed form from the guide's parameters; what the evidence does not support is removed.
"""

from typing import TYPE_CHECKING, Any

from pyro_bmrs._version import __version__ as __version__
from pyro_bmrs.bmr import (
    UnreliableEvidenceWarning,
    estimate_evidence_change,
    evidence_change,
    greedy_search,
    precision_window,
    reduce,
    reduced_posterior,
    register_evidence_change,
    register_exponential_family,
    register_reduced_posterior,
    spike,
)
from pyro_bmrs.criteria import (
    BMRS_N,
    BMRS_U,
    SNR,
    Criterion,
    EvidenceCriterion,
    GradientWeightNorm,
    PosteriorMean,
    PruningContext,
    Random,
    WeightNorm,
)
from pyro_bmrs.distributions import LogUniform, TruncatedLogNormal
from pyro_bmrs.inspection.evaluation import PredictiveEvaluation, evaluate
from pyro_bmrs.inspection.evidence import evidence_changes
from pyro_bmrs.inspection.inference_data import to_arviz
from pyro_bmrs.inspection.program_data import guide_to_arviz
from pyro_bmrs.inspection.trajectories import Trajectories
from pyro_bmrs.io.networks import load, save
from pyro_bmrs.model.attach import attach_noise
from pyro_bmrs.model.guides.beta import BetaGuide
from pyro_bmrs.model.guides.flat import FlatGuide
from pyro_bmrs.model.guides.truncated_log_normal import TruncatedLogNormalGuide
from pyro_bmrs.model.network import NoisyNetwork
from pyro_bmrs.model.noise import MultiplicativeNoise
from pyro_bmrs.model.prediction import predict
from pyro_bmrs.model.sampling import sampled_noise
from pyro_bmrs.pipeline.prune import Pruned, prune
from pyro_bmrs.structures.any_guide import noise_posterior
from pyro_bmrs.structures.compact import compact
from pyro_bmrs.structures.cost import (
    cost_kl_weights,
    cost_log_odds,
    count_flops,
    count_parameters,
    measure_latency,
)
from pyro_bmrs.structures.discovery import find_structures
from pyro_bmrs.structures.shrink import shrink
from pyro_bmrs.structures.structure_set import StructureSet
from pyro_bmrs.svi.callbacks import Callback, EnergyTracker
from pyro_bmrs.svi.elbo import MeanFieldELBO
from pyro_bmrs.svi.ensemble import EnsembleMember, fit_ensemble
from pyro_bmrs.svi.fit import fit
from pyro_bmrs.svi.free_form import free_form_evidence
from pyro_bmrs.svi.free_form_criterion import FreeFormCriterion
from pyro_bmrs.svi.pruning import Continuous, PostTraining, ToSize
from pyro_bmrs.svi.result import FitResult, FitWarning
from pyro_bmrs.svi.settings import FitSettings
from pyro_bmrs.svi.training_gradients import TrainingGradients

if TYPE_CHECKING:
    from pyro_bmrs.inspection.layer_plots import plot_network, plot_ridge, plot_trajectories
    from pyro_bmrs.inspection.plots import (
        plot_evidence,
        plot_evidence_snr,
        plot_forest,
        plot_forests,
        plot_history,
        plot_reduction,
    )
    from pyro_bmrs.inspection.reliability import plot_reliability

__all__ = [
    "BMRS_N",
    "BMRS_U",
    "SNR",
    "BetaGuide",
    "Callback",
    "Continuous",
    "Criterion",
    "EnergyTracker",
    "EnsembleMember",
    "EvidenceCriterion",
    "FitResult",
    "FitSettings",
    "FitWarning",
    "FlatGuide",
    "FreeFormCriterion",
    "GradientWeightNorm",
    "LogUniform",
    "MeanFieldELBO",
    "MultiplicativeNoise",
    "NoisyNetwork",
    "PostTraining",
    "PosteriorMean",
    "PredictiveEvaluation",
    "Pruned",
    "PruningContext",
    "Random",
    "StructureSet",
    "ToSize",
    "TrainingGradients",
    "Trajectories",
    "TruncatedLogNormal",
    "TruncatedLogNormalGuide",
    "UnreliableEvidenceWarning",
    "WeightNorm",
    "attach_noise",
    "compact",
    "cost_kl_weights",
    "cost_log_odds",
    "count_flops",
    "count_parameters",
    "estimate_evidence_change",
    "evaluate",
    "evidence_change",
    "evidence_changes",
    "find_structures",
    "fit",
    "fit_ensemble",
    "free_form_evidence",
    "greedy_search",
    "guide_to_arviz",
    "load",
    "measure_latency",
    "noise_posterior",
    "plot_evidence",
    "plot_evidence_snr",
    "plot_forest",
    "plot_forests",
    "plot_history",
    "plot_network",
    "plot_reduction",
    "plot_reliability",
    "plot_ridge",
    "plot_trajectories",
    "precision_window",
    "predict",
    "prune",
    "reduce",
    "reduced_posterior",
    "register_evidence_change",
    "register_exponential_family",
    "register_reduced_posterior",
    "sampled_noise",
    "save",
    "shrink",
    "spike",
    "to_arviz",
]


def __dir__() -> list[str]:
    return [*__all__, "__version__"]


def __getattr__(name: str) -> Any:
    """Import the plots, and Matplotlib with them, once they are asked for."""
    if name.startswith("plot_") and name in __all__:
        from pyro_bmrs.inspection import layer_plots, plots, reliability  # noqa: PLC0415  (Matplotlib)

        module = next(each for each in (plots, layer_plots, reliability) if name in each.__all__)
        globals()[name] = getattr(module, name)
        return globals()[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
