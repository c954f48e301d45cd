"""Where a fit runs: devices, precision and processes, by Lightning Fabric."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from pyro_bmrs.checks import described

if TYPE_CHECKING:
    from lightning_fabric import Fabric

__all__ = ["check_dtypes", "check_precision", "keep_freed_memory", "make_fabric", "place", "resolve_device"]

_LARGEST_KEPT = 2**25 - 2**13  # bytes; glibc does not keep more
_PRECISIONS = ("32-true", "64-true", "bf16-mixed", "16-mixed")


def resolve_device(device: str | torch.device) -> torch.device:
    """Return the device called ``device``; ``"auto"`` is CUDA where there is one, else the CPU.

    Raises:
        TypeError: If it is no name of a device.
        ValueError: If there is no such device here.
    """
    if isinstance(device, str) and device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not isinstance(device, str | torch.device):
        raise TypeError(f'device must be "auto", "cpu", "cuda" or a torch.device, but got {described(device)}')
    try:
        found = torch.device(device)
    except RuntimeError:
        found = None
    available = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
    if found is None or (found.index or 0) >= available.get(found.type, 0):
        here = ", ".join(f"{count} {name}" for name, count in available.items() if count)
        raise ValueError(f"device is {str(device)!r}, but the devices here are {here}")
    return found


def make_fabric(device: str | torch.device, precision: str) -> "Fabric":
    """Return a Fabric for one process on ``device``.

    Raises:
        ValueError: If ``precision`` is none that a fit can use.
    """
    from lightning_fabric import Fabric  # noqa: PLC0415  (takes half as long to import as torch)

    check_precision(precision)
    target = resolve_device(device)
    devices = 1 if target.index is None or target.type == "cpu" else [target.index]
    return Fabric(accelerator=target.type, devices=devices, precision=precision)  # type: ignore[arg-type]


def check_precision(precision: str) -> None:
    """Raise ``ValueError`` unless posterior and weights stay in float32 or better."""
    if not (isinstance(precision, str) and precision in _PRECISIONS):
        raise ValueError(
            f"precision must be one of {', '.join(_PRECISIONS)}, but got {precision!r}: posterior parameters lose the "
            "digits that decide in anything below float32"
        )


def check_dtypes(model: nn.Module, guide: nn.Module, precision: str) -> None:
    """Raise ``ValueError`` unless weights and posterior are of dtypes that can be fitted with ``precision``."""
    for name, module in (("model", model), ("guide", guide)):
        for parameter_name, parameter in module.named_parameters():
            if not (parameter.requires_grad and parameter.is_floating_point()):
                continue
            bits = torch.finfo(parameter.dtype).bits
            if module is guide and bits < 32:
                raise ValueError(
                    f"parameter {parameter_name!r} of the guide is of {parameter.dtype}, which loses the digits that "
                    "decide: use guide.float()"
                )
            if precision == "64-true" and bits < 64:
                raise ValueError(
                    f'precision is "64-true", but parameter {parameter_name!r} of the {name} is of {parameter.dtype}: '
                    "use model.double() and guide.double(), and data of float64"
                )


def place(tensor: Tensor, device: torch.device) -> Tensor:
    """Return ``tensor`` on the device if it takes at most half of the memory that is free there, else pinned here."""
    if device.type != "cuda":
        return tensor.to(device)
    free, _ = torch.cuda.mem_get_info(device)
    fits = tensor.numel() * tensor.element_size() <= free // 2
    return tensor.to(device) if fits else tensor.pin_memory()


def keep_freed_memory(device: torch.device) -> None:
    """Have the C library keep for the next step the memory that a step on the CPU frees, where it is glibc.

    It hands back to the system what is free beyond twice the largest block that was ever freed, up to a limit; larger
    steps exceed that every time, and getting the memory again costs about a tenth of the time of a large step.
    """
    if device.type == "cpu":
        torch.empty(_LARGEST_KEPT, dtype=torch.uint8)
