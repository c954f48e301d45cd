"""Runs side by side: in processes of one machine by joblib, or on a cluster by dask; or one run on several devices."""

import os
import threading
import traceback
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch

from analysis.common.extras import require
from analysis.runs.config import NoisyRun, RunConfig
from analysis.runs.execution import Execution
from analysis.runs.experiment import execute

if TYPE_CHECKING:
    from lightning_fabric import Fabric

require("study", "joblib")

from joblib import Parallel, cpu_count, delayed, parallel_config  # noqa: E402
from joblib.externals.loky.process_executor import TerminatedWorkerError  # noqa: E402

__all__ = [
    "Outcome",
    "attempt",
    "connect",
    "count_cores",
    "count_workers",
    "launched",
    "on_dask",
    "on_this_machine",
    "together",
]

_LONGEST_WAIT = timedelta(days=7)  # of processes for the first one, which trains dense networks alone
_MAX_DEATHS = 3  # of workers in a row without a run in between that ends
_ALONE = threading.Lock()  # a run seeds generators and sets switches that belong to its whole process


def count_cores() -> int:
    """Return how many cores this process may use."""
    return int(cpu_count())


@dataclass(frozen=True)
class Outcome:
    """The outcome of a run: results, or an error and where it was raised."""

    config: RunConfig
    results: dict[str, Any] | None = None
    error: str = ""
    traceback: str = ""


def attempt(config: RunConfig, execution: Execution) -> Outcome:
    """Execute a run and return its outcome, an error included; only an interruption gets out."""
    try:
        with _ALONE:
            return Outcome(config, execute(config, execution))
    except Exception as error:  # whatever it is, other runs go on
        return _failure(config, error)


def _failure(config: RunConfig, error: BaseException) -> Outcome:
    text = f"{type(error).__name__}: {error}"
    return Outcome(config, error=text, traceback="".join(traceback.format_exception(error)))


def on_this_machine(configs: Sequence[RunConfig], execution: Execution, jobs: int) -> Generator[Outcome]:
    """Execute runs in ``jobs`` processes, one job in this very process, and yield each outcome at once.

    Where a process is killed, new ones go on from the last checkpoints.

    Raises:
        ChildProcessError: If processes keep being killed.
    """
    if jobs == 1:
        yield from (attempt(config, execution) for config in configs)
        return
    left, deaths = list(configs), 0
    while left:
        try:
            with parallel_config(backend="loky", n_jobs=jobs, inner_max_num_threads=execution.threads):
                pool = Parallel(return_as="generator_unordered", batch_size=1)
                for outcome in pool(delayed(attempt)(config, execution) for config in left):
                    left = [config for config in left if config != outcome.config]
                    deaths = 0
                    yield outcome
        except TerminatedWorkerError as error:
            deaths += 1
            if deaths == _MAX_DEATHS:
                raise ChildProcessError(
                    f"processes were killed {deaths} times in a row with {len(left)} runs left, perhaps for want of "
                    "memory: lower --jobs; what is done is kept"
                ) from error


def launched(device: str) -> "Fabric | None":
    """Return the processes that torchrun has started this one with; None where it stands alone."""
    if not torch.distributed.is_torchelastic_launched() or (processes := int(os.environ["WORLD_SIZE"])) == 1:
        return None
    from lightning_fabric import Fabric  # noqa: PLC0415  (slow)
    from lightning_fabric.strategies.ddp import DDPStrategy  # noqa: PLC0415  (slow)

    here = int(os.environ["LOCAL_WORLD_SIZE"])
    strategy = DDPStrategy(timeout=_LONGEST_WAIT)
    fabric = Fabric(accelerator=device, devices=here, num_nodes=processes // here, strategy=strategy)
    fabric.launch()
    return fabric


def together(configs: Sequence[RunConfig], execution: Execution) -> Generator[Outcome]:
    """Execute runs one after another, those with noise in all processes of ``execution.fabric``, others in the first.

    An error ends them all. Only in the first process do outcomes have results.
    """
    for config in configs:
        if isinstance(config, NoisyRun):
            yield Outcome(config, execute(config, execution))
        elif execution.is_first:
            yield Outcome(config, execute(config, replace(execution, fabric=None)))


@contextmanager
def connect(scheduler: str | None) -> Iterator[Any]:
    """Connect to a dask scheduler at an address such as ``tcp://host:8786``.

    Raises:
        ImportError: If dask.distributed is not installed.
        OSError: If there is no scheduler at that address.
        ValueError: If there is no address.
    """
    try:
        from distributed import Client  # noqa: PLC0415  (optional)
    except ImportError as error:
        raise ImportError("the backend dask needs dask.distributed: pip install 'pyro-bmrs[study]'") from error
    if scheduler is None:
        raise ValueError("the backend dask needs --scheduler ADDRESS, which dask scheduler prints when it starts")
    with Client(scheduler) as client:
        yield client


def on_dask(configs: Sequence[RunConfig], execution: Execution, client: Any) -> Generator[Outcome]:
    """Execute runs on the workers of a dask cluster and yield each outcome at once.

    Where a worker dies another takes its run over, from the last checkpoint if they share the folder of checkpoints.

    Args:
        configs: The runs.
        execution: How to execute them; its folders are the workers'.
        client: A ``distributed.Client``.
    """
    from distributed import as_completed  # noqa: PLC0415  (optional)

    futures = {
        # A run asked for twice, by two commands or again after an interruption, has one key, so that it runs once.
        client.submit(attempt, config, execution, key=f"pyro-bmrs-{config.id}", pure=False): config
        for config in configs
    }
    for future in as_completed(list(futures)):
        config = futures.pop(future)
        error = future.exception()
        yield future.result() if error is None else _failure(config, error)


def count_workers(client: Any) -> int:
    """Return the number of a cluster's workers.

    Raises:
        ValueError: If there are none, or some would run several runs in one process.
    """
    threads = client.nthreads()
    if not threads:
        raise ValueError("the dask cluster has no workers: start some with dask worker ADDRESS --nthreads 1")
    if crowded := [address for address, count in threads.items() if count > 1]:
        raise ValueError(
            f"a run needs a process of its own, but {', '.join(crowded)} have several threads: start workers with "
            "--nthreads 1 --nworkers N"
        )
    return len(threads)
