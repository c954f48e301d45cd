"""One run: what it measured, the folder that keeps it, and the table a person reads."""

import math
import os
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import torch
from torch import nn

import pyro_bmrs as bmrs
from analysis.data.sets import Split
from analysis.runs.dense import accuracy, outputs
from pyro_bmrs.io.files import write_json
from pyro_bmrs.pipeline.tables import cost_table, structure_table
from pyro_bmrs.structures.inputs import to_input
from pyro_bmrs.svi.free_form import FreeFormEvidence

__all__ = ["compare", "draw_figures", "evaluate", "format_table", "save_run", "short_history"]

_LATENCY_BATCH = 128


def evaluate(
    dense: nn.Module,
    model: bmrs.NoisyNetwork,
    guide: bmrs.FlatGuide,
    pruned: nn.Module,
    masks: dict[str, torch.Tensor],
    split: Split,
) -> dict[str, Any]:
    """Return what pruning has reached: ``compare``, the masked network's accuracy, and what ``masks`` keep."""
    x_test, y_test = (part.to(guide.device) for part in split.test)
    masked_logits = bmrs.predict(model, guide, x_test)
    return {
        **compare(dense, pruned, split),
        "accuracy_test_masked": accuracy(masked_logits, y_test),
        "surgery_max_abs_error": (outputs(pruned, x_test) - masked_logits).abs().max().item(),
        "structures": {site.removesuffix(".theta"): len(mask) for site, mask in masks.items()},
        "kept": {site.removesuffix(".theta"): int(mask.sum()) for site, mask in masks.items()},
    }


def compare(dense: nn.Module, pruned: nn.Module, split: Split) -> dict[str, Any]:
    """Return the costs of two networks on one device, the accuracies of the second, and on what they were measured."""
    device = next(pruned.parameters()).device
    (x_val, y_val), (x_test, y_test) = ((x.to(device), y.to(device)) for x, y in (split.validation, split.test))
    batch = to_input(x_test[:_LATENCY_BATCH])
    dense_seconds, pruned_seconds = bmrs.measure_latency([dense.eval(), pruned.eval()], batch)
    params_dense, params_pruned = bmrs.count_parameters(dense), bmrs.count_parameters(pruned)
    return {
        "params_dense": params_dense,
        "params_pruned": params_pruned,
        "compression": 1 - params_pruned / params_dense,
        "flops_dense": bmrs.count_flops(dense, batch[:1]),
        "flops_pruned": bmrs.count_flops(pruned, batch[:1]),
        "accuracy_validation": accuracy(outputs(pruned, x_val), y_val),
        "accuracy_test": accuracy(outputs(pruned, x_test), y_test),
        "latency_dense_ms": 1e3 * dense_seconds,
        "latency_pruned_ms": 1e3 * pruned_seconds,
        "latency_batch": len(batch),
        "device": _device_name(device),
        "threads": torch.get_num_threads(),
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "pyro-ppl", "pyro-bmrs", "numpy", "arviz", "torch-pruning")},
        },
    }


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return f"cuda: {torch.cuda.get_device_name(device)}"
    return f"{device.type}: {platform.machine()}, {os.cpu_count()} cores"


def short_history(history: Sequence[Mapping[str, Any]]) -> dict[str, list[float]]:
    """Return what of a training's epochs is kept with its results."""
    return {key: [round(record[key], 5) for record in history] for key in ("compression", "accuracy_validation")}


def save_run(
    folder: Path,
    results: dict[str, Any],
    model: bmrs.NoisyNetwork,
    guide: bmrs.TruncatedLogNormalGuide,
    pruned: nn.Module,
    free_form: FreeFormEvidence | None = None,
) -> None:
    """Write results, posterior, checkpoint and the pruned network into the run folder, the results last."""
    bmrs.save(model, folder / "checkpoint" / "model")
    bmrs.save(guide, folder / "checkpoint" / "guide")
    bmrs.save(pruned, folder / "pruned")
    bmrs.to_arviz(guide, free_form=free_form).to_netcdf(folder / "posterior.nc", engine="h5netcdf")
    write_json(folder / "results.json", results)


def draw_figures(
    folder: Path,
    model: bmrs.NoisyNetwork,
    guide: bmrs.TruncatedLogNormalGuide,
    history: list[dict[str, Any]],
    prior_log_odds: float,
    dense: float | None = None,
    free_form: FreeFormEvidence | None = None,
) -> list[Path]:
    """Draw the six figures of a run into ``folder/figures`` and return their paths.

    ``dense`` is the dense network's validation accuracy.
    """
    mpl.use("Agg")
    delta_f = bmrs.evidence_changes(guide)
    masks = {site: layer.original_keep for site, layer in model.noise.items()}
    posteriors = guide.posterior().items()
    snr = {site: model.noise[site].in_original(posterior.snr.detach(), math.nan) for site, posterior in posteriors}
    figures = {
        "reduction": lambda: _draw_reductions(model, guide, delta_f, masks),
        "forest": lambda: bmrs.plot_forest(guide),
        "evidence": lambda: bmrs.plot_evidence(delta_f, masks, prior_log_odds, free_form=free_form),
        "network": lambda: bmrs.plot_network(delta_f, masks, free_form=free_form),
        "evidence_snr": lambda: bmrs.plot_evidence_snr(delta_f, snr, prior_log_odds, masks=masks),
        "history": lambda: bmrs.plot_history(history, dense=dense),
    }
    paths = []
    for name, draw in figures.items():
        paths.append(folder / "figures" / f"{name}.png")
        figure: Any = draw().figure
        figure.savefig(paths[-1], dpi=150)
        plt.close(figure)
    return paths


def _draw_reductions(
    model: bmrs.NoisyNetwork,
    guide: bmrs.TruncatedLogNormalGuide,
    delta_f: dict[str, torch.Tensor],
    masks: dict[str, torch.Tensor],
) -> Any:
    """Draw the structure that is most clearly removed beside one that is clearly kept, and return an axes of these."""
    present = {site: layer.index for site, layer in model.noise.items()}
    known = [
        (float(delta_f[site][i]), site, int(i), bool(masks[site][i]))
        for site in delta_f
        for i in present[site].tolist()
    ]
    chosen = [max(pruned) for pruned in [[each for each in known if not each[3]]] if pruned]
    kept = sorted(each for each in known if each[3])
    chosen += kept[len(kept) // 2 : len(kept) // 2 + 1]
    _, axes = plt.subplots(1, len(chosen), figsize=(5.5 * len(chosen), 4), layout="constrained", squeeze=False)
    for ax, (_, site, original, is_kept) in zip(axes[0], chosen, strict=True):
        index = present[site].tolist().index(original)
        posterior, prior = guide.posterior()[site], guide.prior()[site]
        q = bmrs.TruncatedLogNormal(*(getattr(posterior, name)[index].detach() for name in posterior.arg_constraints))
        p = bmrs.LogUniform(prior.log_low[index], prior.log_high[index])
        layer = site.removesuffix(".theta").removesuffix("_noise")
        bmrs.plot_reduction(
            q, p, bmrs.spike(p), ax, f"{layer}, structure {original}: {'kept' if is_kept else 'removed'}"
        )
    return axes[0][0]


def format_table(results: dict[str, Any]) -> str:
    """Return the tables that end a run."""
    sizes, kept = (
        {layer.removesuffix("_noise"): count for layer, count in results[key].items()} for key in ("structures", "kept")
    )
    latency = results["latency_dense_ms"], results["latency_pruned_ms"]
    accuracies = 100 * results["accuracy_test_dense"], 100 * results["accuracy_test"]
    rows = [
        ("parameters", results["params_dense"], results["params_pruned"], ",.0f", ""),
        ("FLOPs per image", results["flops_dense"], results["flops_pruned"], ",.0f", ""),
        (f"ms per batch of {results['latency_batch']}", *latency, ".2f", ""),
        ("test accuracy %", *accuracies, ".2f", results["accuracy_test_change"]),
    ]
    return f"{structure_table(sizes, kept)}\n\n{cost_table(rows)}"
