"""BatchNorm recalibration: after pruning, the running statistics are measured anew; no weight changes.

Pruning shifts the activations, and a BatchNorm layer in evaluation mode still normalises by the mean and variance that
they had before. Its statistics are therefore reset and become the mean, over some batches, of each batch's mean and
unbiased variance. BatchNorm layers alone are in training mode meanwhile, so that each layer sees inputs that were
normalised by the batch; dropout and the like evaluate.
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
from sfw_dist.pruning.one_shot import Pruning, masked_parameters

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
    """Measure the running statistics of ``model`` anew, in place, over all of ``batches``; returns their number.

    Args:
        model: weights, modes and momenta are afterwards what they were. Without BatchNorm nothing is done, and 0
            returned.
        batches: inputs of the model, on its device; the same ones on every rank give every rank the same statistics.

    Raises:
        UserError: there is no batch.
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
    model: nn.Module, masks: Sequence[Pruning], batches: Iterable[Tensor], world: World
) -> list[Statistics]:
    """The statistics that `recalibrate` would give to ``model`` under each of ``masks``, in one pass; collective.

    The model is not touched; without BatchNorm the answers are empty. Each network is measured by one rank, on all of
    the batches, and the others get what it found: the answer does not depend on the number of ranks. Every rank passes
    the same masks and batches.
    """
    norms = batch_norms(model)
    everyone = [_reset(norms) for _ in masks]
    if not any(everyone):
        return everyone
    mine = range(world.rank, len(masks), world.size)
    if mine:
        with _averaging(model, norms), torch.no_grad():
            for inputs in batches:
                for i in mine:
                    functional_call(model, {**masked_parameters(model, masks[i]), **everyone[i]}, (inputs,))
    # Zeros from all ranks but one: in float64 the sum is that one's value, of a float32 or a count, to the bit.
    flat = [tensor.flatten().double() for statistics in everyone for tensor in statistics.values()]
    owned = [i in mine for i, statistics in enumerate(everyone) for _ in statistics]
    pieces = [piece if own else torch.zeros_like(piece) for piece, own in zip(flat, owned, strict=True)]
    summed = iter(sum_over_ranks(torch.cat(pieces), world).split([len(piece) for piece in pieces]))
    return [
        {name: next(summed).view(tensor.shape).to(tensor.dtype) for name, tensor in statistics.items()}
        for statistics in everyone
    ]


def _reset(norms: dict[str, _BatchNorm]) -> Statistics:
    """Fresh buffers: what `reset_running_stats` leaves."""
    fresh: Statistics = {}
    for name, norm in norms.items():
        prefix = f"{name}." if name else ""
        assert norm.running_mean is not None and norm.running_var is not None and norm.num_batches_tracked is not None
        fresh[f"{prefix}running_mean"] = torch.zeros_like(norm.running_mean)
        fresh[f"{prefix}running_var"] = torch.ones_like(norm.running_var)
        fresh[f"{prefix}num_batches_tracked"] = torch.zeros_like(norm.num_batches_tracked)
    return fresh


@contextmanager
def _averaging(model: nn.Module, norms: dict[str, _BatchNorm]) -> Iterator[None]:
    """BatchNorm alone in training mode, its statistics the mean of all batches; afterwards all is as before."""
    modes = {module: module.training for module in model.modules()}
    momenta = {norm: norm.momentum for norm in norms.values()}
    model.eval()
    for norm in momenta:
        norm.train()
        norm.momentum = None  # torch's word for a cumulative mean
    try:
        yield
    finally:
        for module, training in modes.items():  # one by one: a frozen layer evaluates all along
            module.training = training
        for norm, momentum in momenta.items():
            norm.momentum = momentum
