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
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy

from sfw_dist.distributed.dtensor import reshard, to_local
from sfw_dist.distributed.rank_group import RankGroup
from sfw_dist.errors import UserError
from sfw_dist.pruning.measuring.batches import check_loader, device_of, input_batches, without_ddp
from sfw_dist.pruning.measuring.lockstep import is_divided, lockstep
from sfw_dist.pruning.measuring.overwriting import overwriting
from sfw_dist.pruning.modes import evaluation_mode
from sfw_dist.pruning.result import Pruning, all_or_nothing
from sfw_dist.pruning.scope import LAZY

Statistics = dict[str, Tensor]
"""BatchNorm's buffers (running_mean, running_var, num_batches_tracked) by their name in the model."""

AS_TRAINED: Statistics = {}
"""Overrides nothing."""

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
                raise UserError(f"{name} {LAZY}")
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
        The number of batches with samples; 0 without BatchNorm.

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
    check_loader(loader, "loader")
    device = device_of(model) if device is None else torch.device(device)
    called = without_ddp(model)
    measured = _reset(norms)
    count = 0
    try:
        with _averaging(model, norms), _with_statistics(norms, measured), torch.no_grad():
            for batch in input_batches(model, loader, device):
                batch.call(called)
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
    model: nn.Module,
    prunings: Sequence[Pruning],
    batches: Iterable[Any],
    ranks: RankGroup,
    *,
    device: torch.device | None = None,
    same_batches: bool = False,
) -> list[Statistics]:
    """The statistics that `recalibrate` would give to ``model`` after each pruning, in one pass; collective.

    They are the mean over all ranks' batches, the same on every rank.

    Args:
        model: afterwards to the bit what it was.
        prunings: the same on every rank.
        batches: of this rank; inputs of the model, as for `recalibrate`. A divided model (FSDP2) needs at least one on
            every rank.
        ranks: who shares the work.
        device: to which tensors are moved. ``None``: where the model's first parameter is.
        same_batches: every rank has the same batches; then each measures some of the prunings, unless the model is
            divided. Statistics are to the bit those of one process.

    Returns:
        Statistics for each pruning; empty ones without BatchNorm.

    Raises:
        UserError: there is no batch.
    """
    norms = batch_norms(model)
    everyone = [_reset(norms) for _ in prunings]
    if not any(everyone):
        return everyone
    device = device_of(model) if device is None else device
    divide = same_batches and not is_divided(model)
    mine = range(ranks.rank, len(prunings), ranks.size) if divide else range(len(prunings))
    count, called = 0, without_ddp(model)
    with _averaging(model, norms), _each_for_itself(norms), overwriting(model, prunings) as tensors, torch.no_grad():
        inputs = input_batches(model, batches, device)
        for batch, counts in lockstep(inputs, model, ranks, device) if mine else ():
            for i in mine:
                tensors.prune(prunings[i])
                with _with_statistics(norms, everyone[i] if counts else _reset(norms)):
                    batch.call(called)
            count += counts
    if not _mean_over_ranks(norms, everyone, count, ranks):
        raise UserError(_NO_BATCH)
    return [_reached(norms, statistics, whole=True) for statistics in everyone]


def _mean_over_ranks(
    norms: Mapping[str, _BatchNorm], everyone: Sequence[Statistics], count: int, ranks: RankGroup
) -> int:
    """Make each rank's statistics, in place, the mean over the batches of all ranks; the number of all batches.

    In float64, where the sum of equal float32 numbers over their number is that number, to the bit.
    """
    if ranks.size == 1:
        return count
    layers = [
        [to_local(statistics[f"{name}.{key}" if name else key]) for key in _BUFFERS]
        for statistics in everyone
        for name in norms
    ]
    sums = [(torch.cat([mean, var]).double() * tracked, tracked.double()[None]) for mean, var, tracked in layers]
    pieces = [piece for pair in sums for piece in pair]
    total = torch.cat([*pieces, pieces[0].new_full((1,), count)])
    ranks.all_reduce(total)
    parts = iter(total.split([*map(len, pieces), 1]))
    for mean, var, tracked in layers:
        both, batches = next(parts), next(parts)
        for target, found in zip((mean, var), (both / batches.clamp(min=1)).chunk(2), strict=True):
            target.copy_(found)
        tracked.copy_(batches[0])
    return int(next(parts))


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
def _each_for_itself(norms: Mapping[str, _BatchNorm]) -> Iterator[None]:
    """SyncBatchNorm works as BatchNorm does: ranks may be at different prunings, or have more batches than others."""
    synchronised = [norm for norm in norms.values() if isinstance(norm, nn.SyncBatchNorm)]
    try:
        for norm in synchronised:
            norm.forward = MethodType(_BatchNorm.forward, norm)  # type: ignore[method-assign]
        yield
    finally:
        for norm in synchronised:
            norm.__dict__.pop("forward", None)


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
