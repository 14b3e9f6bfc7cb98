"""Selection in tensors whose parts lie with several ranks: exact, by counts that are added over the ranks.

A magnitude's bits are looked at from the top, 11 of them and then 10 at a time: each rank counts its entries by these
bits among those that agree with the K-th magnitude so far, the counts are all-reduced, and every rank sees in them
where the K-th magnitude lies. All tensors share each of the 4 (float64: 7) messages.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_INTEGERS = {4: torch.int32, 8: torch.int64}
_BITS = 10


@dataclass(frozen=True)
class Share:
    """What this rank has of one tensor."""

    support: int
    """K, of the whole tensor."""
    parts: int
    """Into how many parts the tensor is cut; they follow each other in its row-major order."""
    place: int = 0
    """Of this rank's part among them."""
    entries: Tensor | None = None
    """``(n,)`` float32 or float64; ``None`` where this rank has no part."""


def select_across(
    shares: Sequence[Share], dtype: torch.dtype, device: torch.device, add_up: Callable[[Tensor], object]
) -> list[Tensor | None]:
    """Which of this rank's entries are among the K of largest magnitude; ties go to the lowest index of the whole.

    Args:
        shares: one a tensor, the same tensors on every rank; a rank without any part calls, too.
        dtype: of all entries.
        add_up: all-reduces an int64 tensor in place.

    Returns:
        int64 indices into each part, ascending, without zeros; ``None`` where there is no part.
    """
    prefix = torch.zeros(len(shares), dtype=torch.int64, device=device)
    room = torch.tensor([share.support for share in shares], device=device)
    keys = [None if s.entries is None else s.entries.abs().view(_INTEGERS[dtype.itemsize]).long() for s in shares]
    below = 8 * dtype.itemsize - 1
    while below > 0:
        bits = min(below, _BITS + 1 if below % _BITS == 1 else below % _BITS or _BITS)
        below -= bits
        counts = torch.zeros(len(shares), 2**bits, dtype=torch.int64, device=device)
        for j, key in enumerate(keys):
            if key is not None:
                agrees = (key >> (below + bits)) == prefix[j]
                counts[j].scatter_add_(0, (key >> below) & (2**bits - 1), agrees.long())
        add_up(counts)
        down_to = counts.flip(1).cumsum(1)  # entries with these bits or greater ones
        at = (down_to >= room[:, None]).to(torch.int8).argmax(1, keepdim=True)
        room = room - (down_to - counts.flip(1)).gather(1, at).view(-1)
        prefix = (prefix << bits) | (2**bits - 1 - at.view(-1))

    ties = torch.zeros(len(shares), max(s.parts for s in shares), dtype=torch.int64, device=device)
    for j, (share, key) in enumerate(zip(shares, keys, strict=True)):
        if key is not None:
            ties[j, share.place] = (key == prefix[j]).sum()
    add_up(ties)
    before = ties.cumsum(1) - ties
    return [
        None if key is None else _chosen(key, prefix[j], room[j] - before[j, share.place])
        for j, (share, key) in enumerate(zip(shares, keys, strict=True))
    ]


def _chosen(key: Tensor, kth: Tensor, room: Tensor) -> Tensor:
    tie = key == kth
    chosen = (key > kth) | (tie & (tie.cumsum(0) <= room))
    return (chosen & (key > 0)).nonzero().view(-1)
