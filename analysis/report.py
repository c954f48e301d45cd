"""A run as one page: python -m analysis.report RUN_DIR (writes RUN_DIR/report.html; no scripts, no network)."""

import base64
import html
import json
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from pyro_bmrs.io.files import AtomicFile

__all__ = ["Report", "main", "render"]

_TITLES = {
    "history": "Training",
    "evidence": "Evidence by layer",
    "network": "The network, by the evidence",
    "forest": "Posteriors of what is kept",
    "evidence_snr": "Evidence against signal-to-noise ratio",
    "reduction": "One structure that went, and one that stayed",
}
_STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 60rem; padding: 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.2rem; margin-top: 2rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; }
th, td { padding: .25rem .75rem; text-align: right; border-bottom: 1px solid #8884; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
figure { margin: 1rem 0; } img { max-width: 100%; height: auto; background: white; }
figcaption { font-size: .9rem; } pre { white-space: pre-wrap; overflow-wrap: anywhere; }
"""


@dataclass(frozen=True)
class Report:
    """Write a run as one HTML file that needs nothing else."""

    run: Annotated[Path, tyro.conf.Positional]
    """Folder of a run, as ``analysis.quickstart`` writes it."""
    output: Path | None = None
    """File to write; by default report.html in the folder."""


def main(config: Report) -> Path:
    """Write the page and return its path."""
    page = render(config.run)
    path = config.output or config.run / "report.html"
    with AtomicFile(path) as partial:
        partial.write_text(page, encoding="utf-8")
    print(f"written to {path}")
    return path


def render(run: Path) -> str:
    """Return the page of a run.

    Raises:
        FileNotFoundError: If the folder has no results.
        ValueError: If they are damaged.
    """
    results, config = _read(run / "results.json"), _read(run / "config.json")
    metrics = [json.loads(line) for line in _text(run / "metrics.jsonl").splitlines() if line.strip()]
    name = f"{results['network']} on {results['dataset']}, {results['method']}, seed {results['seed']}"
    parts = [
        f"<h1>{_escaped(name)}</h1>",
        f"<p>{_escaped(_summary(results))}</p>",
        "<h2>Before and after</h2>",
        _table(("", "dense", "pruned"), _costs(results)),
        "<h2>Layers</h2>",
        _table(("layer", "structures", "kept", "kept %"), _layers(results)),
        *_figures(run / "figures"),
        "<h2>Posterior</h2>",
        _table(
            (
                "layer",
                "structures",
                "mean of &theta;",
                "&Delta;F, nats: lowest",
                "highest",
                "of the free form: lowest",
                "highest",
            ),
            _posterior(run),
        ),
        "<h2>Epochs</h2>",
        _table(("epoch", "phase", "loss", "KL, nats", "structures", "validation"), _epochs(metrics)),
        "<h2>Settings</h2>",
        _table(("setting", "value"), ((key, _shown(value)) for key, value in config.items())),
        "<h2>Made by</h2>",
        f"<pre>{_escaped(_command(config))}</pre>",
        _table(("", ""), (("device", results["device"]), *results["versions"].items())),
    ]
    body = "\n".join(parts)
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{_escaped(name)}</title><style>{_STYLE}</style></head>\n<body>\n{body}\n</body></html>\n"
    )


def _summary(results: Mapping[str, Any]) -> str:
    kept, total = sum(results["kept"].values()), sum(results["structures"].values())
    text = (
        f"{100 * results['compression']:.1f} % of the parameters removed, {kept} of {total} structures left, in "
        f"{results['epochs']} epochs and {results['seconds']:.0f} s."
    )
    if "accuracy_test_dense" in results:
        dense, pruned = (100 * results[key] for key in ("accuracy_test_dense", "accuracy_test"))
        text += f" Test accuracy {dense:.2f} % dense, {pruned:.2f} % pruned."
    return text


def _costs(results: Mapping[str, Any]) -> Iterable[Sequence[str]]:
    yield "parameters", f"{results['params_dense']:,}", f"{results['params_pruned']:,}"
    yield "FLOPs per example", f"{results['flops_dense']:,}", f"{results['flops_pruned']:,}"
    dense, pruned = results["latency_dense_ms"], results["latency_pruned_ms"]
    yield f"ms per batch of {results['latency_batch']}", f"{dense:.2f}", f"{pruned:.2f}"
    if "accuracy_test_dense" in results:
        yield "test accuracy %", f"{100 * results['accuracy_test_dense']:.2f}", f"{100 * results['accuracy_test']:.2f}"


def _layers(results: Mapping[str, Any]) -> Iterable[Sequence[str]]:
    for layer, total in results["structures"].items():
        kept = results["kept"][layer]
        yield layer.removesuffix("_noise"), str(total), str(kept), f"{100 * kept / total:.1f}"


def _posterior(run: Path) -> Iterable[Sequence[str]]:
    """Return a row per layer of what the posterior and the evidence say of it."""
    import arviz  # noqa: PLC0415  (takes as long to import as torch)

    data = arviz.from_netcdf(run / "posterior.nc", engine="h5netcdf")
    sites = [name for name in data.posterior.data_vars if name.endswith(".theta")]
    for site in sites:
        mean = float(data.constant_data[f"{site}.mean"].mean())
        name, size = str(site).removesuffix(".theta").removesuffix("_noise"), data.posterior[site].shape[-1]
        found = [data.constant_data.get(f"{site}.delta_f_{kind}") for kind in ("BMRS_N", "free_form")]
        yield name, str(size), f"{mean:.3f}", *(cell for each in found for cell in _range(each))


def _range(values: Any) -> tuple[str, str]:
    """Return the lowest and the highest of the values that are known."""
    known = [] if values is None else [each for each in values.values.tolist() if not math.isnan(each)]
    return (f"{min(known):.2f}", f"{max(known):.2f}") if known else ("", "")


def _epochs(metrics: Sequence[Mapping[str, Any]]) -> Iterable[Sequence[str]]:
    """Return a row for the first epoch, every tenth, and the last of each phase."""
    for i, entry in enumerate(metrics):
        ends = i + 1 == len(metrics) or metrics[i + 1]["phase"] != entry["phase"]
        if i == 0 or entry["epoch"] % 10 == 0 or ends:
            validation = next((f"{100 * entry[key]:.2f} %" for key in ("accuracy_validation",) if key in entry), "")
            loss, kl = f"{entry['loss']:.4f}", f"{entry['kl']:.1f}"
            yield str(entry["epoch"]), entry["phase"], loss, kl, str(entry["structures"]), validation


def _figures(folder: Path) -> Iterable[str]:
    order = [*_TITLES]
    known = sorted(folder.glob("*.png"), key=lambda path: ([*order, path.stem].index(path.stem), path.stem))
    for path in known:
        title = _escaped(_TITLES.get(path.stem, path.stem.replace("_", " ")))
        source = f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"
        yield f'<h2>{title}</h2>\n<figure><img alt="{title}" src="{source}"></figure>'


def _command(config: Mapping[str, Any]) -> str:
    left_out = ("output", "overwrite", "resume", "progress")
    given = {key: value for key, value in config.items() if key not in left_out and value not in (None, False)}
    named = {f"--{key.replace('_', '-')}": value for key, value in given.items()}
    options = " ".join(key if value is True else f"{key} {value}" for key, value in named.items())
    return f"python -m analysis.quickstart {options}"


def _table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Return a table; ``head`` is HTML, cells are text."""
    lines = ["".join(f"<td>{_escaped(str(cell))}</td>" for cell in row) for row in rows]
    titles = "".join(f"<th>{cell}</th>" for cell in head)
    body = "\n".join(f"<tr>{line}</tr>" for line in lines)
    return f'<div class="wide"><table><thead><tr>{titles}</tr></thead>\n<tbody>{body}</tbody></table></div>'


def _escaped(text: str) -> str:
    return html.escape(text)


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} is missing: is {path.parent} the folder of a run that has ended?") from None


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(_text(path))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is damaged: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path} is damaged: it holds no object")
    return found


if __name__ == "__main__":
    try:
        main(tyro.cli(Report))
    except (ValueError, OSError, KeyError) as error:
        sys.exit(f"error: {error}")
