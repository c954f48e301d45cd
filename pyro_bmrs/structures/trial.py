"""Proof by trial: nothing is offered whose removal has not been tried on a copy of the network."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pyro_bmrs.structures.copying import copied, undisturbed
from pyro_bmrs.structures.equality import difference
from pyro_bmrs.structures.inputs import Inputs, call, call_example, output_tensors, random_like, to_network
from pyro_bmrs.structures.record import Record
from pyro_bmrs.structures.removal import cut, fixed_copy
from pyro_bmrs.structures.sampled_weights import fix_sampled_weights
from pyro_bmrs.structures.structure_set import StructureSet

__all__ = ["Bench", "proved", "randomise_trivial"]

TOLERANCE = 1e-9
_LAST_DIGITS = 1e-15
_AMPLIFIED = 100  # times what the network itself makes of its parameters' last digits
_TRIALS, _TRIALS_OF_LARGE = 12, 4
_SMALL = 1_000_000  # parameters: of smaller networks a trial takes milliseconds
LOW_PRECISION_TOLERANCE = 1e-4  # of networks that compute in less than float64 by themselves


@torch.no_grad()
def randomise_trivial(net: nn.Module, generator: torch.Generator) -> None:
    """Give parameters and buffers that are zero or constant random values, in place: a trial of them proves nothing."""
    tensors = [*net.parameters(), *(b for b in net.buffers() if b.numel() > 1)]
    for tensor in tensors:
        if not tensor.is_floating_point() or not bool((tensor == tensor.reshape(-1)[0]).all()):
            continue
        value = float(tensor.reshape(-1)[0])
        if value > 0:  # perhaps a variance, or another scale
            factors = 0.5 + torch.rand(tensor.shape, generator=generator, dtype=torch.float64)
            tensor.mul_(factors.to(tensor))
        else:
            tensor.add_(0.3 * torch.randn(tensor.shape, generator=generator, dtype=torch.float64).to(tensor))


@dataclass
class Bench:
    """A copy of a network in float64, if it runs in that, to try removals on, with inputs like the example.

    Attributes:
        net: The copy; its noise layers multiply by nothing.
        inputs: Random inputs, one set for each trial.
        tolerance: The largest difference that passes.
    """

    net: nn.Module
    inputs: list[Inputs]
    tolerance: float

    @classmethod
    def of(
        cls,
        net: nn.Module,
        example_inputs: Inputs,
        low_precision: bool = False,
        trials: int | None = None,
        randomise: bool = True,
    ) -> "Bench":
        """Prepare a bench for ``net``, which is copied; its trivial tensors are randomised if asked for."""
        if trials is None:
            trials = _TRIALS if sum(each.numel() for each in net.parameters()) < _SMALL else _TRIALS_OF_LARGE
        generator = torch.Generator().manual_seed(0)
        net = copied(net)
        with undisturbed(net):
            fix_sampled_weights(net)
        copy, tolerance = copied(net).eval().double(), LOW_PRECISION_TOLERANCE if low_precision else TOLERANCE
        if not _runs(copy, example_inputs):  # it is written for another dtype
            copy, tolerance = copied(net).eval(), LOW_PRECISION_TOLERANCE
            with undisturbed(copy):
                call_example(copy, to_network(example_inputs, copy))
        if randomise:
            randomise_trivial(copy, generator)
        example_inputs = to_network(example_inputs, copy)
        inputs = [random_like(example_inputs, generator, plain=i == 1) for i in range(trials)]
        return cls(copy, inputs, tolerance)

    def run(self, net: nn.Module, trial: int) -> Any:
        """Run a network on the inputs of a trial, random operations in it alike."""
        torch.manual_seed(trial)
        return call(net, self.inputs[trial])

    def runs_in_training(self, net: nn.Module) -> bool:
        """Return whether a copy runs in train mode; it is left in eval mode, but for statistics that have moved."""
        kept = {name: buffer.clone() for name, buffer in net.named_buffers()}
        try:
            self.run(net.train(), 0)
        except Exception:  # whatever it raises
            return False
        finally:
            net.eval()
            for name, buffer in net.named_buffers():
                if name in kept and buffer.shape == kept[name].shape:
                    buffer.copy_(kept[name])
        return True

    def expected(self, net: nn.Module, trial: int) -> Any:
        """Run the network that others are compared with; where its outputs are not finite, on the first inputs."""
        expected = self.run(net, trial)
        if not _finite(expected):
            self.inputs[trial] = self.inputs[0]
            expected = self.run(net, trial)
        return expected

    def error(self, found: Any, expected: Any, net: nn.Module, trial: int) -> float | None:
        """Return how far outputs are from the expected ones of ``net``, or None where that is within rounding.

        A network may amplify rounding, where it divides by what is almost zero for instance: where outputs are off, it
        is asked how far its own move if its parameters do in their last digits.
        """
        off = difference(found, expected)
        if off <= self.tolerance:
            return None
        moved = copied(net)
        for parameter in moved.parameters():
            if parameter.is_floating_point():
                parameter.data *= 1 + _LAST_DIGITS * torch.randn(parameter.shape).to(parameter)
        rounding = difference(self.run(moved, trial), expected)
        return None if off <= min(_AMPLIFIED * rounding, LOW_PRECISION_TOLERANCE) else off

    def attempt(self, record: Record, trial: int) -> str | None:
        """Try one removal and return what is wrong with it, if anything.

        The first two trials remove a random half of every site, the next two empty every other site too, and further
        ones leave some sites alone.
        """
        masks, values = _random_noise(record, trial)
        with undisturbed(self.net), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                fixed = fixed_copy(self.net, record, values)
                expected = self.expected(fixed, trial)
                smaller = cut(copied(fixed), record, masks, values)
                off = self.error(self.run(smaller, trial), expected, fixed, trial)
            except Exception as error:  # whatever a network raises once it is smaller
                return f"the network fails without them ({type(error).__name__}: {_first_line(error)})"
            if off is not None:
                torch.manual_seed(trial + len(self.inputs))
                if difference(call(fixed, self.inputs[trial]), expected) > self.tolerance:
                    return "the network draws random numbers in eval mode, so that its outputs cannot be compared"
                return f"its outputs are off by {off:.1e} of their spread without them"
            if trial == 0 and self.runs_in_training(fixed) and not self.runs_in_training(smaller):
                return "the network fails without them in train mode, where it uses layers that it does not use now"
        expected_count = sum(each.numel() for each in smaller.parameters())
        counted = record.count_parameters(record.dead(masks))
        if counted != expected_count:
            return f"it has {expected_count} parameters without them, where {counted} were expected"
        return None


def _runs(net: nn.Module, example_inputs: Inputs) -> bool:
    with undisturbed(net):
        try:
            call(net, to_network(example_inputs, net))
        except Exception:  # whatever a network raises
            return False
    return True


def _finite(output: Any) -> bool:
    return all(bool(torch.isfinite(each).all()) for each in output_tensors(output))


def _first_line(error: Exception) -> str:
    return (str(error).strip() or "no message").splitlines()[0][:150]


def _random_noise(record: Record, trial: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    masks, values = {}, {}
    for i, (name, site) in enumerate(record.sites.items()):
        generator = torch.Generator().manual_seed(1000 * i + trial)
        mask = _random_mask(site.before, generator)
        if trial in (2, 3) and i % 2 == trial % 2:
            mask[:] = False
        if trial > 3 and float(torch.rand((), generator=generator)) < 0.4:
            mask[:] = True
        masks[name] = mask
        values[name] = (0.5 + torch.rand(site.size, generator=generator, dtype=torch.float64)) * mask
    return masks, values


def _random_mask(classes: Tensor, generator: torch.Generator) -> Tensor:
    """Return a mask that removes half of the classes as a whole, and of the others some structures."""
    found, of = classes.unique(return_inverse=True)
    order = torch.randperm(len(found), generator=generator)
    removed = torch.zeros(len(found), dtype=torch.bool)
    removed[order[: (len(found) + int(torch.randint(2, (), generator=generator))) // 2]] = True
    removed[order[-1]] = False
    mask = ~removed[of]
    if len(found) < len(classes):
        mask &= torch.rand(len(classes), generator=generator) < 0.7
    return mask


def proved(structures: StructureSet, bench: Bench) -> StructureSet:
    """Return the structures and sites whose removal passes a trial, the others refused.

    All are tried jointly first, and by halves where that fails; in the end what is offered has passed jointly.
    """
    record = structures.record
    refused: dict[str, str] = {}
    accepted: list[str] = []

    def trouble(names: Sequence[str], record: Record) -> str | None:
        trying = record.restricted({name: structures[name] for name in names if name in structures}, names)
        tries = (bench.attempt(trying, trial) for trial in range(len(bench.inputs)))
        return next((wrong for wrong in tries if wrong), None)

    def search(names: list[str]) -> None:
        wrong = trouble([*accepted, *names], record) if names else None
        if wrong is None:
            accepted.extend(names)
        elif len(names) == 1:
            refused[names[0]] = f"its removal was tried, and {wrong}"
        else:
            search(names[: len(names) // 2])
            search(names[len(names) // 2 :])

    placed = [site for site, where in record.sites.items() if where.module is None]
    search([*placed, *structures])
    for name in list(refused):  # perhaps for want of knowing what a module calls its number of heads
        classes = structures[name].classes if name in structures else record.sites[name].before
        guessing = record.guessing_heads(classes)
        if guessing is not record and trouble([*accepted, name], guessing) is None:
            record = guessing
            accepted.append(name)
            del refused[name]
    kept = {name: each for name, each in structures.items() if name not in refused}
    masked_only = [site for site in placed if site in refused]
    return StructureSet(kept, {**structures.refused, **refused}, record.frozen(masked_only), proved=True)
