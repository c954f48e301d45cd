"""One fit at a time, which leaves everything around it as it was."""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pyro
import torch
from pyro import distributions, infer, poutine
from torch import nn

__all__ = ["isolated"]

_FITTING = threading.RLock()
_SWITCHES = [
    (torch.is_grad_enabled, torch.set_grad_enabled),
    (torch.backends.mha.get_fastpath_enabled, torch.backends.mha.set_fastpath_enabled),
    (distributions.is_validation_enabled, distributions.enable_validation),
    (infer.is_validation_enabled, infer.enable_validation),
    (poutine.is_validation_enabled, poutine.enable_validation),
]
_modules: list[nn.Module] = []  # those that are being fitted now


@contextmanager
def isolated(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Run one fit in this process, alone, and restore what a fit changes around it.

    Pyro's handlers and torch's random state are global, so that two fits in two threads would corrupt each other: the
    second one waits until the first has ended. A fit inside another one's callbacks may run, but not on the same model.

    Afterwards Pyro's handlers and the switches of torch and Pyro are those of before: an interruption may come between
    the moment when a ``with`` statement throws such a switch and its block. If the fit fails or is interrupted, the
    train mode and ``requires_grad`` of every module and the random state are too.

    Args:
        modules: What is fitted.

    Raises:
        RuntimeError: If one of them is being fitted already.
    """
    with _FITTING:
        if any(module is other for module in modules for other in _modules):
            raise RuntimeError("this model is being fitted already: a callback of a fit cannot fit the same model")
        modes = [(each, each.training) for module in modules for each in module.modules()]
        trained = [(each, each.requires_grad) for module in modules for each in module.parameters()]
        handlers, random = list(pyro.poutine.runtime._PYRO_STACK), torch.get_rng_state()
        switches = [(throw, state()) for state, throw in _SWITCHES]
        _modules.extend(modules)
        try:
            yield
        except BaseException:
            for module, training in modes:
                module.training = training
            for parameter, requires_grad in trained:
                parameter.requires_grad_(requires_grad)
            torch.set_rng_state(random)
            raise
        finally:
            for throw, state in switches:
                throw(state)
            pyro.poutine.runtime._PYRO_STACK[:] = handlers
            del _modules[len(_modules) - len(modules) :]
