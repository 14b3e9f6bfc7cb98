"""Who owns what, and where its vertex lies on the wire. Pure Python: the same answer on every rank.

rank 0's segment            rank 1's segment                 one buffer of world_size equal segments,
┌────────┬────────┬─────┐   ┌──────────────┬───────────┐     filled by one all-gather; a segment holds the
│ conv1  │ layer3 │ pad │   │ layer1       │ fc        │     slots of what its rank owns
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
class Item:
    """One tensor as the plan sees it."""

    name: str
    cost: float
    """Of one LMO, in memory passes times entries; only ratios matter."""
    entries: int
    description: str
    """Whatever else must agree between the ranks: shape, type, constraint."""
    unit: int = 0
    """A tensor may be cut after every so many entries; 0: it may not."""


@dataclass(frozen=True)
class Part:
    """Consecutive entries ``[start, stop)`` of an item, and the rank that owns them."""

    item: int
    start: int
    stop: int
    owner: int = 0


@dataclass(frozen=True)
class Plan:
    """Ownership of all items, in their order; an item's parts follow each other."""

    parts: tuple[Part, ...]
    loads: tuple[float, ...]
    """Cost of what each rank owns."""
    fingerprint: str
    """sha256 over everything that ranks must agree on."""

    @property
    def imbalance(self) -> float:
        """The greatest load over the mean: by this factor is a step slower than if all ranks had equal shares."""
        return max(self.loads) * len(self.loads) / sum(self.loads) if sum(self.loads) else 1.0


_GOOD_BALANCE = 1.1


def make_plan(items: Sequence[Item], world_size: int, kept: Sequence[Part] = ()) -> Plan:
    """Give each item to the least loaded rank, the costliest first (Graham's LPT rule: at most 4/3 of the best).

    Where that leaves a rank with more than 1.1 of the mean load, items that cost more than a fair share, then those
    that cost more than half of one, are cut before, if they may be: into equal parts of at most a quarter of a share,
    each of another rank. Cutting costs messages in every step, so no more is cut than that takes.

    Args:
        items: in the order of the param groups.
        world_size: ranks.
        kept: parts of the first items that stay with their owners, so that parameters added later do not move
            anyone's momentum.
    """
    assert world_size >= 1, world_size
    for shares in (math.inf, 1.0, 0.5):
        parts, loads = _assign(items, world_size, kept, shares)
        fingerprint = _fingerprint(items, world_size, parts)
        plan = Plan(tuple(parts), tuple(loads), fingerprint)
        if plan.imbalance <= _GOOD_BALANCE:
            break
    return plan


def _assign(
    items: Sequence[Item], world_size: int, kept: Sequence[Part], shares: float
) -> tuple[list[Part], list[float]]:
    """Parts with owners, and the ranks' loads, when items of more than so many shares are cut."""
    loads = [0.0] * world_size
    for part in kept:
        loads[part.owner] += _cost(items[part.item], part)
    share = sum(item.cost for item in items) / world_size
    known = {part.item for part in kept}
    new = [i for i in range(len(items)) if i not in known]
    cut = [_cut(i, items[i], share, world_size, shares) for i in new]
    parts, heap = list(kept), [(load, rank) for rank, load in enumerate(loads)]
    heapq.heapify(heap)
    # The parts of one item go to different ranks, so they are placed together.
    for together in sorted(cut, key=lambda parts: (-_cost(items[parts[0].item], parts[0]), parts[0].item)):
        for part, (load, rank) in [(part, heapq.heappop(heap)) for part in together]:
            loads[rank] = load + _cost(items[part.item], part)
            parts.append(replace(part, owner=rank))
            heapq.heappush(heap, (loads[rank], rank))
    return sorted(parts, key=lambda part: (part.item, part.start)), loads


def _cut(index: int, item: Item, share: float, world_size: int, shares: float) -> list[Part]:
    units = item.entries // item.unit if item.unit else 1
    if share == 0 or item.cost <= shares * share or units < 2:
        return [Part(index, 0, item.entries)]
    number = min(world_size, units, math.ceil(4 * item.cost / share))
    edges = [item.unit * (units * i // number) for i in range(number)] + [item.entries]
    return [Part(index, start, stop) for start, stop in pairwise(edges)]


def _fingerprint(items: Sequence[Item], world_size: int, parts: Sequence[Part]) -> str:
    agreed = [
        world_size,
        [(item.name, item.cost, item.entries, item.description, item.unit) for item in items],
        [(part.item, part.start, part.stop, part.owner) for part in parts],
    ]
    return hashlib.sha256(json.dumps(agreed).encode()).hexdigest()


def _cost(item: Item, part: Part) -> float:
    return item.cost * ((part.stop - part.start) / item.entries) if item.entries else item.cost


@dataclass(frozen=True)
class Layout:
    """Where the slots of some parts lie in the gathered buffer."""

    starts: tuple[int, ...]
    """Byte at which each slot starts."""
    segment: int
    """Bytes of a rank's segment: that of the fullest rank."""


def lay_out(nbytes: Sequence[int], owners: Sequence[int], world_size: int) -> Layout:
    """Slots of these sizes, one after the other in their owners' segments."""
    used = [0] * world_size
    offsets = []
    for size, owner in zip(nbytes, owners, strict=True):
        offsets.append(used[owner])
        used[owner] += -(-size // _ALIGNMENT) * _ALIGNMENT
    segment = max(used)
    return Layout(tuple(owner * segment + offset for owner, offset in zip(owners, offsets, strict=True)), segment)
