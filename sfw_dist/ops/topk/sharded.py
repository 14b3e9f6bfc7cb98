"""Exact selection of the K entries of largest magnitude in tensors whose entries are divided between ranks.

The bits of a magnitude are looked at from the top, 12 at a time and the last 7 together. Each rank counts its entries
by these bits, among those that agree with the K-th magnitude so far; the counts are added over the ranks, and every
rank sees in them where the K-th magnitude lies. All tensors share the 3 messages (float64: 6). The last counts are
kept apart by part, so that a rank knows how many entries in earlier parts tie with the K-th magnitude: ties go to the
lowest index of the whole tensor without a further message. Only where parts are interleaved, and more entries tie than
are still wanted, the indices of ties are compared in the same way as magnitudes are.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from sfw_dist.ops.partition import Partition

_BITS = 12
_LAST_BITS = 7
_INTEGERS = {torch.float32: torch.int32, torch.float64: torch.int64}
"""Types in which the bit patterns of magnitudes are ordered as the magnitudes are."""


def select_sharded(
    counts_wanted: Sequence[int],
    partitions: Sequence[Partition],
    entries: Sequence[Tensor | None],
    dtype: torch.dtype,
    device: torch.device,
) -> Generator[Tensor, Tensor, list[Tensor | None]]:
    """Which of this rank's entries are among the K of largest magnitude; ties go to the lowest index of the whole.

    A task for :func:`sfw_dist.distributed.coalesced.run_coalesced`; every rank runs it for the same tensors, those of
    which it has no entries included.

    Args:
        counts_wanted: K of each whole tensor.
        partitions: of each tensor.
        entries: this rank's entries of each, ``(n,)`` of type ``dtype``; ``None`` where it has none.
        dtype: float32 or float64, of all tensors.
        device: of the messages.

    Returns:
        For each tensor, which of this rank's entries are selected, bool ``(n,)``; ``None`` where it has none. Zeros are
        selected, lowest index first, when fewer than K entries are nonzero.
    """
    keys = [None if x is None else x.abs().view(_INTEGERS[dtype]) for x in entries]
    counted = [key if partition.is_primary else None for key, partition in zip(keys, partitions, strict=True)]
    wanted = torch.tensor(counts_wanted, device=device)
    widths = _widths(8 * dtype.itemsize - 1)
    prefix, wanted = yield from _narrow(counted, wanted, widths[:-1], device)

    parts = max(len(partition.parts) for partition in partitions)
    counts = torch.zeros(len(partitions), parts, 2**_LAST_BITS, dtype=torch.int32, device=device)
    for j, (partition, key) in enumerate(zip(partitions, counted, strict=True)):
        if key is not None:
            _count(key, _LAST_BITS, prefix[j], 0, counts[j, partition.own])
    by_part = (yield counts).long()
    last, wanted = kth_bin(by_part.sum(1), wanted)
    kth = (prefix << _LAST_BITS) | last
    ties = by_part.gather(2, last.view(-1, 1, 1).expand(-1, parts, 1)).squeeze(2)  # (tensors, parts)
    before = ties.cumsum(1) - ties

    limits = yield from _last_tie_taken(partitions, keys, kth, wanted, ties.sum(1), device)
    selected: list[Tensor | None] = []
    for j, (partition, key) in enumerate(zip(partitions, keys, strict=True)):
        if key is None:
            selected.append(None)
        elif partition.interleaved:
            assert partition.indices is not None
            selected.append((key > kth[j]) | ((key == kth[j]) & (partition.indices().to(key.device) <= limits[j])))
        else:
            left, own = wanted[j] - before[j, partition.own], ties[j, partition.own]
            selected.append(_at_least(key, kth[j], left, own))
    return selected


def _widths(bits: int) -> list[int]:
    """How many bits each message looks at: at most 12, and ``_LAST_BITS`` in the last."""
    rest = bits - _LAST_BITS
    messages = -(-rest // _BITS)
    edges = [rest * i // messages for i in range(messages + 1)]
    return [*(b - a for a, b in pairwise(edges)), _LAST_BITS]


def _narrow(
    keys: Sequence[Tensor | None], wanted: Tensor, widths: Sequence[int], device: torch.device
) -> Generator[Tensor, Tensor, tuple[Tensor, Tensor]]:
    """The leading bits of each tensor's ``wanted``-th largest key.

    Keys have ``sum(widths) + _LAST_BITS`` bits; the last ones are not looked at here.

    Returns:
        Those bits, int64 ``(tensors,)``, and how many of the keys that have them are wanted.
    """
    prefix = torch.zeros(len(keys), dtype=torch.int64, device=device)
    remaining = list(keys)
    for below, bits in zip(_after(widths), widths, strict=True):
        counts = torch.zeros(len(keys), 2**bits, dtype=torch.int32, device=device)
        for j, key in enumerate(remaining):
            if key is not None:
                _count(key, below + bits, prefix[j], below, counts[j])
        at, wanted = kth_bin((yield counts).long(), wanted)
        prefix = (prefix << bits) | at
        if device.type == "cpu":  # on a GPU to keep the few that agree would wait for the device
            remaining = [None if k is None else k[(k >> below) == prefix[j]] for j, k in enumerate(remaining)]
    return prefix, wanted


def _after(widths: Sequence[int]) -> list[int]:
    """How many bits follow those of each message."""
    return [sum(widths) - through + _LAST_BITS for through in accumulate(widths)]


def _count(key: Tensor, known: int, prefix: Tensor, below: int, counts: Tensor) -> None:
    """Add to ``counts`` the keys whose bits above ``known`` are ``prefix``, by their bits from ``below`` on."""
    if key.device.type == "cpu":
        agreeing = key[(key >> known) == prefix] if 8 * key.itemsize - 1 > known else key
        counts += torch.bincount((agreeing >> below) & (counts.numel() - 1), minlength=counts.numel())
    else:
        agrees = ((key >> known) == prefix).int()
        counts.scatter_add_(0, ((key >> below) & (counts.numel() - 1)).long(), agrees)


def kth_bin(counts: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """For each row of counts, the bin of the ``wanted``-th largest, and how many of that bin are wanted."""
    down_to = counts.flip(1).cumsum(1)  # entries in this bin or a greater one
    at = (down_to >= wanted[:, None]).to(torch.int8).argmax(1, keepdim=True)
    left = wanted - (down_to - counts.flip(1)).gather(1, at).view(-1)
    return counts.shape[1] - 1 - at.view(-1), left


def _at_least(key: Tensor, kth: Tensor, wanted: Tensor, ties: Tensor) -> Tensor:
    """Keys above the K-th and the first ``wanted`` of the ``ties`` with it."""
    if key.device.type == "cpu" and ties <= wanted:  # comparing would wait for a GPU, which counts fast anyway
        return key >= kth
    tie = key == kth
    return (key > kth) | (tie & (tie.cumsum(0) <= wanted))


def _last_tie_taken(
    partitions: Sequence[Partition],
    keys: Sequence[Tensor | None],
    kth: Tensor,
    wanted: Tensor,
    ties: Tensor,
    device: torch.device,
) -> Generator[Tensor, Tensor, Tensor]:
    """Up to which index of the whole tensor ties are selected, int64 ``(tensors,)``; where parts are interleaved."""
    largest = torch.iinfo(torch.int64).max
    limits = torch.full_like(kth, largest)
    tensors = [j for j, partition in enumerate(partitions) if partition.interleaved]
    if not tensors or not bool(((ties > wanted) & (kth > 0))[tensors].any()):
        return limits
    bits = 2 * _BITS + _LAST_BITS  # of indices below 2^31
    reversed_indices: list[Tensor | None] = []  # so that the lowest index has the largest key
    for j in tensors:
        key, partition = keys[j], partitions[j]
        if key is None or partition.indices is None or not partition.is_primary:
            reversed_indices.append(None)
        else:
            reversed_indices.append(2**bits - 1 - partition.indices().to(key.device)[key == kth[j]])
    prefix, wanted = yield from _narrow(reversed_indices, wanted[tensors], _widths(bits)[:-1], device)
    counts = torch.zeros(len(tensors), 2**_LAST_BITS, dtype=torch.int32, device=device)
    for i, key in enumerate(reversed_indices):
        if key is not None:
            _count(key, _LAST_BITS, prefix[i], 0, counts[i])
    last, _ = kth_bin((yield counts).long(), wanted)
    limits[tensors] = 2**bits - 1 - ((prefix << _LAST_BITS) | last)
    return limits
