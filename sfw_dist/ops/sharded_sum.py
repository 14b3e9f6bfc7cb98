"""Sums over tensors whose entries are divided between ranks.

A sum over a whole tensor is a tree over rows of 8,192 entries (:mod:`sfw_dist.ops.pairwise_sum`). Where every part of
a tensor begins at such a row, each rank contributes the sums of its rows, and the total is the same tree: bit for bit
what one process computes. Anywhere else a part contributes one number, and the numbers are added in the order of the
parts: the same on every rank, and equal to one process up to rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from sfw_dist.ops.pairwise_sum import ROW, row_sums, tree_sum
from sfw_dist.ops.partition import Partition

Terms = Callable[..., Tensor]
"""Maps slices of flat tensors to the float64 terms of a sum, of the same length."""


def begins_at_rows(partition: Partition) -> bool:
    """Whether every part begins at a row of the pairwise sum."""
    return not partition.interleaved and all(first % ROW == 0 for first, _ in partition.parts)


def slots(partition: Partition) -> int:
    """How many numbers stand for one sum: one a row, or one a part."""
    return -(-partition.numel // ROW) if begins_at_rows(partition) else len(partition.parts)


def first_slot(partition: Partition) -> int:
    """The first of the slots that this rank's part fills."""
    assert partition.own is not None
    return partition.parts[partition.own][0] // ROW if begins_at_rows(partition) else partition.own


def partial_sums(partition: Partition, terms: Sequence[Terms], *entries: Tensor) -> Tensor:
    """This rank's contribution to some sums over a tensor.

    Args:
        partition: of the tensor.
        terms: one for each sum.
        entries: this rank's entries of the flat tensors that the terms take, each ``(n,)``; ignored where this rank is
            not the one whose entries count.

    Returns:
        float64 ``(sums, slots)``, zeros in the slots of other parts. Added over the ranks, then along its last
        dimension by :func:`~sfw_dist.ops.pairwise_sum.tree_sum`, it becomes the sums.
    """
    device = entries[0].device
    sums = torch.zeros(len(terms), slots(partition), dtype=torch.float64, device=device)
    if partition.is_primary:
        rows = torch.stack([row_sums(term, *entries) for term in terms])
        start = first_slot(partition)
        if begins_at_rows(partition):
            sums[:, start : start + rows.shape[1]] = rows
        else:
            sums[:, start] = tree_sum(rows, 1)
    return sums


class ShardedSums:
    """The layout of several tensors' sums in one message; made once, on every rank from the same partitions."""

    def __init__(self, partitions: Sequence[Partition], device: torch.device) -> None:
        self._device = device
        counts = [slots(partition) for partition in partitions]
        self._starts = [sum(counts[:j]) for j in range(len(counts) + 1)]
        self._first_own = [
            None if partition.own is None else start + first_slot(partition)
            for partition, start in zip(partitions, self._starts, strict=False)
        ]
        # Tensors with about as many slots are added together; their slots are filled up to a power of two with zeros,
        # which changes no bit of a tree. The last place of a message stands for zero.
        by_depth: dict[int, list[int]] = {}
        for j, count in enumerate(counts):
            by_depth.setdefault((max(count, 1) - 1).bit_length(), []).append(j)
        self._trees = [
            (torch.tensor(tensors, device=device), torch.tensor([self._places(j, 1 << depth) for j in tensors]))
            for depth, tensors in by_depth.items()
        ]
        self._trees = [(tensors, places.to(device)) for tensors, places in self._trees]

    def _places(self, j: int, width: int) -> list[int]:
        here = list(range(self._starts[j], self._starts[j + 1]))
        return here + [self._starts[-1]] * (width - len(here))

    def message(self, sums: int, contributions: Sequence[Tensor | None]) -> Tensor:
        """float64 ``(sums, all slots)`` from one contribution of :func:`partial_sums` a tensor; ``None``: zeros."""
        message = torch.zeros(sums, self._starts[-1], dtype=torch.float64, device=self._device)
        for start, contribution in zip(self._starts, contributions, strict=False):
            if contribution is not None:
                message[: len(contribution), start : start + contribution.shape[1]] = contribution
        return message

    def first_own_slot(self, j: int) -> int | None:
        """The first slot of this rank's part of tensor ``j``; ``None`` where it has no part."""
        return self._first_own[j]

    def totals(self, message: Tensor) -> Tensor:
        """The sums, float64 ``(sums, tensors)``, of a message that was added over the ranks."""
        padded = torch.nn.functional.pad(message, (0, 1))
        totals = padded.new_zeros(len(message), len(self._starts) - 1)
        for tensors, places in self._trees:
            totals[:, tensors] = tree_sum(padded[:, places], 2)
        return totals
