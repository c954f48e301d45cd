"""The comparative study: python -m analysis.study [--grid table1] [--recipe paper] [--seeds 0 1 2] [--jobs 2]."""

import os
import re
import shlex
import sys
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import tyro

from analysis.data.hub import image_set, locate
from analysis.runs.baseline_runs import baselines_beside
from analysis.runs.config import (
    BASELINES,
    METHODS,
    DatasetName,
    NetworkName,
    Placement,
    Ranking,
    RecipeName,
    RunConfig,
)
from analysis.runs.execution import Execution
from analysis.runs.progress import Progress
from analysis.runs.recipes import make_config
from analysis.runs.scheduling import connect, count_cores, count_workers, launched, on_dask, on_this_machine, together
from analysis.runs.store import Store
from analysis.tables import write_tables
from pyro_bmrs.svi.elbo import Granularity

__all__ = ["GRIDS", "Grid", "Study", "configurations", "main"]

_SEVEN = tuple(method for method in METHODS if method != "gradient")  # those of the paper's table 1
_RESULTS = Path(__file__).parent / "results" / "study"


@dataclass(frozen=True)
class Grid:
    """Axes whose product is a set of runs, and what holds for all of them."""

    datasets: tuple[DatasetName, ...]
    networks: tuple[NetworkName, ...]
    methods: tuple[str, ...]
    seeds: tuple[int, ...] = (0, 1, 2)
    recipes: tuple[RecipeName, ...] = ("paper", "ours")
    changes: dict[str, Any] = field(default_factory=dict)


GRIDS = {
    "smoke": Grid(
        ("digits",), ("mlp", "lenet5"), ("none", "L2", "BMRS_N"), (0,), changes={"epochs": 6, "fine_tune_epochs": 2}
    ),
    "table1": Grid(("mnist", "fashion_mnist", "cifar10"), ("mlp", "lenet5"), _SEVEN),
    "curves": Grid(
        ("mnist", "fashion_mnist", "cifar10"),
        ("mlp", "lenet5"),
        METHODS[1:],
        recipes=("paper",),
        changes={"pruning": "post-training"},
    ),
    # The window of p1 = 23 would be empty, since the paper's p2 is 23.
    "precision": Grid(
        ("mnist", "cifar10"), ("mlp", "lenet5"), tuple(f"BMRS_U-{p1}" for p1 in range(22, 0, -1)), recipes=("paper",)
    ),
    # The paper's second table, with what of it a CPU can do; resnet50 and vit_b16 by --networks and --weights-dir.
    "table2": Grid(("cifar10",), ("resnet18", "vit_s"), (*_SEVEN, "random"), recipes=("ours",)),
    "caffe": Grid(("mnist",), ("lenet5_caffe",), ("none", "BMRS_N"), recipes=("ours",)),
    # Of what BMRS_N has been run on by our recipe.
    "baselines": Grid(get_args(DatasetName), ("mlp", "lenet5"), BASELINES, recipes=("baselines",)),
}


@dataclass(frozen=True)
class Study:
    """Run a grid of the study, skipping what is done, or render the tables of what was found."""

    grid: Literal["smoke", "table1", "table2", "curves", "precision", "caffe", "baselines"] = "smoke"
    """A named grid, of which every axis can be replaced by the options below; baselines need results of BMRS_N by our
    recipe for every seed, to whose mean compression they prune."""
    datasets: tuple[DatasetName, ...] = ()
    """By default the grid's, fashion_mnist only if its files are in the data folder."""
    networks: tuple[NetworkName, ...] = ()
    """mlp_inputs is the MLP with noise on its inputs too; resnet18, resnet50, vit_s and vit_b16 are trained before."""
    methods: tuple[str, ...] = ()
    """none, L2, E[theta], SNR, BMRS_N, BMRS_U-8, BMRS_U-4 (or any other p1), gradient, random, free_form. Of baselines:
    tp_magnitude, tp_taylor, tp_group_norm, scratch, and L2, gradient, random, ... in fits that prune to that size."""
    seeds: tuple[int, ...] = ()
    recipes: Annotated[tuple[RecipeName, ...], tyro.conf.arg(aliases=["--recipe"])] = ()
    """paper: what its reference implementation does; ours: the library's defaults; baselines: of that grid alone."""
    kl_weight: tuple[float, ...] = ()
    """Instead of the recipe's; several make an axis. Of baselines: those of the runs beside which they are."""
    epochs: int | None = None
    """In which structures are removed, instead of the recipe's."""
    fine_tune_epochs: int | None = None
    """After them, instead of the recipe's."""
    batch_size: int | None = None
    lr: float | None = None
    posterior_lr: float | None = None
    kl_by_cost: bool | None = None
    """Whether the KL is weighted by what a site's structures cost."""
    kl_priced_at: tuple[int, ...] | None = None
    """How many structures each noise layer has in the network in which they cost that, in their order."""
    pixels: tuple[float, float] | None = None
    """What black and white are to the network."""
    prior_log_odds: float | None = None
    granularity: Granularity | None = None
    """How often noise is drawn, instead of the recipe's."""
    log_high: float | None = None
    """Upper bound of the prior on log(theta), instead of the recipe's."""
    pruning: Literal["continuous", "post-training"] | None = None
    pretrain_epochs: int | None = None
    """Of networks that are trained before; 0 where their weights come from a folder."""
    train_images: int | Literal["all"] | None = None
    """Only the first ones."""
    hidden: int | None = None
    """Width of an MLP, of a ResNet's first stage or of a ViT, instead of the recipe's."""
    placement: Placement | None = None
    """Of LeNet-5 and networks trained before: noise stands in front of what reads a channel, or as in the paper."""
    ranking: Ranking = "layer"
    """Of torch-pruning's baselines: the same fraction of every layer goes, or all structures are ranked together."""
    jobs: int = 1
    """Runs side by side, in processes of this machine."""
    threads: int = 0
    """Of the CPU for each run; 0 shares the cores among the jobs, on a cluster it is 1."""
    backend: Literal["local", "dask"] = "local"
    scheduler: str | None = None
    """Address of dask's scheduler; workers, of one thread each, need this checkout, the data and the work folder."""
    device: str = "auto"
    """Several devices train each run together where torchrun starts the command."""
    compile: bool = False
    """Compile training steps (on CUDA: capture them as a graph)."""
    checkpoint_every: int = 1
    """Epochs between checkpoints: what an interruption costs at most."""
    data_dir: Path | None = None
    """Folder of data sets; by default BMRS_DATA, or else they are downloaded."""
    weights_dir: Path | None = None
    """Folder of pretrained weights: resnet50, ... in it as save_pretrained writes them."""
    work: Path = Path("runs/study")
    """Folder of checkpoints."""
    results: Path = _RESULTS
    """Folder of runs/ID.json and of the tables."""
    retry: bool = False
    """Run again what failed before."""
    dry_run: bool = False
    """Only list the runs and their states."""
    table: bool = False
    """Run nothing; render the grid's results found so far as Markdown and LaTeX."""


def main(study: Study, arguments: Sequence[str] = ()) -> bool:
    """Run the study and return whether nothing of it has failed; ``arguments`` are noted as what was asked for."""
    store = Store(study.results / "runs")
    configs = configurations(study)
    if study.table:
        found = [store.read(config) for config in configs if store.state(config) == "done"]
        print(write_tables(found, study.results, study.grid))
        return True
    if study.dry_run:
        for config in configs:
            print(f"{config.id}  {store.state(config):8}{config.label}")
        return True
    wanted = ("pending", "failed") if study.retry else ("pending",)
    todo = [config for config in configs if store.state(config) in wanted]
    done = [config for config in configs if store.state(config) == "done"]
    if (fabric := launched(study.device)) is not None:
        _run_together(study, fabric, fabric.broadcast(todo), store, _command(arguments))
        return True
    print(f"{len(configs)} runs: {len(done)} done, {len(todo)} to do", flush=True)
    if todo:
        finished = [(config, store.read(config)["seconds"]) for config in done]
        _run(study, todo, finished, store, _command(arguments))
    return _list_failures(configs, store) == 0


def configurations(study: Study) -> list[RunConfig]:
    """Return the runs of a study, each once; in an order in which a whole table of one seed comes first."""
    grid = GRIDS[study.grid]
    names = (
        "epochs",
        "fine_tune_epochs",
        "batch_size",
        "lr",
        "posterior_lr",
        "kl_by_cost",
        "kl_priced_at",
        "pixels",
        "prior_log_odds",
        "granularity",
        "log_high",
        "pruning",
        "pretrain_epochs",
        "train_images",
        "hidden",
        "placement",
    )
    given = {name: getattr(study, name) for name in names if getattr(study, name) is not None}
    datasets = study.datasets or tuple(name for name in grid.datasets if _is_at_hand(name, study.data_dir))
    networks, methods = study.networks or grid.networks, study.methods or grid.methods
    seeds, recipes = study.seeds or grid.seeds, study.recipes or grid.recipes
    if any((recipe == "baselines") != (study.grid == "baselines") for recipe in recipes):
        raise ValueError("the recipe baselines is that of the grid baselines, and of no other")
    if study.grid == "baselines":
        results = Store(study.results / "runs").read_all()
        return baselines_beside(results, datasets, networks, methods, seeds, study.kl_weight, study.ranking, **given)
    axes = product(seeds, methods, recipes, study.kl_weight or (None,), datasets, networks)
    return list(
        dict.fromkeys(
            make_config(dataset, network, method, recipe, seed, kl_weight=kl_weight, **{**grid.changes, **given})
            for seed, method, recipe, kl_weight, dataset, network in axes
        )
    )


def _is_at_hand(dataset: str, data_dir: Path | None) -> bool:
    """Return whether a grid should take a data set: Fashion-MNIST only where someone has put its files."""
    if dataset != "fashion_mnist":
        return True
    if data_dir is None and not os.environ.get("BMRS_DATA"):
        return False
    try:
        locate(image_set(dataset), data_dir)
    except FileNotFoundError:
        return False
    return True


def _run(
    study: Study, todo: Sequence[RunConfig], done: list[tuple[RunConfig, float]], store: Store, command: str
) -> None:
    """Execute runs, several side by side, and keep the results of each as soon as it ends."""
    if study.jobs < 1:
        raise ValueError(f"jobs must be at least 1, but got {study.jobs}")
    local = study.backend == "local"
    execution = _execution(study, max(count_cores() // study.jobs, 1) if local else 1)
    with ExitStack() as stack:
        if local:
            jobs, outcomes = study.jobs, on_this_machine(todo, execution, study.jobs)
        else:
            client = stack.enter_context(connect(study.scheduler))
            jobs, outcomes = count_workers(client), on_dask(todo, execution, client)
        stack.enter_context(closing(outcomes))
        progress = stack.enter_context(Progress(todo, done, execution, jobs))
        about = {"command": command, "jobs": jobs, "backend": study.backend}
        for outcome in outcomes:
            if outcome.results is None:
                store.write_error(outcome.config, outcome.error, outcome.traceback, **about)
            else:
                store.write(outcome.config, outcome.results, **about)
            progress.tell(outcome.config, outcome.results, outcome.error)


def _run_together(study: Study, fabric: Any, todo: Sequence[RunConfig], store: Store, command: str) -> None:
    """Execute runs one after another, each on all devices, and have the first process keep the results."""
    if study.jobs != 1 or study.backend != "local":
        raise ValueError("processes that torchrun has started train one run together: leave out --jobs and --backend")
    execution = replace(_execution(study, 1), fabric=fabric)
    for outcome in together(todo, execution):
        if outcome.results:
            store.write(outcome.config, outcome.results, command=command, jobs=1, backend="local")
            print(f"{outcome.config.label}: done", flush=True)


def _execution(study: Study, threads: int) -> Execution:
    """Return how the study's runs are executed, by default with so many threads."""
    return Execution(
        work=study.work.resolve(),
        data_dir=None if study.data_dir is None else study.data_dir.expanduser().resolve(),
        device=study.device,
        threads=study.threads or threads,
        compile=study.compile,
        checkpoint_every=study.checkpoint_every,
        weights=None if study.weights_dir is None else study.weights_dir.expanduser().resolve(),
    )


def _command(arguments: Sequence[str]) -> str:
    """Return the command to give again, without what is of this machine only."""
    private = re.compile(r"--(data[-_]dir|weights[-_]dir|work|results|scheduler)(=.*)?")
    kept, skip = ["python -m analysis.study"], False
    for argument in arguments:
        match = private.fullmatch(argument)
        if not (skip or match):
            kept.append(shlex.quote(argument))
        skip = match is not None and match[2] is None
    return " ".join(kept)


def _list_failures(configs: Sequence[RunConfig], store: Store) -> int:
    failed = [config for config in configs if store.state(config) == "failed"]
    for config in failed:
        print(f"failed: {config.id}  {config.label}: {store.read_error(config)['error']}")
    if failed:
        print(f"{len(failed)} runs failed; tracebacks are in {store.folder}/ID.error.json; --retry runs them again")
    return len(failed)


if __name__ == "__main__":
    try:
        sys.exit(0 if main(tyro.cli(Study), sys.argv[1:]) else 1)
    except KeyboardInterrupt:
        print("\ninterrupted; what is done is kept, and the same command goes on from the last checkpoints")
        sys.exit(130)
    except (ImportError, ValueError, OSError) as error:
        sys.exit(f"error: {error}")
