"""Data that come batch by batch and need never be there as a whole."""

import copy
import math
import zlib
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Generator, Tensor
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.data import DataLoader, SequentialSampler, SubsetRandomSampler

from pyro_bmrs.checks import described
from pyro_bmrs.model.network import NoisyNetwork
from pyro_bmrs.randomness import local_seed
from pyro_bmrs.structures.inputs import Inputs
from pyro_bmrs.svi.checkpoint import State
from pyro_bmrs.svi.data.checking import as_tensors, check_observations
from pyro_bmrs.svi.data.randomness import drawing_apart
from pyro_bmrs.svi.data.source import Batch, Source
from pyro_bmrs.svi.data.unpacking import Unpack, unpacked
from pyro_bmrs.svi.fingerprint import fingerprint

if TYPE_CHECKING:
    from lightning_fabric import Fabric

__all__ = ["DatasetStream", "LoaderStream"]

_PEEK_SEED = 0


class _Stream(Source):
    """Batches out of an iterable. What they are is checked as they come for the first time."""

    def __init__(self, name: str, dtype: torch.dtype, unpack: Unpack | None) -> None:
        self.name, self._dtype, self._unpack = name, dtype, unpack
        self._model: NoisyNetwork | None = None
        self._checked = False

    def check(self, model: NoisyNetwork) -> None:
        check_observations(model, *self.first, self.name)
        self._model = model

    def fingerprint(self) -> Any:
        x, y = self.first
        return [type(self).__name__, self.size, self.steps, fingerprint(x), fingerprint(y)]

    def _unpacked(self, batch: Any, number: int) -> Batch:
        """Return a batch as tensors, looked at in full the first time it comes."""
        inputs, observations = unpacked(batch, self._unpack, self.name)
        name = f"batch {number} of {self.name}"
        if self._checked:
            return _as_dtype(inputs, self._dtype), _as_dtype(observations, self._dtype)
        x, y = as_tensors(inputs, observations, name, self._dtype)
        x, y = _as_dtype(x, self._dtype), _as_dtype(y, self._dtype)
        if self._model is not None:
            check_observations(self._model, x, y, name)
        return x, y

    def _pass(self, loaded: Iterable[Any], seed: int) -> Iterator[Batch]:
        """Iterate over all batches of ``loaded`` once, as tensors."""
        count = 0
        for batch in drawing_apart(loaded, seed):
            yield self._unpacked(batch, count)
            count += 1
        if count != self.steps:
            raise ValueError(
                f"{self.name} was to give {self.steps} batches, but gave {count}: give what can be iterated over more "
                "than once, with a true len()"
            )
        self._checked = True


class DatasetStream(_Stream):
    """Examples that are fetched by their numbers, in an order of the fit's own.

    Args:
        dataset: Has ``__getitem__`` and ``__len__``.
        name: What errors call it.
        dtype: The network's.
        unpack: From a batch, collated by torch's default, to inputs and observations.
        batch_size: At most this many examples per batch.
    """

    def __init__(self, dataset: Any, name: str, dtype: torch.dtype, unpack: Unpack | None, batch_size: int) -> None:
        super().__init__(name, dtype, unpack)
        self.dataset = dataset
        self.size = len(dataset)
        if not self.size:
            raise ValueError(f"{name} is empty: {described(dataset)} of length 0")
        self.batch_size = min(batch_size, self.size)
        self.steps = math.ceil(self.size / self.batch_size)
        self.first = next(self._pass(self._loader([range(self.batch_size)]), _PEEK_SEED))

    def shuffled(self, order: Generator, fabric: "Fabric") -> Iterator[tuple[Batch, float]]:
        world, rank = fabric.world_size, fabric.global_rank
        permutation = torch.randperm(self.size, generator=order)
        seed = zlib.crc32(permutation.numpy().tobytes())  # which leaves the order as it is for tensors
        whole = permutation.tensor_split(self.steps)
        mine = [batch.tensor_split(world)[rank].tolist() for batch in whole]
        if not all(mine):
            raise ValueError(
                f"{self.size} examples of {self.name} in {self.steps} batches are too few for {world} processes: "
                "give a larger batch_size"
            )
        for batch, joint in zip(self._pass(self._loader(mine), seed + rank), whole, strict=True):
            yield batch, len(batch[1]) * world / len(joint)

    def ordered(self) -> Iterator[Batch]:
        numbers = torch.arange(self.size).tensor_split(self.steps)
        yield from self._pass(self._loader([each.tolist() for each in numbers]), _PEEK_SEED)

    def _loader(self, numbers: list[Any]) -> Iterable[Any]:
        return DataLoader(self.dataset, batch_sampler=numbers)


class LoaderStream(_Stream):
    """Batches of the caller's own making: a ``DataLoader``, or any iterable with a length.

    Args:
        loader: Gives the batches.
        name: What errors call it.
        dtype: The network's.
        unpack: From one of its batches to inputs and observations.
    """

    def __init__(self, loader: Any, name: str, dtype: torch.dtype, unpack: Unpack | None) -> None:
        super().__init__(name, dtype, unpack)
        self.loader = loader
        self.steps = len(loader)
        if not self.steps:
            raise ValueError(f"{name} is empty: {described(loader)} of length 0")
        self.lost_on_resume = _lost_on_resume(loader)
        with _undisturbed(loader):
            self.first = self._unpacked(next(drawing_apart(loader, _PEEK_SEED)), 0)
            self.batch_size = len(self.first[1])
            self.size = _known_size(loader, self.batch_size) or sum(len(y) for _, y in self.ordered())
        self._epochs = 0

    def shuffled(self, order: Generator, fabric: "Fabric") -> Iterator[tuple[Batch, float]]:
        world, rank = fabric.world_size, fabric.global_rank
        for sampler in _samplers(self.loader):
            if hasattr(sampler, "set_epoch"):
                sampler.set_epoch(self._epochs)
        self._epochs += 1
        divided = any(getattr(sampler, "num_replicas", 1) == world > 1 for sampler in _samplers(self.loader))
        seed = _seed(order) + (rank if divided else 0)  # batches to divide must be the same in all processes
        for x, y in self._pass(self.loader, seed):
            if divided or world == 1:
                yield (x, y), 1.0
                continue
            if len(y) < world:
                raise ValueError(f"a batch of {self.name} has {len(y)} examples, too few for {world} processes")
            mine = torch.arange(len(y)).tensor_split(world)[rank]
            yield (_rows(x, mine), y[mine]), len(mine) * world / len(y)

    def ordered(self) -> Iterator[Batch]:
        with _undisturbed(self.loader):
            yield from self._pass(self.loader, _PEEK_SEED)

    def fingerprint(self) -> Any:
        if not hasattr(self.loader, "load_state_dict"):
            return super().fingerprint()
        shapes = [(each.shape[1:], each.dtype) for each in tree_leaves(self.first)]
        return [type(self).__name__, self.size, self.steps, fingerprint(shapes)]  # its first batch may be any

    def state(self) -> State:
        tensors = {f"generator.{i}": each.get_state() for i, each in enumerate(_generators(self.loader))}
        info: dict[str, Any] = {"epochs": self._epochs}
        if hasattr(self.loader, "state_dict"):
            info["loader"] = _written(self.loader.state_dict(), tensors)
        return State(tensors, info)

    def restore(self, state: State) -> None:
        self._epochs = state.info["epochs"]
        if hasattr(self.loader, "load_state_dict"):
            self.loader.load_state_dict(_read(state.info["loader"], state.tensors))
            with local_seed(devices=[]):
                iter(self.loader)  # torchdata's takes its state up here, and draws from its generator as it does so
        for i, each in enumerate(_generators(self.loader)):
            each.set_state(state.tensors[f"generator.{i}"].cpu())


class _undisturbed:  # noqa: N801  (a context manager)
    """Leave what a loader remembers of its position and random numbers as it was."""

    def __init__(self, loader: Any) -> None:
        self.loader = loader

    def __enter__(self) -> None:
        self._generators = [each.get_state() for each in _generators(self.loader)]
        has_state = hasattr(self.loader, "state_dict") and hasattr(self.loader, "load_state_dict")
        self._state = copy.deepcopy(self.loader.state_dict()) if has_state else None

    def __exit__(self, *_: object) -> None:
        for each, state in zip(_generators(self.loader), self._generators, strict=True):
            each.set_state(state)
        if self._state is not None:
            self.loader.load_state_dict(self._state)


def _seed(order: Generator) -> int:
    return int(torch.randint(2**31, (), generator=order))


def _as_dtype(value: Any, dtype: torch.dtype) -> Any:
    """Return float64, which collating Python's and NumPy's numbers gives, in the dtype of the network."""
    return tree_map(
        lambda each: each.to(dtype) if isinstance(each, Tensor) and each.dtype == torch.float64 else each,
        value,
    )


def _rows(x: Inputs, rows: Tensor) -> Inputs:
    taken: Inputs = tree_map(lambda each: each[rows], x)
    return taken


def _samplers(loader: Any) -> list[Any]:
    found = [getattr(loader, name, None) for name in ("sampler", "batch_sampler")]
    found.append(getattr(found[1], "sampler", None))
    return [each for each in found if each is not None]


def _generators(loader: Any) -> list[Generator]:
    """Return the generators that a loader and its samplers draw from, if they have their own."""
    found = [getattr(each, "generator", None) for each in (loader, *_samplers(loader))]
    return list({id(each): each for each in found if isinstance(each, Generator)}.values())


def _known_size(loader: Any, batch_size: int) -> int | None:
    """Return how many examples a loader's batches are of, as far as that can be said without loading them."""
    if not isinstance(loader, DataLoader) or loader.batch_size is None:
        return None
    sampler = loader.sampler
    if isinstance(sampler, SubsetRandomSampler):
        return len(sampler)
    if isinstance(sampler, SequentialSampler) and loader.drop_last:
        return len(loader) * batch_size
    return len(loader.dataset)  # type: ignore[arg-type]


def _lost_on_resume(loader: Any) -> str:
    """Return what of a loader's state cannot be kept in a checkpoint."""
    if isinstance(loader, list | tuple) or hasattr(loader, "load_state_dict"):
        return ""
    if not isinstance(loader, DataLoader):
        return f"the position of {described(loader)}, which has no state_dict() and load_state_dict()"
    if loader.num_workers and loader.persistent_workers:
        return "the random states of a DataLoader's persistent workers; use a StatefulDataLoader"
    return ""


def _written(value: Any, tensors: dict[str, Tensor]) -> Any:
    """Return a loader's state as JSON holds it, with its tensors put into ``tensors``."""
    if isinstance(value, Tensor):
        name = f"loader.{len(tensors)}"
        tensors[name] = value.clone()
        return {"tensor": name}
    if isinstance(value, dict):
        return {"items": [[key, _written(each, tensors)] for key, each in value.items()]}
    if isinstance(value, list | tuple):
        return {type(value).__name__: [_written(each, tensors) for each in value]}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"the state of a loader holds {described(value)}, which a checkpoint cannot keep")


def _read(value: Any, tensors: dict[str, Tensor]) -> Any:
    if not isinstance(value, dict):
        return value
    (kind, content), *_ = value.items()
    if kind == "tensor":
        return tensors[content].cpu()
    if kind == "items":
        return {key: _read(each, tensors) for key, each in content}
    return (tuple if kind == "tuple" else list)(_read(each, tensors) for each in content)
