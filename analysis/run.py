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
from analysis.data import Split
from analysis.dense import accuracy, outputs
from pyro_bmrs.io.files import write_json
from pyro_bmrs.structures.inputs import to_input

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
    """Return what pruning has come to: ``compare``, the masked network's accuracy, and what ``masks`` keep."""
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
) -> None:
    """Write results, posterior, checkpoint and the pruned network into the run folder, the results last."""
    bmrs.save(model, folder / "checkpoint" / "model")
    bmrs.save(guide, folder / "checkpoint" / "guide")
    bmrs.save(pruned, folder / "pruned")
    bmrs.to_arviz(guide).to_netcdf(folder / "posterior.nc", engine="h5netcdf")
    write_json(folder / "results.json", results)


def draw_figures(
    folder: Path,
    model: bmrs.NoisyNetwork,
    guide: bmrs.TruncatedLogNormalGuide,
    history: list[dict[str, Any]],
    prior_log_odds: float,
) -> list[Path]:
    """Draw the five figures of a run into ``folder/figures`` and return their paths."""
    mpl.use("Agg")
    delta_f = bmrs.evidence_changes(guide)
    masks = {site: layer.original_keep for site, layer in model.noise.items()}
    posteriors = guide.posterior().items()
    snr = {site: model.noise[site].in_original(posterior.snr.detach(), math.nan) for site, posterior in posteriors}
    site, original = _closest_to_the_line(delta_f, prior_log_odds)
    index = model.noise[site].index.tolist().index(original)
    posterior, prior = guide.posterior()[site], guide.prior()[site]
    q = bmrs.TruncatedLogNormal(*(getattr(posterior, name)[index].detach() for name in posterior.arg_constraints))
    p = bmrs.LogUniform(prior.log_low[index], prior.log_high[index])
    figures = {
        "reduction": lambda: bmrs.plot_reduction(q, p, bmrs.spike(p)),
        "forest": lambda: bmrs.plot_forest(guide),
        "evidence": lambda: bmrs.plot_evidence(delta_f, masks, prior_log_odds),
        "evidence_snr": lambda: bmrs.plot_evidence_snr(delta_f, snr, prior_log_odds),
        "history": lambda: bmrs.plot_history(history),
    }
    paths = []
    for name, draw in figures.items():
        paths.append(folder / "figures" / f"{name}.png")
        figure: Any = draw().figure
        figure.savefig(paths[-1], dpi=150)
        plt.close(figure)
    return paths


def _closest_to_the_line(delta_f: dict[str, torch.Tensor], prior_log_odds: float) -> tuple[str, int]:
    """Return the structure that the evidence finds hardest to judge, the most telling one to look at."""
    distances = {site: (values + prior_log_odds).abs().nan_to_num(math.inf).min(0) for site, values in delta_f.items()}
    site = min(distances, key=lambda name: float(distances[name].values))
    return site, int(distances[site].indices)


def format_table(results: dict[str, Any]) -> str:
    """Return the table that ends a run."""
    lines = [f"{'layer':<22}{'structures':>12}{'kept':>12}{'kept %':>10}", "-" * 56]
    for layer, size in results["structures"].items():
        kept = results["kept"][layer]
        lines.append(f"{layer.removesuffix('_noise'):<22}{size:>12,}{kept:>12,}{100 * kept / size:>9.1f}%")
    lines += ["", f"{'':<22}{'dense':>12}{'pruned':>12}{'change':>10}", "-" * 56]
    for name, key, form in (
        ("parameters", "params", ",.0f"),
        ("FLOPs an image", "flops", ",.0f"),
        (f"ms a batch of {results['latency_batch']}", "latency", ".2f"),
    ):
        suffix = "_ms" if key == "latency" else ""
        before, after = (results[f"{key}_{which}{suffix}"] for which in ("dense", "pruned"))
        lines.append(f"{name:<22}{before:>12{form}}{after:>12{form}}{100 * (after / before - 1):>9.1f}%")
    before, after = 100 * results["accuracy_test_dense"], 100 * results["accuracy_test"]
    lines.append(f"{'test accuracy %':<22}{before:>12.2f}{after:>12.2f}{after - before:>+10.2f}")
    return "\n".join(lines)
