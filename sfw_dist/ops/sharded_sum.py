"""Sums over tensors that are cut anywhere, to the bit as :mod:`sfw_dist.ops.pairwise_sum` makes them of whole ones.

There a sum is a tree over rows of 8,192 entries, and a row a tree over vectors of 16 lanes. A row that lies with one
rank is one number. Of a row that a cut goes through, each rank sends the largest subtrees that lie with it, and of the
vector in which the cut lies its lanes; the others' lanes are zeros::

    row           ┌───────────────┬───────────────┐         a rank's side of a cut is at most 9 subtrees
    subtrees      │      A        │   B   ┌───┬───┤         and a vector: 10 times 16 float64
    vector cut    │               │       │ C │d┆D│
                  └───────────────┴───────┴───┴───┘         left: A, B, C, d      right: D

All of it is sent bit by bit, each number by one rank, and put together by all in the same order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sfw_dist.distributed.coalesced import as_numbers, as_words
from sfw_dist.ops.pairwise_sum import LANES, ROW, row_sums, tree_sum

_LEVELS = (ROW // LANES).bit_length() - 1
Terms = Callable[..., Tensor]
"""Maps slices of flat tensors to the float64 terms of a sum."""
Piece = tuple[Sequence[Terms], Sequence[Tensor]]
"""The terms of each sum, and this rank's entries of the flat tensors that they take."""


@dataclass(frozen=True)
class Cut:
    """How one tensor lies with the ranks."""

    n: int
    parts: tuple[tuple[int, int], ...]
    """``(start, stop)`` of each part, in row-major order; of a tensor cut into blocks or of which only one number a
    part is wanted, ``()``."""
    blocks: int = 0
    """How many parts a tensor cut into blocks has: each is one number, so that its sums depend on the cut."""
    own: int | None = None
    """This rank's part; ``None`` where it has none, or another rank speaks for it."""

    @property
    def rows(self) -> int:
        return self.blocks or -(-self.n // ROW)

    @property
    def width(self) -> int:
        """Entries of a row, of which all are halved again and again; what follows a short row is zero."""
        return ROW if self.n > ROW else LANES << (-(-self.n // LANES) - 1).bit_length()


@dataclass
class _Fold:
    """Trees of one shape: where the two halves of every sum are, level by level; the last place is a zero."""

    levels: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    @classmethod
    def of(cls, sizes: Sequence[int], device: torch.device) -> _Fold:
        """Of adjacent pairs again and again; an odd one out is added to 0. Leaves of a tree follow each other."""
        fold, present = cls(), list(sizes)
        while max(present, default=1) > 1:
            left: list[int] = []
            right: list[int] = []
            start, total = 0, sum(present)
            for size in present:
                left += range(start, start + size, 2)
                right += [i if i < start + size else total for i in range(start + 1, start + size + 1, 2)]
                start += size
            fold.levels.append((torch.tensor(left, device=device), torch.tensor(right, device=device)))
            present = [-(-size // 2) for size in present]
        return fold

    def __call__(self, x: Tensor) -> Tensor:
        """``(…, leaves)`` → ``(…, trees)``."""
        for left, right in self.levels:
            x = torch.nn.functional.pad(x, (0, 1))
            x = x[..., left] + x[..., right]
        return x


_Node = tuple[int, int, int]
"""Row (of all rows), level (0: a vector), place at that level."""


class CutSums:
    """The layout of some tensors' sums in a message; made once, by every rank from the same cuts."""

    def __init__(self, cuts: Sequence[Cut], device: torch.device) -> None:
        self._cuts, self._device = cuts, device
        self._first_row = [0]
        for cut in cuts:
            self._first_row.append(self._first_row[-1] + cut.rows)
        self._rows = self._first_row[-1]
        places: dict[_Node, int] = {}
        self._own: dict[tuple[int, int], list[tuple[Tensor, Tensor]]] = {}
        """By tensor and start of the piece of a row, for every level: which of this rank's nodes go where."""
        for j, cut in enumerate(cuts):
            for part, (start, stop) in enumerate(cut.parts):
                for a, b in _pieces_of_rows(start, stop, cut.n):
                    nodes = [(node, places.setdefault(node, len(places))) for node in self._nodes(j, a, b)]
                    if part == cut.own:
                        self._own[j, a] = self._by_level(nodes)
        self._nodes_sent = len(places)
        self._fold_nodes(places)
        self._trees = _Fold.of([cut.rows for cut in cuts], device)

    def _nodes(self, j: int, a: int, b: int) -> Iterator[_Node]:
        """The vectors that a cut goes through, and the largest subtrees between them; ``[a, b)`` lies in one row."""
        row, base = self._first_row[j] + a // ROW, a // ROW * ROW
        first, last = a - base, (b - base if b < self._cuts[j].n else -(-(b - base) // LANES) * LANES)
        whole_from, whole_to = -(-first // LANES), last // LANES
        if whole_from > whole_to:  # both cuts in one vector
            yield row, 0, whole_to
            return
        if first % LANES:
            yield row, 0, whole_from - 1
        while whole_from < whole_to:
            level = min((whole_from & -whole_from).bit_length() - 1 if whole_from else _LEVELS, _LEVELS)
            while whole_from + (1 << level) > whole_to:
                level -= 1
            yield row, level, whole_from >> level
            whole_from += 1 << level
        if last % LANES:
            yield row, 0, whole_to

    def _by_level(self, nodes: list[tuple[_Node, int]]) -> list[tuple[Tensor, Tensor]]:
        levels = range(max(level for (_, level, _), _ in nodes) + 1)
        pairs = [[(slot, place) for (_, level, place), slot in nodes if level == wanted] for wanted in levels]
        table = [torch.tensor(pair, dtype=torch.int64, device=self._device).view(-1, 2) for pair in pairs]
        return [(t[:, 0], t[:, 1]) for t in table]

    def _fold_nodes(self, places: dict[_Node, int]) -> None:
        """How the nodes of all cut rows become rows, level by level, and to which rows they belong."""
        self._joins: list[tuple[Tensor, Tensor, Tensor]] = []
        present: list[tuple[int, int]] = []  # row and place of what the level below made
        for level in range(_LEVELS):
            entering = sorted((row, place) for row, at, place in places if at == level)
            known = {node: i for i, node in enumerate([*present, *entering])}
            parents = sorted({(row, place // 2) for row, place in known})
            zero = len(known)
            left = [known.get((row, 2 * place), zero) for row, place in parents]
            right = [known.get((row, 2 * place + 1), zero) for row, place in parents]
            slots = [places[row, level, place] for row, place in entering]
            indices = [torch.tensor(x, dtype=torch.int64, device=self._device) for x in (slots, left, right)]
            self._joins.append((indices[0], indices[1], indices[2]))
            present = parents
        self._cut_rows = torch.tensor([row for row, _ in present], dtype=torch.int64, device=self._device)

    def outgoing(self, sums: int, pieces: Sequence[Piece | None]) -> Tensor:
        """What this rank says of ``sums`` sums a tensor, int32 words; ``None`` for what it has nothing to say of."""
        rows = torch.zeros(sums, self._rows, dtype=torch.float64, device=self._device)
        nodes = torch.zeros(sums, self._nodes_sent, LANES, dtype=torch.float64, device=self._device)
        for j, (cut, piece) in enumerate(zip(self._cuts, pieces, strict=True)):
            if piece is None or cut.own is None:
                continue
            terms, flat = piece
            first = self._first_row[j]
            if cut.blocks:
                rows[:, first + cut.own] = torch.stack([tree_sum(row_sums(term, *flat)) for term in terms])
                continue
            start, stop = cut.parts[cut.own]
            inner = slice(-(-start // ROW), stop // ROW if stop < cut.n else cut.rows)
            if inner.start < inner.stop:
                taken = slice(inner.start * ROW - start, min(inner.stop * ROW, cut.n) - start)
                whole = torch.stack([row_sums(term, *(x[taken] for x in flat)) for term in terms])
                rows[:, first + inner.start : first + inner.stop] = whole
            for a, b in _pieces_of_rows(start, stop, cut.n):
                row = torch.zeros(sums, cut.width, dtype=torch.float64, device=self._device)
                for line, term in zip(row, terms, strict=True):
                    line[a % ROW : a % ROW + b - a] = term(*(x[a - start : b - start] for x in flat))
                vectors = row.view(sums, -1, LANES)
                for level, (slots, places) in enumerate(self._own[j, a]):
                    if level:
                        vectors = vectors[:, 0::2] + vectors[:, 1::2]
                    nodes[:, slots] = vectors[:, places]
        return torch.cat([as_words(rows).view(-1), as_words(nodes).view(-1)])

    def totals(self, sums: int, heard: Tensor) -> Tensor:
        """The sums of all tensors, float64 ``(sums, tensors)``, from what all ranks said."""
        numbers = as_numbers(heard)
        rows = numbers[: sums * self._rows].view(sums, self._rows)
        if self._nodes_sent:
            nodes = numbers[sums * self._rows :].view(sums, self._nodes_sent, LANES)
            joined = nodes[:, :0]
            for slots, left, right in self._joins:
                joined = torch.cat([joined, nodes[:, slots], torch.zeros_like(nodes[:, :1])], 1)
                joined = joined[:, left] + joined[:, right]
            rows[:, self._cut_rows] = tree_sum(joined, 2)
        return self._trees(rows)


def _pieces_of_rows(start: int, stop: int, n: int) -> Iterator[tuple[int, int]]:
    """The pieces of ``[start, stop)`` at its ends that do not fill their rows; the tensor's last row ends with it."""
    head = -(-start // ROW) * ROW
    tail = stop // ROW * ROW if stop < n else stop
    if head > tail:  # within one row
        yield start, stop
        return
    if start < head:
        yield start, min(head, stop)
    if tail < stop:
        yield max(tail, start), stop
