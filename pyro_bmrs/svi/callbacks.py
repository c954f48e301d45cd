"""Callbacks of a fit: one small protocol, and those that come with the library."""

import json
import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm.auto import tqdm

from pyro_bmrs.io.files import AtomicFile
from pyro_bmrs.svi.result import validation_figure
from pyro_bmrs.warn import warn

if TYPE_CHECKING:
    from lightning_fabric import Fabric

    from pyro_bmrs.svi.result import FitResult

__all__ = ["Callback", "Callbacks", "EnergyTracker", "FabricLoggers", "JSONLines", "ProgressBar"]

Record = dict[str, Any]


class Callback:
    """Base class of what a fit calls; override what you need.

    In a fit of several processes only the first one calls them.

    Example:
        >>> class Report(bmrs.Callback):
        ...     def on_epoch_end(self, record):
        ...         print(record["epoch"], record["phase"])
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), bmrs.MultiplicativeNoise(8), nn.Linear(8, 3))
        >>> model = bmrs.NoisyNetwork(net)
        >>> guide = bmrs.TruncatedLogNormalGuide(model)
        >>> data = torch.randn(32, 4), torch.arange(32) % 3
        >>> few = {"epochs": 1, "fine_tune_epochs": 1, "criterion": None, "progress": False}
        >>> _ = bmrs.fit(model, guide, data, callbacks=[Report()], **few)
        1 noisy
        2 fine-tune
    """

    def on_start(self, epochs: int, history: list[Record]) -> None:
        """Called when a fit of at most ``epochs`` epochs begins, or resumes after those of ``history``."""

    def on_pruning(self, epoch: int, removed: Mapping[str, int]) -> None:
        """Called with the number of structures of each site that were removed after ``epoch``, counted from 1."""

    def on_epoch_end(self, record: Record) -> None:
        """Called with the record of the epoch that has ended (see ``FitResult.history``); what is added to it stays."""

    def on_end(self, result: "FitResult") -> None:
        """Called with the result; not where a fit ends by an error."""

    def close(self) -> None:
        """Close files and displays; called however the fit ends."""


class ProgressBar(Callback):
    """A bar for epochs, in a terminal, in a notebook, and as a line every ten seconds in a log file; then one line."""

    def on_start(self, epochs: int, history: list[Record]) -> None:
        interval = 0.1 if sys.stderr.isatty() else 10
        self._bar = tqdm(total=epochs, initial=len(history), unit="epoch", mininterval=interval)

    def on_epoch_end(self, record: Record) -> None:
        shown = {"loss": f"{record['loss']:.3g}", "removed": f"{100 * record['compression']:.1f} %"}
        self._bar.set_postfix({**shown, **validation_figure(record)}, refresh=False)
        self._bar.update()

    def on_end(self, result: "FitResult") -> None:
        self._bar.refresh()
        self._bar.close()
        tqdm.write(str(result), file=sys.stderr)

    def close(self) -> None:
        self._bar.close()


class JSONLines(Callback):
    """Writes the record of each epoch to a file, one line each; a resumed fit goes on where its history ends.

    A line that could not be written whole, on a full disk or because the process was killed, is written again as soon
    as that is possible: by the next epoch, or by the fit that resumes.

    Args:
        path: File to write.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._lines: list[str] = []
        self._broken = False

    def on_start(self, epochs: int, history: list[Record]) -> None:
        self._lines = [json.dumps(record) + "\n" for record in history]
        self._write_all()

    def on_epoch_end(self, record: Record) -> None:
        self._lines.append(json.dumps(record) + "\n")
        self._try(self._write_all if self._broken else self._append)

    def on_end(self, result: "FitResult") -> None:
        self._lines = [json.dumps(record) + "\n" for record in result.history]
        if not self.path.exists() or self.path.read_bytes() != "".join(self._lines).encode():
            self._try(self._write_all)

    def _append(self) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(self._lines[-1])

    def _write_all(self) -> None:
        with AtomicFile(self.path) as temporary:
            temporary.write_text("".join(self._lines), encoding="utf-8")

    def _try(self, write: Callable[[], None]) -> None:
        """Write, unless the disk is full, which does not end the fit."""
        try:
            write()
        except OSError as error:
            self._broken = True
            warn(f"{self.path} cannot be written ({error}); the fit goes on", RuntimeWarning)
        else:
            self._broken = False


class EnergyTracker(Callback):
    """Adds an estimate of the energy used so far, ``energy_kwh``, and of its CO2, ``co2_kg``, to each record.

    By codecarbon, offline: it measures what the machine lets it measure, and models the rest from the processor's rated
    power; nothing is sent anywhere.

    Args:
        country: Three-letter ISO code of the country whose electricity mix to assume.

    Raises:
        ImportError: If codecarbon is not installed.
    """

    def __init__(self, country: str = "DEU") -> None:
        if find_spec("codecarbon") is None:
            raise ImportError("EnergyTracker needs codecarbon: pip install 'pyro-bmrs[energy]'")
        self.country = country

    def on_start(self, epochs: int, history: list[Record]) -> None:
        from codecarbon import OfflineEmissionsTracker  # noqa: PLC0415  (optional, and slow to import)

        logging.getLogger("codecarbon").setLevel(logging.CRITICAL)  # or it reports on the machine at every turn
        last = history[-1] if history else {}
        self._totals = {name: last.get(name, 0.0) for name in ("energy_kwh", "co2_kg")}
        self._tracker = OfflineEmissionsTracker(
            country_iso_code=self.country, output_methods=[], log_level="critical", allow_multiple_runs=True
        )
        self._tracker.start_task()

    def on_epoch_end(self, record: Record) -> None:
        epoch = self._tracker.stop_task()
        self._totals["energy_kwh"] += epoch.energy_consumed
        self._totals["co2_kg"] += epoch.emissions
        record.update(self._totals)
        self._tracker.start_task()

    def close(self) -> None:
        self._tracker.stop()


class FabricLoggers(Callback):
    """Passes the numbers of each record to the loggers of a Fabric: TensorBoard, W&B, CSV, ...

    Args:
        fabric: The Fabric, made with ``loggers=[...]``.
    """

    def __init__(self, fabric: "Fabric") -> None:
        self.fabric = fabric

    def on_epoch_end(self, record: Record) -> None:
        numbers = {name: value for name, value in record.items() if isinstance(value, int | float)}
        self.fabric.log_dict(numbers, step=record["epoch"])

    def on_end(self, result: "FitResult") -> None:
        for logger in self.fabric.loggers:
            logger.finalize("success")


class Callbacks(Callback):
    """Several callbacks as one, in order.

    Args:
        callbacks: The callbacks.
    """

    def __init__(self, callbacks: Sequence[Callback]) -> None:
        self.callbacks = callbacks
        self._started: list[Callback] = []

    def on_start(self, epochs: int, history: list[Record]) -> None:
        for callback in self.callbacks:
            callback.on_start(epochs, history)
            self._started.append(callback)

    def on_pruning(self, epoch: int, removed: Mapping[str, int]) -> None:
        for callback in self.callbacks:
            callback.on_pruning(epoch, removed)

    def on_epoch_end(self, record: Record) -> None:
        for callback in self.callbacks:
            callback.on_epoch_end(record)

    def on_end(self, result: "FitResult") -> None:
        for callback in self.callbacks:
            callback.on_end(result)

    def close(self) -> None:
        for callback in self._started:
            callback.close()
