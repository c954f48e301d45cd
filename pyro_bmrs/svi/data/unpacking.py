"""From a batch, as data come, to inputs and observations."""

from collections.abc import Callable, Mapping
from typing import Any

from pyro_bmrs.checks import described

__all__ = ["Unpack", "unpacked"]

Unpack = Callable[[Any], tuple[Any, Any]]
_LABELS = ("labels", "label")


def unpacked(batch: Any, unpack: Unpack | None, name: str) -> tuple[Any, Any]:
    """Return the inputs and the observations in a batch.

    Args:
        batch: A pair, or a mapping with ``"labels"``, or anything else that ``unpack`` takes apart.
        unpack: How; None leaves it to these rules.
        name: What to call the data.

    Raises:
        TypeError: If neither tells which part of the batch is what.
        ValueError: If ``unpack`` fails.
    """
    if unpack is not None:
        try:
            pair: Any = unpack(batch)
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            raise ValueError(f"unpack does not take a batch of {name}, {described(batch)} ({reason})") from error
        if not (isinstance(pair, tuple | list) and len(pair) == 2):
            raise TypeError(f"unpack must return a pair (inputs, observations), but returned {described(pair)}")
        return pair[0], pair[1]
    if isinstance(batch, Mapping):
        label = next((each for each in _LABELS if each in batch), None)
        if label is None:
            raise TypeError(
                f"a batch of {name} is a mapping of {', '.join(map(repr, batch))}, without 'labels': say what the "
                "observations are, for instance unpack=lambda batch: ({'x': batch['x']}, batch['y'])"
            )
        return {key: value for key, value in batch.items() if key != label}, batch[label]
    if isinstance(batch, tuple | list) and len(batch) == 2:
        return batch[0], batch[1]
    raise TypeError(
        f"a batch of {name} must be a pair (inputs, observations) or a mapping with 'labels', but is "
        f"{described(batch)}: say what is what, for instance unpack=lambda batch: ((batch[0], batch[1]), batch[2])"
    )
