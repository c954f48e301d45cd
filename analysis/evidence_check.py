"""How near evidence changes are to the truth: python -m analysis.evidence_check [--parts linear refitted digits]."""

import json
import math
import os
import platform
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from scipy.stats import spearmanr
from torch import Tensor

from analysis.common.command import command
from analysis.comparisons.evidence_cases import digits_case, linear_case, mnist_case, refitted_case
from analysis.drawing.evidence_figures import draw_evidence
from pyro_bmrs.io.files import write_json

__all__ = ["EvidenceCheck", "format_table", "main"]

Part = Literal["linear", "refitted", "digits", "mnist"]
_CASES: dict[Part, Callable[..., list[dict[str, Any]]]] = {
    "linear": linear_case,
    "refitted": refitted_case,
    "digits": digits_case,
    "mnist": mnist_case,
}
_TRUTH = {
    "linear": "exact evidence, models linear in two noise variables",
    "refitted": "change of the ELBO over kl_weight, everything refitted without the structure, 2-10-1 networks",
    "digits": "free form by brute force, MLP of two layers on the digits",
    "mnist": "free form by brute force, one draw, of every 33rd structure",
}
_LINE = -math.log(3)


@dataclass(frozen=True)
class EvidenceCheck:
    """Compare evidence changes with the truth, where that can be computed."""

    parts: tuple[Part, ...] = ("linear", "refitted", "digits")
    problems: int = 300
    """Of the linear case, with two structures each."""
    steps: int = 1500
    """Of the linear case's fits; refits take two thirds."""
    networks: int = 6
    """Of the refitted case, with ten structures each."""
    kl_weights: tuple[float, ...] = (1.0, 3.0)
    """Of the networks."""
    epochs: int = 60
    """Of the networks; refits take half as many."""
    hidden: int = 40
    """Width of both layers of the networks on the digits."""
    seed: int = 0
    threads: int = 1
    data_dir: Path | None = None
    """Folder of data sets, for the part "mnist"; by default BMRS_DATA, or else the hub."""
    output: Path = Path("analysis/results/evidence_check")
    """Folder of check.json, check.md and the three figures, which are replaced."""


def main(config: EvidenceCheck) -> dict[str, Any]:
    """Run the cases, print and write table and pictures, and return the figures."""
    torch.set_num_threads(config.threads)
    config.output.mkdir(parents=True, exist_ok=True)
    cases = []
    for part in config.parts:
        print(f"{part} ...", flush=True)
        cases += [{"part": part, **case} for case in _CASES[part](config)]
    report = {
        "command": command("evidence_check"),
        "config": {**asdict(config), "output": str(config.output), "data_dir": ""},
        "device": f"cpu: {platform.machine()}, {os.cpu_count()} cores, {config.threads} threads used",
        "torch": torch.__version__,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "cases": cases,
    }
    report = json.loads(json.dumps(report))  # as whoever reads the file will see it
    write_json(config.output / "check.json", report)
    table = format_table(report)
    (config.output / "check.md").write_text(table + "\n", encoding="utf-8")
    draw_evidence(report["cases"], config.output)
    print(f"\n{table}\n\nwritten to {config.output}")
    return report


def format_table(report: dict[str, Any]) -> str:
    """Return how the predictions of each case compare with its truth, as Markdown."""
    lines = [f"{report['device']}, torch {report['torch']}", ""]
    for case in report["cases"]:
        truth = torch.tensor(case["truth"], dtype=torch.float64)
        near = int((truth.abs() < 3).sum())
        lines += [
            f"**{case['name']}** Truth: {_TRUTH[case['part']]}. {len(truth)} structures, {near} of them within 3 nats "
            "of zero.",
            "",
            "| prediction | Spearman | sign agrees | decision at log 3 agrees | mean error within 3 nats | seconds |",
            "|---|---|---|---|---|---|",
        ]
        for name, each in case["predictions"].items():
            lines.append(_row(name, torch.tensor(each["values"], dtype=torch.float64), truth, each))
        if "together" in case:
            lines += ["", *_removed_together(case["together"])]
        lines.append("")
    return "\n".join(lines).rstrip()


def _removed_together(together: dict[str, dict[str, float]]) -> list[str]:
    """Return a table of what all removals at once do, beside the sum of what each alone would."""
    lines = [
        "Removed together, at log 3; changes of the ELBO over kl_weight, in nats:",
        "",
        "| by | structures | sum of their evidence | at once | refitted |",
        "|---|---|---|---|---|",
    ]
    for name, each in together.items():
        changes = " | ".join(f"{each[key]:+.1f}" for key in ("sum", "at_once", "refitted"))
        lines.append(f"| {name} | {each['removed']} | {changes} |")
    return lines


def _row(name: str, values: Tensor, truth: Tensor, each: dict[str, Any]) -> str:
    rank = spearmanr(values, truth)[0]
    seconds = f"{each['seconds']:.2g}" if "seconds" in each else ""
    if each.get("score"):  # which has no unit, and its own line at 0
        agrees = ((values >= 0) == (truth >= _LINE)).double().mean()
        return f"| {name} | {rank:.3f} | | {100 * agrees:.1f} % | | {seconds} |"
    sign = ((values >= 0) == (truth >= 0)).double().mean()
    agrees = ((values >= _LINE) == (truth >= _LINE)).double().mean()
    error = (values - truth).abs()[truth.abs() < 3].mean()
    return f"| {name} | {rank:.3f} | {100 * sign:.1f} % | {100 * agrees:.1f} % | {error:.3g} | {seconds} |"


if __name__ == "__main__":
    try:
        main(tyro.cli(EvidenceCheck))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
