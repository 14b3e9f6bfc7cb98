"""BatchNorm recalibration: after pruning, the running statistics are measured again; no weight changes.

Pruning shifts the activations, and a BatchNorm layer in evaluation mode still normalises by the mean and variance that
they had before. Its statistics are therefore reset and become the mean, over some batches, of each batch's mean and
unbiased variance. Meanwhile BatchNorm layers alone are in training mode, so that each layer sees inputs that were
normalised by the batch; all others (dropout, for example) are in evaluation mode.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm

from sfw_dist.distributed.world import World, sum_over_ranks
from sfw_dist.errors import UserError
from sfw_dist.pruning.modes import evaluation_mode
from sfw_dist.pruning.result import Pruning

Statistics = dict[str, Tensor]
"""BatchNorm's buffers (running_mean, running_var, num_batches_tracked) by their name in the model."""


def batch_norms(model: nn.Module) -> dict[str, _BatchNorm]:
    """The BatchNorm layers that keep running statistics, by name; those that normalise by the batch need none."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) and module.running_mean is not None
    }


def recalibrate(model: nn.Module, batches: Iterable[Tensor]) -> int:
    """Measure BatchNorm's running statistics again, in place, over all of ``batches``.

    Args:
        model: weights, modes and momenta are afterwards what they were. Without BatchNorm nothing is done.
        batches: inputs of the model, on its device; the same ones on every rank give every rank the same statistics.

    Returns:
        The number of batches; 0 without BatchNorm.

    Raises:
        UserError: there is no batch.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 2), nn.BatchNorm1d(2))
        >>> recalibrate(net, [torch.randn(8, 4), torch.randn(8, 4)])
        2
        >>> int(net[1].num_batches_tracked)
        2
    """
    norms = batch_norms(model)
    if not norms:
        return 0
    count = 0
    with _averaging(model, norms), torch.no_grad():
        for inputs in batches:
            if count == 0:  # not before: without a batch the statistics stay
                for norm in norms.values():
                    norm.reset_running_stats()
            model(inputs)
            count += 1
    if count == 0:
        raise UserError("no batch to recalibrate BatchNorm with: give at least one")
    return count


def recalibrated_statistics(
    model: nn.Module, prunings: Sequence[Pruning], batches: Iterable[Tensor], world: World
) -> list[Statistics]:
    """The statistics that `recalibrate` would give to ``model`` after each pruning, in one pass; collective.

    Each pruned model is measured by one rank, on all of the batches, and the others receive what it found: the answer
    does not depend on the number of ranks.

    Args:
        model: does not change.
        prunings: the same on every rank.
        batches: inputs of the model, the same on every rank.
        world: the ranks that share the work.

    Returns:
        Statistics for each pruning; empty ones without BatchNorm.
    """
    norms = batch_norms(model)
    everyone = [_reset(norms) for _ in prunings]
    if not any(everyone):
        return everyone
    mine = range(world.rank, len(prunings), world.size)
    if mine:
        with _averaging(model, norms), torch.no_grad():
            for inputs in batches:
                for i in mine:
                    functional_call(model, {**prunings[i].pruned_parameters(model), **everyone[i]}, (inputs,))
    # All ranks but one add zeros: in float64 the sum is that one's value, of a float32 or a count, to the bit.
    flat = [tensor.flatten().double() for statistics in everyone for tensor in statistics.values()]
    owned = [i in mine for i, statistics in enumerate(everyone) for _ in statistics]
    pieces = [piece if own else torch.zeros_like(piece) for piece, own in zip(flat, owned, strict=True)]
    summed = iter(sum_over_ranks(torch.cat(pieces), world).split([len(piece) for piece in pieces]))
    return [
        {name: next(summed).view(tensor.shape).to(tensor.dtype) for name, tensor in statistics.items()}
        for statistics in everyone
    ]


def _reset(norms: dict[str, _BatchNorm]) -> Statistics:
    """New buffers, as `reset_running_stats` leaves them."""
    buffers: Statistics = {}
    for name, norm in norms.items():
        prefix = f"{name}." if name else ""
        assert norm.running_mean is not None and norm.running_var is not None and norm.num_batches_tracked is not None
        buffers[f"{prefix}running_mean"] = torch.zeros_like(norm.running_mean)
        buffers[f"{prefix}running_var"] = torch.ones_like(norm.running_var)
        buffers[f"{prefix}num_batches_tracked"] = torch.zeros_like(norm.num_batches_tracked)
    return buffers


@contextmanager
def _averaging(model: nn.Module, norms: dict[str, _BatchNorm]) -> Iterator[None]:
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
