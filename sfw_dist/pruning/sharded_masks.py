"""The entries of largest score, where tensors are divided between ranks: exactly those that one process would keep.

The bits of a score are looked at from the top, 11 at a time. Each rank counts its entries by these bits, among those
that agree with the K-th largest score so far; the counts are added over the ranks, and every rank sees in them where
the K-th largest lies. That takes 3 messages, for float64 scores 6, and no tensor is gathered. Of the entries that tie
with the K-th the first are kept: first by tensor, and in the one tensor whose ties are not all kept by the selection of
:mod:`sfw_dist.ops.topk.sharded`, which finds the lowest indices of a divided tensor.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from sfw_dist.distributed.coalesced import run_coalesced
from sfw_dist.distributed.dtensor import to_local, wrapped_as
from sfw_dist.ops.shards import Shards
from sfw_dist.ops.topk.sharded import kth_bin, select_sharded

_BITS = 11


def keep_largest(
    scores: Mapping[str, Tensor], rankings: Sequence[Sequence[str]], counts_wanted: Sequence[int]
) -> dict[str, Tensor]:
    """Keep the entries of largest score of each ranking; of equal ones the first; collective.

    Args:
        scores: by name, without NaN, DTensors or whole tensors, in the same order on every rank.
        rankings: the names of the tensors that are ranked together, ranking by ranking; each tensor is in one.
        counts_wanted: how many entries of each ranking are kept.

    Returns:
        Bool masks by name, which lie as the scores do.
    """
    shards = Shards(scores)
    row = {name: i for i, names in enumerate(rankings) for name in names}
    wide = any(score.dtype == torch.float64 for score in scores.values())
    keys = {name: _ordered(x, torch.float64 if wide else torch.float32) for name, x in shards.local.items()}
    device = next(iter(keys.values())).device
    kth, ties_wanted = _kth_keys(shards, keys, row, torch.tensor(counts_wanted, device=device))
    ties = {name: key == kth[row[name]].to(key.device) for name, key in keys.items()}
    found = shards.each(lambda name: ties[name].sum()[None])
    taken = _ties_taken({name: int(count) for name, count in found.items()}, rankings, ties_wanted.tolist())
    first = _first_ties(shards, ties, {name: count for name, count in taken.items() if 0 < count < int(found[name])})
    masks = {}
    for name, key in keys.items():
        above = key > kth[row[name]].to(key.device)
        kept = above | first.get(name, ties[name]) if taken[name] else above
        masks[name] = wrapped_as(kept.view(to_local(scores[name]).shape), scores[name])
    return masks


def _ordered(scores: Tensor, dtype: torch.dtype) -> Tensor:
    """Integers that are ordered as the scores are, -0 being 0."""
    if dtype == torch.float64:
        bits = (scores.to(dtype) + 0.0).view(torch.int64)
        return bits ^ ((bits >> 63) & 0x7FFF_FFFF_FFFF_FFFF)
    bits = (scores.to(dtype) + 0.0).view(torch.int32)
    return bits ^ ((bits >> 31) & 0x7FFF_FFFF)


def _kth_keys(
    shards: Shards, keys: Mapping[str, Tensor], row: Mapping[str, int], wanted: Tensor
) -> tuple[Tensor, Tensor]:
    """The ``wanted``-th largest key of each ranking, and how many of those equal to it are wanted.

    Args:
        shards: of the scores.
        keys: int32 or int64, of this rank's entries.
        row: which ranking a tensor is in.
        wanted: int64 ``(rankings,)``.
    """
    below = 8 * next(iter(keys.values())).itemsize
    candidates = dict(keys)
    prefix = torch.zeros_like(wanted)
    base = None
    while below:
        width = min(_BITS, below)
        below -= width
        # Keys are signed: their leading bits count from the lowest negative number.
        base = torch.full_like(wanted, -(1 << (width - 1))) if base is None else prefix << width
        counts = shards.joint(partial(_counts, candidates, row, base, below, width), wanted.device)
        at, wanted = kth_bin(counts, wanted)
        prefix = base + at
        for name, key in candidates.items():
            candidates[name] = key[(key >> below) == prefix[row[name]].to(key.device)]
    return prefix, wanted


def _counts(
    keys: Mapping[str, Tensor], row: Mapping[str, int], base: Tensor, below: int, width: int, names: Sequence[str]
) -> Tensor:
    """For each ranking, how often each value of ``width`` bits is in the keys of these tensors, int64.

    Args:
        keys: by tensor; in them ``below`` bits follow.
        row: which ranking a tensor is in.
        base: of each ranking, the leading bits of its keys where those ``width`` are zero.
        below, width: which bits are looked at.
        names: of the tensors.
    """
    counts = torch.zeros(len(base), 1 << width, dtype=torch.int64, device=base.device)
    for name in names:
        key = keys[name]
        values = (key >> below) - base[row[name]].to(key.device)
        counts[row[name]] += torch.bincount(values, minlength=1 << width).to(base.device)
    return counts


def _ties_taken(ties: Mapping[str, int], rankings: Sequence[Sequence[str]], wanted: Sequence[int]) -> dict[str, int]:
    """How many of each tensor's ties are kept, the first tensors' first."""
    taken = {}
    for names, left in zip(rankings, wanted, strict=True):
        for name in names:
            taken[name] = min(left, ties[name])
            left -= taken[name]
    return taken


def _first_ties(shards: Shards, ties: Mapping[str, Tensor], counts: Mapping[str, int]) -> dict[str, Tensor]:
    """Of this rank's ties, those among the first ``counts`` of the whole tensor; collective."""
    first = {
        name: ties[name] & (ties[name].cumsum(0) <= count)
        for name, count in counts.items()
        if not shards.is_divided(name)
    }
    for ranks, partitions in shards.by_mesh(counts):
        names = list(partitions)
        # A tie is a one among zeros: the selection of the largest then finds the lowest indices of ties.
        flags = [ties[name].float() if partitions[name].own is not None else None for name in names]
        device = ties[names[0]].device
        task = select_sharded([counts[name] for name in names], list(partitions.values()), flags, torch.float32, device)
        (selected,) = run_coalesced([task], ranks.all_reduce)
        first |= {name: ties[name] if x is None else x for name, x in zip(names, selected, strict=True)}
    return first
