"""BatchNorm recalibration: after pruning, the running statistics are measured again; no weight changes.

Pruning shifts the activations, and a BatchNorm layer in evaluation mode still normalises by the mean and variance that
they had before. Its statistics are therefore reset and become the mean, over some batches, of each batch's mean and
unbiased variance. Meanwhile BatchNorm layers alone are in training mode, so that each layer sees inputs that were
normalised by the batch; all others (dropout, for example) are in evaluation mode.

Meanwhile the layers have buffers of their own for that. What is measured is written into the model's at the end, for
those layers that a batch has reached; so whatever fails before, the model is as it was.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parameter import is_lazy

from sfw_dist.distributed.dtensor import reshard
from sfw_dist.distributed.world import World, sum_over_ranks
from sfw_dist.errors import UserError
from sfw_dist.pruning.batches import model_arguments
from sfw_dist.pruning.modes import evaluation_mode
from sfw_dist.pruning.result import Pruning, all_or_nothing

Statistics = dict[str, Tensor]
"""BatchNorm's buffers (running_mean, running_var, num_batches_tracked) by their name in the model."""

_BUFFERS = ("running_mean", "running_var", "num_batches_tracked")
_NO_BATCH = "no batch to recalibrate BatchNorm with: give at least one"


def batch_norms(model: nn.Module) -> dict[str, _BatchNorm]:
    """The BatchNorm layers that keep running statistics, by name; those that normalise by the batch need none.

    Raises:
        UserError: one that has no statistics yet, because it is lazy or on the meta device.
    """
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm) and module.track_running_stats and module.running_mean is not None:
            if is_lazy(module.running_mean):
                raise UserError(f"{name} is not initialised yet: run one batch through the model first")
            if module.running_mean.is_meta:
                raise UserError(f"{name} is on the meta device, without values: load the weights first")
            found[name] = module
    return found


def recalibrate(model: nn.Module, loader: Iterable[Any], device: torch.device | str | int | None = None) -> int:
    """Measure BatchNorm's running statistics again, in place, over all batches of ``loader``.

    Each is the mean over the batches that reached the layer, as after :func:`torch.optim.swa_utils.update_bn`. A layer
    that no batch has reached keeps its statistics. Frozen layers, in evaluation mode in a model that trains, are
    measured too.

    Args:
        model: weights, modes and momenta are afterwards what they were; if anything fails or interrupts, so are all
            statistics. Without BatchNorm nothing is done. Compiled, in ``DataParallel``, or with FSDP2
            (``fully_shard``; every rank must then call this, with as many batches). Of a model in
            ``DistributedDataParallel`` each rank measures its own copy.
        loader: batches: inputs of the model, or tuples or lists that begin with them, such as ``(inputs, labels)``.
            Inputs that are a dictionary (as Hugging Face's) become keyword arguments, those that ``model.forward``
            does not take being left out. The same batches on every rank give every rank the same statistics.
        device: to which tensors are moved. ``None``: where the model's first parameter is.

    Returns:
        The number of batches; 0 without BatchNorm.

    Raises:
        UserError: there is no batch, a batch of which the model takes nothing, or BatchNorm that has no statistics yet.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 2), nn.BatchNorm1d(2))
        >>> loader = [(torch.randn(8, 4), torch.randint(0, 2, (8,))) for _ in range(2)]
        >>> recalibrate(net, loader)
        2
        >>> int(net[1].num_batches_tracked)
        2
    """
    norms = batch_norms(model)
    if not norms:
        return 0
    device = _device_of(model) if device is None else torch.device(device)
    # DDP would send rank 0's buffers to the others.
    inner = getattr(model, "_orig_mod", model)
    called = inner.module if isinstance(inner, DistributedDataParallel) else model
    measured = _reset(norms)
    count = 0
    try:
        with _averaging(model, norms), _with_statistics(norms, measured), torch.no_grad():
            for batch in loader:
                arguments, keywords = model_arguments(model, batch, device)
                called(*arguments, **keywords)
                count += 1
    finally:
        reshard(model)
    if count == 0:
        raise UserError(_NO_BATCH)
    with torch.no_grad(), all_or_nothing() as write:
        for name, buffer in _reached(norms, measured).items():
            write(model.get_buffer(name), buffer)
    return count


def recalibrated_statistics(
    model: nn.Module, prunings: Sequence[Pruning], batches: Iterable[Any], world: World
) -> list[Statistics]:
    """The statistics that `recalibrate` would give to ``model`` after each pruning, in one pass; collective.

    Each pruned model is measured by one rank, on all of the batches, and the others receive what it found: the answer
    does not depend on the number of ranks.

    Args:
        model: does not change; every rank has it whole.
        prunings: the same on every rank.
        batches: inputs of the model, as for `recalibrate`; the same on every rank.
        world: the ranks that share the work.

    Returns:
        Statistics for each pruning; empty ones without BatchNorm.

    Raises:
        UserError: there is no batch, parameters are DTensors, or SyncBatchNorm would mix what different ranks measure.
    """
    norms = batch_norms(model)
    everyone = [_reset(norms) for _ in prunings]
    if not any(everyone):
        return everyone
    _check_independent(model, world)
    mine, count = range(world.rank, len(prunings), world.size), 0
    if mine:
        with _averaging(model, norms), torch.no_grad():
            for batch in batches:
                arguments, keywords = model_arguments(model, batch, _device_of(model))
                for i in mine:
                    with _with_statistics(norms, everyone[i]):
                        functional_call(model, prunings[i].pruned_parameters(model), arguments, keywords)
                count += 1
    # All ranks but one add zeros: in float64 the sum is that one's value, of a float32 or a count, to the bit.
    flat = [tensor.flatten().double() for statistics in everyone for tensor in statistics.values()]
    owned = [i in mine for i, statistics in enumerate(everyone) for _ in statistics]
    pieces = [piece if own else torch.zeros_like(piece) for piece, own in zip(flat, owned, strict=True)]
    pieces.append(pieces[0].new_full((1,), count))
    *summed, batches_run = sum_over_ranks(torch.cat(pieces), world).split([len(piece) for piece in pieces])
    if not batches_run:
        raise UserError(_NO_BATCH)
    total = iter(summed)
    return [
        _reached(norms, {name: next(total).view(x.shape).to(x.dtype) for name, x in statistics.items()}, whole=True)
        for statistics in everyone
    ]


def _check_independent(model: nn.Module, world: World) -> None:
    """Raise :class:`UserError` for a model that ranks cannot run each for itself, or not with other parameters."""
    for name, parameter in model.named_parameters():
        if isinstance(parameter, DTensor):
            raise UserError(
                f"{name} is a DTensor with placements {parameter.placements}, and many prunings at a time need whole "
                "parameters: prune and recalibrate one after the other, or load the model whole"
            )
    if any(isinstance(module, FSDPModule) for module in model.modules()):
        raise UserError("the model is divided by fully_shard: prune and recalibrate one after the other")
    if world.size > 1 and any(isinstance(module, nn.SyncBatchNorm) for module in model.modules()):
        raise UserError("SyncBatchNorm would mix the statistics of different prunings: load the model with BatchNorm")


def _device_of(model: nn.Module) -> torch.device:
    return next(chain(model.parameters(), model.buffers())).device


def _buffer_names(norms: Mapping[str, _BatchNorm]) -> Iterator[tuple[_BatchNorm, str, str]]:
    """Each layer's statistics: the layer, their name in it, and their name in the model."""
    for name, norm in norms.items():
        for key in _BUFFERS:
            yield norm, key, f"{name}.{key}" if name else key


def _reset(norms: Mapping[str, _BatchNorm]) -> Statistics:
    """New buffers, as `reset_running_stats` leaves them; also a counter for a layer that has none."""
    buffers: Statistics = {}
    for norm, key, name in _buffer_names(norms):
        buffer = getattr(norm, key)
        if buffer is None:
            assert norm.running_mean is not None
            buffer = torch.zeros((), dtype=torch.int64, device=norm.running_mean.device)
        buffers[name] = torch.ones_like(buffer) if key == "running_var" else torch.zeros_like(buffer)
    return buffers


def _reached(norms: Mapping[str, _BatchNorm], measured: Statistics, whole: bool = False) -> Statistics:
    """What was measured, of the layers that a batch has reached.

    Args:
        norms: the layers.
        measured: by their names in the model.
        whole: whether the statistics that a layer has are given instead, where none has reached it.
    """
    found: Statistics = {}
    for norm, key, name in _buffer_names(norms):
        prefix, _, _ = name.rpartition(key)
        before = getattr(norm, key)
        if before is not None and bool(measured[f"{prefix}num_batches_tracked"]):
            found[name] = measured[name]
        elif before is not None and whole:
            found[name] = before.clone()
    return found


@contextmanager
def _with_statistics(norms: Mapping[str, _BatchNorm], statistics: Statistics) -> Iterator[None]:
    """The layers use these buffers inside the block, and update them in place."""
    before = [(norm, key, getattr(norm, key)) for norm, key, _ in _buffer_names(norms)]
    try:
        for norm, key, name in _buffer_names(norms):
            setattr(norm, key, statistics[name])
        yield
    finally:
        for norm, key, buffer in before:
            setattr(norm, key, buffer)


@contextmanager
def _averaging(model: nn.Module, norms: Mapping[str, _BatchNorm]) -> Iterator[None]:
    """BatchNorm alone in training mode, its statistics the mean of all batches; afterwards all is as before."""
    momenta = {norm: norm.momentum for norm in norms.values()}
    with evaluation_mode(model, except_for=norms.values()):
        try:
            for norm in momenta:
                norm.momentum = None  # for torch this means the mean of all batches
            yield
        finally:
            for norm, momentum in momenta.items():
                norm.momentum = momentum
