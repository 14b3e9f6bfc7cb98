"""How the entries of one tensor are divided between ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor


@dataclass(frozen=True)
class Partition:
    """The parts of one tensor, the same on every rank, and which of them this rank has."""

    numel: int
    """Entries of the whole tensor."""
    parts: tuple[tuple[int, int], ...]
    """``(first entry, entries)`` of each part, row-major, in order; a part that several ranks hold is listed once."""
    own: int | None = None
    """Which part this rank has; ``None``: none."""
    is_primary: bool = False
    """Whether this rank is the first of those that hold its part: only its entries are counted and summed."""
    interleaved: bool = False
    """Whether the entries of a part are not consecutive (a tensor divided along several dimensions)."""
    indices: Callable[[], Tensor] | None = None
    """Where this rank's entries lie in the whole tensor, int64 ``(entries,)``, on any device; only where parts are
    interleaved."""

    @classmethod
    def of_places(
        cls, name: str, numel: int, places: Sequence[Sequence[int]], rank: int, indices: Callable[[], Tensor] | None
    ) -> Partition:
        """How a tensor is divided, from what each rank holds of it.

        Args:
            name: of the tensor.
            numel: entries of the whole tensor.
            places: ``(first entry, entries, whether they are not consecutive)`` of each rank.
            rank: this one.
            indices: where this rank's entries lie in the whole tensor; asked only where parts are interleaved.

        Raises:
            ValueError: the ranks do not hold each entry, or hold the same ones otherwise than as equal parts.
        """
        pieces = [(first, length) for first, length, _ in places]
        parts = tuple(sorted({piece for piece in pieces if piece[1]}))
        interleaved = any(bool(flag) for _, length, flag in places if length)
        held = sum(length for _, length in parts)
        consecutive = all(a + length == b for (a, length), (b, _) in pairwise(parts))
        if held != numel or not (consecutive or interleaved):
            raise ValueError(
                f"{name} has {numel} entries, and the ranks hold {held} in parts {parts[:4]}: all ranks together must "
                "hold each entry, and the same ones only where they are replicated"
            )
        mine = pieces[rank]
        own = parts.index(mine) if mine[1] else None
        is_primary = own is not None and pieces.index(mine) == rank
        return cls(numel, parts, own, is_primary, interleaved, indices if interleaved else None)
