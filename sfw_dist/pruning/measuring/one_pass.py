"""Many prunings of one model, measured in one pass over the data."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import nn

from sfw_dist.distributed.rank_group import RankGroup
from sfw_dist.pruning.measuring.batches import Batch, without_ddp
from sfw_dist.pruning.measuring.lockstep import lockstep
from sfw_dist.pruning.measuring.overwriting import overwriting
from sfw_dist.pruning.measuring.tallies import Tally
from sfw_dist.pruning.modes import evaluation_mode
from sfw_dist.pruning.recalibration import Statistics
from sfw_dist.pruning.result import Pruning


def measure_prunings(
    model: nn.Module,
    prunings: Sequence[Pruning],
    statistics: Sequence[Sequence[Statistics]],
    batches: Iterable[Batch],
    tallies: Sequence[Sequence[Tally]],
    ranks: RankGroup,
    device: torch.device,
) -> None:
    """Run each pruned model with each of its statistics on each batch; collective for a divided model.

    Only the masks (a byte an entry) or factors and BatchNorm's statistics are kept for each pruning; the pruned weights
    are written into the model again for every batch.

    Args:
        model: afterwards to the bit what it was.
        prunings: of this model.
        statistics: for each of ``prunings``, those to measure it with; what they leave out is as trained.
        batches: of this rank.
        tallies: which take the outputs, for each of ``prunings`` and each of its statistics.
        ranks: who shares the data.
        device: where the model runs.
    """
    called = without_ddp(model)
    buffers = {name: None for variants in statistics for variant in variants for name in variant}
    with evaluation_mode(model), overwriting(model, prunings, buffers) as tensors, torch.no_grad():
        for batch, counts in lockstep(batches, model, ranks, device):
            for pruning, variants, sums in zip(prunings, statistics, tallies, strict=True):
                tensors.prune(pruning)
                for variant, tally in zip(variants, sums, strict=True):
                    tensors.set_buffers(variant)
                    output = batch.call(called)
                    if counts:
                        tally.add(output, batch.own_targets(), batch.size)
