"""How the entries of one tensor are divided between ranks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

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
    """Where this rank's entries lie in the whole tensor, int64 ``(entries,)``; only where parts are interleaved."""
