"""Who owns which tensor, and where its vertex lies on the wire. Pure Python: the same answer on every rank.

rank 0's segment            rank 1's segment                 one buffer of world_size equal segments,
┌────────┬────────┬─────┐   ┌──────────────┬───────────┐     filled by one all-gather; a segment holds the
│ conv1  │ layer3 │ pad │   │ layer1       │ fc        │     slots of the tensors that its rank owns
└────────┴────────┴─────┘   └──────────────┴───────────┘
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass

_ALIGNMENT = 8
"""Slots start at multiples of the widest type in them, float64."""


@dataclass(frozen=True)
class Item:
    """One tensor as the plan sees it."""

    name: str
    cost: float
    """Of one LMO, in memory passes times entries; only ratios matter."""
    nbytes: int
    """Of its slot on the wire."""
    description: str
    """Whatever else must agree between the ranks: shape, type, constraint."""


@dataclass(frozen=True)
class Plan:
    """Ownership and layout of all items, in their order."""

    owners: tuple[int, ...]
    """Rank that owns each item."""
    offsets: tuple[int, ...]
    """Byte at which each item's slot starts in its owner's segment."""
    segment: int
    """Bytes of a rank's segment: that of the fullest rank."""
    world_size: int
    fingerprint: str
    """sha256 over everything that ranks must agree on."""

    def start(self, item: int) -> int:
        """Byte at which an item's slot starts in the gathered buffer."""
        return self.owners[item] * self.segment + self.offsets[item]


def make_plan(items: Sequence[Item], world_size: int, owned_already: Sequence[int] = ()) -> Plan:
    """Give each item to the least loaded rank, the costliest items first (Graham's LPT rule: at most 4/3 of the best).

    Args:
        items: in the order of the param groups.
        world_size: ranks.
        owned_already: owners of the first items, kept; so that parameters added later do not move anyone's momentum.
    """
    assert world_size >= 1, world_size
    loads = [0.0] * world_size
    owners = list(owned_already) + [0] * (len(items) - len(owned_already))
    for item, owner in zip(items, owned_already, strict=False):
        loads[owner] += item.cost
    new = range(len(owned_already), len(items))
    for i in sorted(new, key=lambda i: (-items[i].cost, i)):
        owners[i] = min(range(world_size), key=lambda rank: (loads[rank], rank))
        loads[owners[i]] += items[i].cost

    used = [0] * world_size
    offsets = []
    for item, owner in zip(items, owners, strict=True):
        offsets.append(used[owner])
        used[owner] += -(-item.nbytes // _ALIGNMENT) * _ALIGNMENT
    agreed = [world_size, [(i.name, i.cost, i.nbytes, i.description) for i in items], owners]
    fingerprint = hashlib.sha256(json.dumps(agreed).encode()).hexdigest()
    return Plan(tuple(owners), tuple(offsets), max(used, default=0), world_size, fingerprint)
