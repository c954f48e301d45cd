"""Fitting: stochastic variational inference, pruning, and fine-tuning of what remains."""

from collections.abc import Sequence
from contextlib import closing, nullcontext
from typing import TYPE_CHECKING, Any, Unpack

import torch
from torch import Tensor

from pyro_bmrs.checks import check_flag, check_integer, check_seed, described
from pyro_bmrs.eval_mode import evaluating
from pyro_bmrs.io.files import PathLike
from pyro_bmrs.model.guides.flat import FlatGuide
from pyro_bmrs.model.network import NoisyNetwork
from pyro_bmrs.randomness import local_seed
from pyro_bmrs.structures.copying import undisturbed
from pyro_bmrs.structures.inputs import first_examples, on_device
from pyro_bmrs.structures.refusal import removable_structures
from pyro_bmrs.structures.structure_set import StructureSet, check_structures
from pyro_bmrs.svi.advice import Advice
from pyro_bmrs.svi.callbacks import Callback, Callbacks, FabricLoggers, JSONLines, ProgressBar
from pyro_bmrs.svi.checkpointing import Checkpointing
from pyro_bmrs.svi.data.making import Data
from pyro_bmrs.svi.data.source import Batch, Source
from pyro_bmrs.svi.data.unpacking import Unpack as UnpackBatch
from pyro_bmrs.svi.devices import check_dtypes, check_precision, keep_freed_memory, make_fabric
from pyro_bmrs.svi.elbo import MeanFieldELBO, ObservedLogProb
from pyro_bmrs.svi.isolation import isolated
from pyro_bmrs.svi.problem import problem_fingerprints
from pyro_bmrs.svi.pruner import Pruner
from pyro_bmrs.svi.pruning import Pruning
from pyro_bmrs.svi.result import FitResult, FitWarning
from pyro_bmrs.svi.run import Member, Run
from pyro_bmrs.svi.run_folder import RunFolder
from pyro_bmrs.svi.settings import (
    FitSettings,
    check_callbacks,
    check_model_and_guide,
    checked_settings,
    counting_examples,
    prepare,
)
from pyro_bmrs.svi.trained_model import TrainedModel
from pyro_bmrs.svi.training import Trainer
from pyro_bmrs.warn import warn

if TYPE_CHECKING:
    from lightning_fabric import Fabric

__all__ = ["fit"]

_FITTED = (
    "the model has been fitted before: this fit goes on from there, without the structures removed then; make model "
    "and guide anew for a fresh start"
)


def fit(
    model: NoisyNetwork,
    guide: FlatGuide,
    train: Data,
    validation: Data | None = None,
    *,
    unpack: UnpackBatch | None = None,
    structures: StructureSet | None = None,
    precision: str = "32-true",
    fabric: "Fabric | None" = None,
    compile: bool = False,  # noqa: A002  (torch's name for it)
    seed: int | None = None,
    callbacks: Sequence[Callback] = (),
    folder: PathLike | None = None,
    checkpoint_every: int = 1,
    resume: bool = False,
    **settings: Unpack[FitSettings],
) -> FitResult:
    r"""Fit weights and posterior by SVI, remove what the criterion would, and fine-tune the rest.

    First ``epochs`` epochs with noise, pruned as ``pruning`` says; then ``fine_tune_epochs`` with every
    :math:`\theta` of the remaining structures at its posterior mean. Adam for both, learning rates decaying along a
    cosine to zero: the weights' over all epochs, the posterior's over those with noise.

    Args:
        model: The model. Fitted in place, and left in eval mode. Its ``num_data`` stands for the size of ``train``
            while it is None; any other number is used as it is.
        guide: Its guide. Fitted in place, and with it the guide of the model's other latent sites, if there are any
            (``guide.add_latents``).
        train: Inputs and observations of shape ``(n, ...)``, as a pair of tensors or NumPy arrays, where inputs may be
            a tuple or a mapping of them; or a mapping with ``"labels"``; a ``Dataset``; a ``DataLoader``; or any
            iterable of batches that has a length and gives them anew each time. All but the first two are loaded as
            they are used. Inputs of dtype uint8 are divided by 255 when used.
        validation: The same, to report on after every epoch; never used to decide anything.
        unpack: From a batch to inputs and observations, where it is neither a pair nor a mapping with ``"labels"``.
        structures: What ``find_structures`` has said of the network; found and proved by default.
        precision: ``"32-true"``: everything in the dtype of the model, float32 or float64. ``"64-true"``: the same,
            and the model must be of float64. ``"bf16-mixed"`` or ``"16-mixed"``: the network computes in less;
            weights, posterior and KL stay as they are.
        fabric: A launched ``lightning_fabric.Fabric`` instead of ``device`` and ``precision``: several processes (DDP,
            under torchrun or SLURM too) and loggers (TensorBoard, W&B). Every process calls ``fit`` with the same
            arguments and gets the same result; each draws its own noise.
        compile: Whether to compile steps, which takes its time once (on CUDA to capture them as a graph, which does
            not): for long fits.
        seed: Seed of data order and noise; the caller's random state is left alone. None draws from it instead.
        callbacks: Called at every epoch, every pruning and the end.
        folder: Where to keep ``metrics.jsonl``, one line per epoch, and ``checkpoint/fit.safetensors``.
        checkpoint_every: Epochs between checkpoints; there is always one at the end.
        resume: Whether to go on from the checkpoint in ``folder``, if there is one, to the same result, to the bit on
            a CPU, as a fit without interruption. One that is finished is only read. The checkpoint must be of a fit
            with these arguments, data, network, likelihood and criterion. A ``DataLoader``'s order and augmentation
            are brought back too, and the state of a loader that has ``state_dict``; what cannot be is said at the
            start.
        settings: ``criterion``, ``pruning``, ``epochs``, ``fine_tune_epochs``, ``batch_size``, ``lr``,
            ``posterior_lr``, ``kl_warmup_epochs``, ``decay``, ``granularity``, ``device``, ``unremovable`` and
            ``progress``: see ``FitSettings``.

    Returns:
        Masks, last scores and the history.

    Fits run one at a time: one in another thread waits. If a fit fails or is interrupted, train modes,
    ``requires_grad`` and the random state are as before it; weights and posterior are as far as it has got.

    Raises:
        TypeError, ValueError: If the data or an argument does not fit; before training starts, and with everything of
            the caller's as it was.
        FloatingPointError: If the loss, a gradient or a parameter stops being finite; names the step, what is not
            finite, and the last good checkpoint.
        FileExistsError: If there is a checkpoint in ``folder`` already and ``resume`` is False.
        RuntimeError: If another fit is running in ``folder``, or the same model is being fitted by the fit that calls
            this one.
        OSError: If ``folder`` cannot be written to.

    Warns:
        FitWarning: If the model has been fitted before, ``num_data`` is not the size of ``train``, or the fit ends
            with nothing to show for it.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), bmrs.MultiplicativeNoise(16), nn.Linear(16, 2))
        >>> model = bmrs.NoisyNetwork(net)
        >>> guide = bmrs.TruncatedLogNormalGuide(model)
        >>> x = torch.randn(64, 4)
        >>> result = bmrs.fit(model, guide, (x, (x[:, 0] > 0).long()), epochs=200, seed=0, progress=False)
        >>> result.compression > 0
        True
    """
    check_model_and_guide(model, guide)
    chosen = checked_settings(fit, settings)
    criterion, pruning = chosen["criterion"], chosen["pruning"]
    _check_numbers(checkpoint_every, seed)
    _check_switches(compile, resume, folder, pruning, guide)
    elbo = MeanFieldELBO(chosen["granularity"])
    fabric = make_fabric(chosen["device"], precision) if fabric is None else _check_fabric(fabric)
    check_dtypes(model, guide, fabric.strategy.precision.precision)
    if structures is not None:
        check_structures(model.net, structures)
    ready = prepare([(model, guide)], train, validation, chosen, unpack)
    data, rates, plan = ready.data, ready.rates, ready.plan
    _check_streams(data, fabric, compile, folder is not None)
    run_folder = None if folder is None else RunFolder(folder, fabric, resume)
    listed = _listed(fabric, check_callbacks(callbacks), run_folder, chosen["progress"])
    with isolated([model, guide]), counting_examples(model, data.size):
        identity: dict[str, Any] = {
            "pruning": repr(pruning),
            "rates": repr(rates),
            "batch_size": data.batch_size,
            "granularity": elbo.granularity,
            "processes": fabric.world_size,
            "precision": fabric.strategy.precision.precision,
            "seed": seed,
        }
        if run_folder is not None:
            identity |= problem_fingerprints(model, guide, criterion, data, ready.validation)
        x, y = _first_batch(data, model, guide)
        known = removable_structures(model.net, first_examples(x, 2), structures, chosen["unremovable"])
        Pruner(model, guide, criterion, (x, y), known).check_criterion()
        shared = fabric.broadcast(int(torch.randint(2**31, ())) if seed is None else seed)
        with (
            local_seed(shared + fabric.global_rank, [fabric.device], validate=False),
            run_folder or nullcontext(),
            closing(Callbacks(listed)) as all_callbacks,
        ):
            model.to(fabric.device)
            guide.to(fabric.device)
            ready.place(fabric.device)
            keep_freed_memory(fabric.device)
            order = torch.Generator().manual_seed(shared)
            trained = TrainedModel(fabric, model, guide, elbo, data, order, compile)
            pruner = Pruner(model, guide, criterion, _on(data.first, model, fabric.device), known)
            member = Member.of(pruner, ready.validation, rates.noisy_epochs, all_callbacks)
            run = Run(Trainer(trained, rates, compile and fabric.device.type == "cuda"), [member], pruning, plan, data)
            advice = Advice(member.history, pruner, rates, data)
            kept = None if run_folder is None else Checkpointing(run, trained, identity, run_folder, checkpoint_every)
            if kept is not None and kept.exists():
                kept.resume()
            elif model.fitted and rates.noisy_epochs:
                warn(_FITTED, FitWarning)
            try:
                run.go(None if kept is None else kept.save_if_due)
            except FloatingPointError as error:
                last = "" if kept is None else kept.last_good()
                raise FloatingPointError(f"{error}{last}") from None
            result = member.end(run.seconds)
            if fabric.is_global_zero:
                advice.give()
    return result


def _check_numbers(checkpoint_every: Any, seed: Any) -> None:
    check_integer("checkpoint_every", checkpoint_every, low=1)
    if seed is not None:
        check_seed("seed", seed)


def _check_switches(compiled: Any, resume: Any, folder: Any, pruning: Pruning, guide: FlatGuide) -> None:
    for name, flag in (("compile", compiled), ("resume", resume)):
        check_flag(name, flag)
    if resume and folder is None:
        raise ValueError("resume=True needs the folder whose checkpoint to go on from")
    if compiled and guide.listeners:
        raise ValueError("compile=True excludes listening to training's gradients: leave one of them out")
    if guide.latents is not None and (compiled or pruning.shrinks):
        raise ValueError(
            f"{'compile' if compiled else 'shrink'}=True is for noise alone, but the guide has other latent sites: "
            "leave it out"
        )
    if compiled and pruning.shrinks:
        raise ValueError("compile and shrink exclude each other: whatever shrinks would have to be compiled anew")


def _check_streams(data: Source, fabric: "Fabric", compiled: bool, kept: bool) -> None:
    """Raise where steps cannot run on these data, and say what of them a resumed fit cannot bring back."""
    if data.batch_size < fabric.world_size:
        raise ValueError(
            f"batch_size must be at least 1 for each of {fabric.world_size} processes, but is {data.batch_size} for "
            f"{data.size} examples"
        )
    if compiled and not isinstance(data.first[0], Tensor):
        raise ValueError("compile=True takes inputs of one tensor: a tuple or mapping of them needs compile=False")
    if kept and data.lost_on_resume:
        warn(
            f"a resumed fit will not be the same as one without interruption, since {data.lost_on_resume} is lost",
            FitWarning,
        )


def _listed(
    fabric: "Fabric", callbacks: Sequence[Callback], folder: RunFolder | None, progress: bool
) -> list[Callback]:
    """Return all callbacks of the fit, in the first process."""
    if not fabric.is_global_zero:
        return []
    own = [] if folder is None else [JSONLines(folder.metrics)]
    return [FabricLoggers(fabric), *callbacks, *own, *([ProgressBar()] if progress else [])]


def _check_fabric(fabric: Any) -> "Fabric":
    from lightning_fabric import Fabric  # noqa: PLC0415  (takes half as long to import as torch)

    if not isinstance(fabric, Fabric):
        raise TypeError(f"fabric must be a lightning_fabric.Fabric, but got {described(fabric)}")
    check_precision(fabric.strategy.precision.precision)
    if fabric.world_size > 1 and not torch.distributed.is_initialized():
        raise ValueError(f"the Fabric of {fabric.world_size} processes is not launched: call fabric.launch() first")
    return fabric


def _first_batch(data: Source, model: NoisyNetwork, guide: FlatGuide) -> Batch:
    """Return the first batch on the guide's device.

    The guide of other latent sites is run on it once, and the network: a latent site that no guide has is refused here.
    """
    x, y = _on(data.first, model, guide.device)
    if guide.latents is not None:
        guide.latents.set_up(x, y)
    points = guide.points()
    with undisturbed(model.net), evaluating(model), ObservedLogProb():
        model.run(first_examples(x, 2), points)
    return x, y


def _on(batch: Batch, model: NoisyNetwork, device: torch.device) -> Batch:
    return on_device(batch[0], device, model.net), batch[1].to(device)
