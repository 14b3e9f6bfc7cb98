"""Which rank owns which shard, and where its vertex lies in the communication buffer.

Pure Python: every rank computes the same assignment from names, sizes and costs alone, and compares it by hash.

    rank 0's segment            rank 1's segment                 one buffer of world_size equal segments,
    ┌────────┬────────┬─────┐   ┌──────────────┬───────────┐     filled by one all-gather; a segment holds
    │ conv1  │ layer3 │ pad │   │ layer1       │ fc        │     one slot for each shard that its rank owns
    └────────┴────────┴─────┘   └──────────────┴───────────┘
"""

from __future__ import annotations

import hashlib
import heapq
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

_ALIGNMENT = 8
"""Slots start at multiples of the widest type in them, float64."""


@dataclass(frozen=True)
class TensorSpec:
    """What the assignment needs to know of one tensor."""

    name: str
    cost: float
    """Of one LMO, in memory passes times entries; only ratios matter."""
    entries: int
    description: str
    """Everything else that must agree between the ranks: shape, type, constraint."""
    unit: int = 0
    """The tensor may be divided after every so many entries; 0: it may not be divided."""


@dataclass(frozen=True)
class ShardSpec:
    """Consecutive entries ``[start, stop)`` of a tensor, and the rank that owns them."""

    tensor: int
    """Its place among the tensors."""
    start: int
    stop: int
    owner: int = 0


@dataclass(frozen=True)
class Assignment:
    """Owners of all shards, in the order of their tensors; the shards of one tensor are adjacent."""

    shards: tuple[ShardSpec, ...]
    loads: tuple[float, ...]
    """Cost of what each rank owns."""
    fingerprint: str
    """sha256 over everything that ranks must agree on."""

    @property
    def imbalance(self) -> float:
        """The greatest load over the mean: a step takes so many times as long as with equal loads."""
        return max(self.loads) * len(self.loads) / sum(self.loads) if sum(self.loads) else 1.0


_GOOD_BALANCE = 1.1


def assign(tensors: Sequence[TensorSpec], world_size: int, pinned: Sequence[ShardSpec] = ()) -> Assignment:
    """Give each tensor to the least loaded rank, the costliest first (Graham's LPT rule: at most 4/3 of the best).

    Where that leaves a rank with more than 1.1 of the mean load, tensors that cost more than a fair share, then those
    that cost more than half of one, are divided first, if they may be: into equal parts of at most a quarter of a
    share, each for another rank. A divided tensor needs messages in every step, so no more are divided than necessary.

    Args:
        tensors: in the order of the param groups.
        world_size: number of ranks.
        pinned: shards of the first tensors that stay with their owners, so that parameters added later do not move
            anyone's momentum.

    Example:
        >>> tensors = [TensorSpec("a", 5.0, 5, ""), TensorSpec("b", 3.0, 3, ""), TensorSpec("c", 2.0, 2, "")]
        >>> [shard.owner for shard in assign(tensors, world_size=2).shards]
        [0, 1, 1]
    """
    assert world_size >= 1, world_size
    for shares in (math.inf, 1.0, 0.5):
        shards, loads = _assign(tensors, world_size, pinned, shares)
        fingerprint = _fingerprint(tensors, world_size, shards)
        assignment = Assignment(tuple(shards), tuple(loads), fingerprint)
        if assignment.imbalance <= _GOOD_BALANCE:
            break
    return assignment


def _assign(
    tensors: Sequence[TensorSpec], world_size: int, pinned: Sequence[ShardSpec], shares: float
) -> tuple[list[ShardSpec], list[float]]:
    """Shards with owners, and the ranks' loads, when tensors of more than so many shares are divided."""
    loads = [0.0] * world_size
    for shard in pinned:
        loads[shard.owner] += _cost(tensors[shard.tensor], shard)
    share = sum(tensor.cost for tensor in tensors) / world_size
    known = {shard.tensor for shard in pinned}
    divided = [_divide(i, tensors[i], share, world_size, shares) for i in range(len(tensors)) if i not in known]
    shards, heap = list(pinned), [(load, rank) for rank, load in enumerate(loads)]
    heapq.heapify(heap)
    # The shards of one tensor go to different ranks, so they are placed together.
    for group in sorted(divided, key=lambda parts: (-_cost(tensors[parts[0].tensor], parts[0]), parts[0].tensor)):
        for shard, (load, rank) in [(shard, heapq.heappop(heap)) for shard in group]:
            loads[rank] = load + _cost(tensors[shard.tensor], shard)
            shards.append(replace(shard, owner=rank))
            heapq.heappush(heap, (loads[rank], rank))
    return sorted(shards, key=lambda shard: (shard.tensor, shard.start)), loads


def _divide(index: int, tensor: TensorSpec, share: float, world_size: int, shares: float) -> list[ShardSpec]:
    units = tensor.entries // tensor.unit if tensor.unit else 1
    if share == 0 or tensor.cost <= shares * share or units < 2:
        return [ShardSpec(index, 0, tensor.entries)]
    number = min(world_size, units, math.ceil(4 * tensor.cost / share))
    edges = [tensor.unit * (units * i // number) for i in range(number)] + [tensor.entries]
    return [ShardSpec(index, start, stop) for start, stop in pairwise(edges)]


def _fingerprint(tensors: Sequence[TensorSpec], world_size: int, shards: Sequence[ShardSpec]) -> str:
    agreed = [
        world_size,
        [(tensor.name, tensor.cost, tensor.entries, tensor.description, tensor.unit) for tensor in tensors],
        [(shard.tensor, shard.start, shard.stop, shard.owner) for shard in shards],
    ]
    return hashlib.sha256(json.dumps(agreed).encode()).hexdigest()


def _cost(tensor: TensorSpec, shard: ShardSpec) -> float:
    return tensor.cost * ((shard.stop - shard.start) / tensor.entries) if tensor.entries else tensor.cost


@dataclass(frozen=True)
class BufferLayout:
    """Where the slots of some shards lie in the gathered buffer."""

    starts: tuple[int, ...]
    """Byte at which each slot starts."""
    segment: int
    """Bytes of a rank's segment: that of the fullest rank."""


def lay_out(nbytes: Sequence[int], owners: Sequence[int], world_size: int) -> BufferLayout:
    """Slots of these sizes, one after the other in their owners' segments."""
    used = [0] * world_size
    offsets = []
    for size, owner in zip(nbytes, owners, strict=True):
        offsets.append(used[owner])
        used[owner] += -(-size // _ALIGNMENT) * _ALIGNMENT
    segment = max(used)
    return BufferLayout(tuple(owner * segment + offset for owner, offset in zip(owners, offsets, strict=True)), segment)
