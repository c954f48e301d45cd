"""Checks of single arguments: each returns the value, or says which argument it is, what came and what is wanted."""

import math
import numbers
import operator
from typing import Any

from torch import Tensor, nn
from torch.distributions import Distribution

__all__ = [
    "check_flag",
    "check_function",
    "check_integer",
    "check_list",
    "check_module",
    "check_number",
    "check_parameters",
    "check_seed",
    "described",
]


def check_integer(name: str, value: Any, low: int = 0, high: int | None = None, what: str = "") -> int:
    """Return ``value`` as an int from ``low`` to ``high``; ``what`` says what it stands for.

    Raises:
        TypeError: If it is no number.
        ValueError: If it is no integer, or out of range.
    """
    try:
        number = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = None
    if number is not None and low <= number and (high is None or number <= high):
        return number
    if number is not None and number < low == 0:
        raise ValueError(f"{name} must not be negative, but got {number}")
    kind = {0: "an integer", 1: "a positive integer"}.get(low, f"an integer of at least {low}")
    if high is not None and number is not None and number > high:
        kind = f"an integer from {low} to {high}"
    wanted = kind + (f", {what}" if what else "")
    is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    raise (ValueError if is_number else TypeError)(f"{name} must be {wanted}, but got {described(value)}")


def check_seed(name: str, value: Any) -> int:
    """Return ``value`` if it is a seed of torch's generators: an integer from 0 to 2^63 - 1."""
    return check_integer(name, value, high=2**63 - 1)


def check_number(name: str, value: Any, positive: bool = True) -> float:
    """Return ``value`` as a finite number, by default a positive one.

    Raises:
        TypeError: If it is no number.
        ValueError: If it is not finite, or not positive.
    """
    wanted = "a positive number" if positive else "a finite number"
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be {wanted}, but got {described(value)}")
    number = float(value)
    if not math.isfinite(number) or (positive and number <= 0):
        raise ValueError(f"{name} must be {wanted}, but got {value}")
    return number


def check_flag(name: str, value: Any) -> bool:
    """Return ``value`` if it is True or False.

    Raises:
        TypeError: If it is neither.
    """
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, but got {described(value)}")
    return value


def check_module(name: str, value: Any) -> None:
    """Raise ``TypeError`` unless ``value`` is an instance of ``nn.Module``."""
    if not isinstance(value, nn.Module):
        raise TypeError(f"{name} must be an nn.Module, but got {described(value)}")


def check_function(name: str, value: Any, wanted: str) -> None:
    """Raise ``TypeError`` unless ``value`` is a function; modules and distributions can be called too, but are none."""
    if not callable(value) or isinstance(value, nn.Module | Distribution | type):
        raise TypeError(f"{name} must be a function {wanted}, but got {described(value)}")


def check_list(name: str, value: Any, wanted: str) -> list[Any]:
    """Return the elements of ``value``, or raise ``TypeError`` if it is a string or has none."""
    try:
        if not isinstance(value, str | bytes):
            return list(value)
    except Exception:  # classes that can be iterated over in part raise as they like
        pass
    raise TypeError(f"{name} must be a sequence of {wanted}, but got {described(value)}")


def check_parameters(**values: Any) -> None:
    """Raise ``TypeError`` unless the parameters of a distribution are real numbers or tensors."""
    for name, value in values.items():
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        is_tensor = isinstance(value, Tensor) and value.is_floating_point()
        if not (is_number or is_tensor or (isinstance(value, Tensor) and not value.is_complex() and value.dim() == 0)):
            raise TypeError(f"{name} must be a number or a floating-point tensor, but got {described(value)}")


def described(value: Any) -> str:
    """Return what ``value`` is in a few words, for an error message."""
    if value is None:
        return "None"
    if isinstance(value, type):
        return f"the class {value.__name__}, not an instance"
    if isinstance(value, str | bool | int | float | complex):
        return f"{str(value)[:60]!r}" if isinstance(value, str) else f"{value}"
    shape = getattr(value, "shape", None)
    kind = type(value).__name__
    if shape is not None and hasattr(value, "dtype"):
        return f"a {kind} of shape {tuple(shape)} and dtype {value.dtype}"
    if callable(value) and hasattr(value, "__name__"):
        return f"the function {value.__name__}"
    return f"{'an' if kind[0] in 'AEIOUaeiou' else 'a'} {kind}"
