"""Selection in tensors whose parts lie with several ranks: exact, by counts that are added over the ranks.

A magnitude's bits are looked at from the top, 12 of them at a time and 7 in the end: each rank counts its entries by
these bits among those that agree with the K-th magnitude so far, the counts are added up, and every rank sees in them
where the K-th magnitude lies. All tensors share each of the 3 (float64: 6) messages. The last counts are kept apart by
part, so that a rank knows how many entries before its own tie with the K-th magnitude: ties go to the lowest index of
the whole tensor, and take no message more. Only in tensors that are cut into blocks, of which no part follows the
other, the indices of ties are looked at in the same way as magnitudes are, in steps where more of them tie than there
is room for.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from sfw_dist.ops.topk.norm import INTEGERS, LAST_BITS, kept_beside_the_kth

_BITS = 12


@dataclass(frozen=True)
class Share:
    """What this rank has of one tensor."""

    support: int
    """K, of the whole tensor."""
    parts: int
    """Into how many parts the tensor is cut; they follow each other in row-major order, unless ``index`` is given."""
    place: int = 0
    """Of this rank's part among them."""
    entries: Tensor | None = None
    """``(n,)`` float32 or float64; ``None`` where this rank has no part, or another rank speaks for it."""
    index: Callable[[], Tensor] | None = None
    """Of a tensor cut into blocks: int64 ``(n,)``, where in the whole each entry lies."""
    speaks: bool = True
    """Whether this rank's entries are counted: of ranks that hold the same ones, one speaks."""


class Selected(NamedTuple):
    """The entries of one tensor that are among the K of largest magnitude."""

    chosen: Tensor | None
    """Which of this rank's entries they are, bool ``(n,)``; zeros among them too. ``None`` where there is no part."""
    beside_the_kth: Tensor
    """float64 scalar: sum of squares of the selected entries of the whole tensor whose magnitudes agree with the K-th
    in all but the last bits; see :mod:`sfw_dist.ops.topk.norm`."""


def select_across(
    shares: Sequence[Share],
    dtype: torch.dtype,
    device: torch.device,
    aside: Callable[[Callable[[int], Tensor]], Tensor] | None = None,
) -> Generator[Tensor, Tensor, tuple[list[Selected], Tensor | None]]:
    """Which of this rank's entries are among the K of largest magnitude; ties go to the lowest index of the whole.

    A talk for :func:`sfw_dist.distributed.coalesced.together`.

    Args:
        shares: one a tensor, the same tensors on every rank; a rank without any part talks, too.
        dtype: of all entries.
        aside: int32 words to send with the last counts. It may ask for the entries of this rank, by the tensor's
            place, that are selected for sure by then: those whose magnitudes are above the K-th before the last bits.

    Returns:
        One answer a tensor, and the sum of what was said ``aside``.
    """
    keys = [None if s.entries is None else s.entries.abs().view(INTEGERS[dtype]) for s in shares]
    spoken = [key if share.speaks else None for key, share in zip(keys, shares, strict=True)]
    room = torch.tensor([share.support for share in shares], device=device)
    widths = _widths(8 * dtype.itemsize - 1)
    prefix, room = yield from _narrow(spoken, room, widths[:-1], device)

    def above(j: int) -> Tensor:
        key = keys[j]
        assert key is not None
        return (key >> LAST_BITS) > prefix[j]

    parts = max(share.parts for share in shares)
    counts = torch.zeros(len(shares), parts, 2**LAST_BITS, dtype=torch.int32, device=device)
    for j, (share, key) in enumerate(zip(shares, spoken, strict=True)):
        if key is not None:
            _count(key, LAST_BITS, prefix[j], 0, counts[j, share.place])
    extra = aside(above) if aside else counts.new_zeros(0)
    heard = yield torch.cat([counts.view(-1), extra.reshape(-1)])
    by_part = heard[: counts.numel()].view(counts.shape).long()
    last, left = _kth_bin(by_part.sum(1), room)
    kth = (prefix << LAST_BITS) | last
    ties = by_part.gather(2, last.view(-1, 1, 1).expand(-1, parts, 1)).squeeze(2)  # (tensors, parts)
    before = ties.cumsum(1) - ties
    beside = kept_beside_the_kth(by_part.sum(1), last, left, prefix, dtype)

    in_blocks = yield from _ties_in_blocks(shares, keys, kth, left, ties.sum(1), device)
    chosen: list[Tensor | None] = []
    for j, (share, key) in enumerate(zip(shares, keys, strict=True)):
        if key is None:
            chosen.append(None)
        elif share.index is not None:
            chosen.append((key > kth[j]) | ((key == kth[j]) & (share.index() <= in_blocks[j])))
        else:
            chosen.append(_chosen(key, kth[j], left[j] - before[j, share.place], ties[j, share.place]))
    answers = [Selected(which, squares) for which, squares in zip(chosen, beside, strict=True)]
    return answers, heard[counts.numel() :].view(extra.shape) if aside else None


def _widths(bits: int) -> list[int]:
    """How many bits each message looks at: at most 12, and ``LAST_BITS`` in the last."""
    rest = bits - LAST_BITS
    messages = -(-rest // _BITS)
    edges = [rest * i // messages for i in range(messages + 1)]
    return [*(b - a for a, b in pairwise(edges)), LAST_BITS]


def _narrow(
    keys: Sequence[Tensor | None], room: Tensor, widths: Sequence[int], device: torch.device
) -> Generator[Tensor, Tensor, tuple[Tensor, Tensor]]:
    """The leading bits, ``widths`` of them, that the ``room``-th largest key of each tensor has.

    The widths are followed by those that are not looked at here: keys have ``sum(widths) + LAST_BITS`` bits.

    Returns:
        Those bits, int64 ``(tensors,)``, and how much of the room is left for keys that have them.
    """
    prefix = torch.zeros(len(keys), dtype=torch.int64, device=device)
    remaining = list(keys)
    for below, bits in zip(_after(widths), widths, strict=True):
        counts = torch.zeros(len(keys), 2**bits, dtype=torch.int32, device=device)
        for j, key in enumerate(remaining):
            if key is not None:
                _count(key, below + bits, prefix[j], below, counts[j])
        at, room = _kth_bin((yield counts).long(), room)
        prefix = (prefix << bits) | at
        if device.type == "cpu":  # on a GPU to keep the few that agree would wait for the device
            remaining = [None if k is None else k[(k >> below) == prefix[j]] for j, k in enumerate(remaining)]
    return prefix, room


def _after(widths: Sequence[int]) -> list[int]:
    """How many bits follow those of each message."""
    return [sum(widths) - through + LAST_BITS for through in accumulate(widths)]


def _count(key: Tensor, known: int, prefix: Tensor, below: int, counts: Tensor) -> None:
    """Add to ``counts`` the keys whose bits above ``known`` are ``prefix``, by their bits from ``below`` on."""
    if key.device.type == "cpu":
        agreeing = key[(key >> known) == prefix] if 8 * key.itemsize - 1 > known else key
        counts += torch.bincount((agreeing >> below) & (counts.numel() - 1), minlength=counts.numel())
    else:
        agrees = ((key >> known) == prefix).int()
        counts.scatter_add_(0, ((key >> below) & (counts.numel() - 1)).long(), agrees)


def _kth_bin(counts: Tensor, room: Tensor) -> tuple[Tensor, Tensor]:
    """The bin in which the ``room``-th largest lies, and what is left of the room for it; of each row of counts."""
    down_to = counts.flip(1).cumsum(1)  # entries in this bin or a greater one
    at = (down_to >= room[:, None]).to(torch.int8).argmax(1, keepdim=True)
    left = room - (down_to - counts.flip(1)).gather(1, at).view(-1)
    return counts.shape[1] - 1 - at.view(-1), left


def _chosen(key: Tensor, kth: Tensor, room: Tensor, ties: Tensor) -> Tensor:
    if key.device.type == "cpu" and ties <= room:  # to look would wait for a GPU, which is quick to count
        return key >= kth
    tie = key == kth
    return (key > kth) | (tie & (tie.cumsum(0) <= room))


def _ties_in_blocks(
    shares: Sequence[Share],
    keys: Sequence[Tensor | None],
    kth: Tensor,
    room: Tensor,
    ties: Tensor,
    device: torch.device,
) -> Generator[Tensor, Tensor, Tensor]:
    """Up to which index of the whole tensor ties are taken, int64 ``(tensors,)``; of tensors cut into blocks."""
    largest = torch.iinfo(torch.int64).max
    limit = torch.full_like(kth, largest)
    blocks = [j for j, share in enumerate(shares) if share.index is not None]
    if not blocks or not bool(((ties > room) & (kth > 0))[blocks].any()):
        return limit
    bits = 2 * _BITS + LAST_BITS  # of indices below 2^31
    turned = []  # so that the lowest index has the largest key
    for j in blocks:
        key, index = keys[j], shares[j].index
        speaks = key is not None and index is not None and shares[j].speaks
        turned.append(2**bits - 1 - index()[key == kth[j]] if speaks else None)  # type: ignore[misc]
    prefix, left = yield from _narrow(turned, room[blocks], _widths(bits)[:-1], device)
    counts = torch.zeros(len(blocks), 2**LAST_BITS, dtype=torch.int32, device=device)
    for i, key in enumerate(turned):
        if key is not None:
            _count(key, LAST_BITS, prefix[i], 0, counts[i])
    last, _ = _kth_bin((yield counts).long(), left)
    limit[blocks] = 2**bits - 1 - ((prefix << LAST_BITS) | last)
    return limit
