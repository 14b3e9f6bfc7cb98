"""The step of tensors of which no rank has all entries: DTensors, and the flat partitions of ZeRO.

Each rank has momentum, LMO and update of the entries that lie with it. What it needs to know of the others is the K-th
magnitude of each tensor and a few sums, for which all tensors share the same messages::

    message   K-sparse polytope, k-support ball           L2 ball      other L_p balls
    1         counts by the upper 12 bits of magnitudes   ‖m‖²         ‖m‖_∞
    2         … by the next 12                                         sum of powers
    3         … by the last 7, part by part
    4         ‖m‖², ‖θ − v‖², ⟨m, θ − v⟩                  the same     the same

No vertex travels. Where the parts follow each other in row-major order, the answer is that of one process to the bit.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.distributed as dist
from torch import Tensor

from sfw_dist.constraints import Constraint, KSparsePolytope, KSupportBall, LpBall, Unconstrained, Vertex
from sfw_dist.constraints.base import scaled_to, signed
from sfw_dist.distributed.coalesced import Talk, as_numbers, as_words, together
from sfw_dist.distributed.rank_group import Ranks, agree
from sfw_dist.ops.pairwise_sum import PRODUCTS, Products, square_root
from sfw_dist.ops.sharded_sum import Cut, CutSums, Piece
from sfw_dist.ops.topk.sharded import Share, select_across
from sfw_dist.optim.shard import Slot
from sfw_dist.optim.sharding.replicated import State
from sfw_dist.optim.update import momentum, moved_entries, step_sizes
from sfw_dist.optim.vertex_codec import HEADER


@dataclass(frozen=True)
class Held:
    """What this rank holds of one tensor."""

    slot: Slot
    first: int
    """Lowest index in the whole tensor of its entries."""
    index: Callable[[], Tensor] | None = None
    """Where in the whole the entries lie, if they do not follow each other."""
    count: int | None = None
    """Which of the state's ``step`` is the tensor's, where an engine keeps several tensors in one."""

    @property
    def length(self) -> int:
        return self.slot.stop - self.slot.start


@dataclass(frozen=True)
class _Tensor:
    """A tensor as all ranks see it."""

    parts: tuple[tuple[int, int], ...]
    """First entry and length, in their order; a part that several ranks hold is there once."""
    own: int | None
    """This rank's among them."""
    speaks: bool
    """Whether this is the first rank that holds the part."""
    blocks: bool
    """Whether parts do not follow each other."""


class Sharded:
    """Tensors that the same ranks share, and the steps they take together.

    Args:
        held: one a tensor, in the same order on every rank, also where this rank has no entries of it.
        ranks: who shares them; collective.

    Raises:
        ValueError: ranks with other tensors, parts that leave entries out or overlap, a set that needs whole tensors.
    """

    def __init__(self, held: Sequence[Held], ranks: Ranks, device: torch.device) -> None:
        self.slots = [one.slot for one in held]
        self._held, self._ranks, self._device = held, ranks, device
        for slot in self.slots:
            _check(slot)
        self._tensors = self._survey()
        self._selecting: dict[torch.dtype, list[int]] = {}
        self._scaled: list[int] = []
        for i, (slot, tensor) in enumerate(zip(self.slots, self._tensors, strict=True)):
            if len(tensor.parts) == 1 or isinstance(slot.constraint, Unconstrained):
                continue  # lies with one rank, or has no LMO
            if _selects(slot.constraint):
                self._selecting.setdefault(slot.dtype, []).append(i)
            elif not slot.constraint.signs_only:
                self._scaled.append(i)
        self._sums = self._sums_of(range(len(held)))
        self._sums_of_scaled = {i: self._sums_of([i]) for i in self._scaled}
        self._supports = {
            dtype: [i for i in indices if isinstance(self.slots[i].constraint, KSupportBall)]
            for dtype, indices in self._selecting.items()
        }
        self._sums_above = {dtype: self._sums_of(indices) for dtype, indices in self._supports.items()}
        self._directions: list[Tensor | None] = []
        self._vertices: list[Vertex | None] = []
        self._headers = torch.zeros(len(held), HEADER, dtype=torch.float64, device=device)

    def _survey(self) -> list[_Tensor]:
        """What each rank holds, from all of them."""
        described = [(s.name, s.n, str(s.dtype), repr(s.constraint)) for s in self.slots]
        agree(hashlib.sha256(json.dumps(described).encode()).digest(), self._ranks, {self._device})
        places = [[one.first, one.length, one.index is not None] for one in self._held]
        mine = torch.tensor(places, dtype=torch.int64, device=self._device)
        everyone = mine.clone()
        if self._ranks.size > 1:
            everyone = mine.new_empty(self._ranks.size * len(mine), 3)
            dist.all_gather_into_tensor(everyone, mine, group=self._ranks.group)
        table = everyone.view(self._ranks.size, -1, 3).transpose(0, 1).tolist()
        return [self._tensor(slot, rows) for slot, rows in zip(self.slots, table, strict=True)]

    def _tensor(self, slot: Slot, rows: list[list[int]]) -> _Tensor:
        """One tensor, from ``(first, length, in blocks)`` of every rank."""
        pieces = [(first, length) for first, length, _ in rows]
        parts = tuple(sorted({piece for piece in pieces if piece[1]}))
        blocks = any(in_blocks for _, length, in_blocks in rows if length)
        covered = sum(length for _, length in parts)
        meet = all(a + length == b for (a, length), (b, _) in pairwise(parts)) or blocks
        if covered != slot.n or not meet:
            raise ValueError(
                f"{slot.name} has {slot.n} entries, of which the ranks hold {covered} in parts {parts[:4]}: "
                "all ranks together must hold each entry, and the same ones only where they are replicated"
            )
        mine = pieces[self._ranks.rank]
        own = parts.index(mine) if mine[1] else None
        return _Tensor(parts, own, own is not None and pieces.index(mine) == self._ranks.rank, blocks)

    def _sums_of(self, indices: Sequence[int]) -> CutSums:
        return CutSums([self._cut(i) for i in indices], self._device)

    def _cut(self, i: int) -> Cut:
        slot, tensor = self.slots[i], self._tensors[i]
        own = tensor.own if tensor.speaks else None
        if tensor.blocks or isinstance(slot.constraint, Unconstrained):
            return Cut(slot.n, (), blocks=len(tensor.parts), own=own)
        return Cut(slot.n, tuple((first, first + length) for first, length in tensor.parts), own=own)

    def answer(self, state: State, gradients: Sequence[Tensor | None]) -> None:
        """Momentum, LMO and step size of all tensors, each rank for its entries; collective.

        Args:
            state: ``step`` and ``momentum_buffer`` by parameter; moved on.
            gradients: one a slot, of its parameter; ``None`` on all ranks or on none.
        """
        self._directions = [self._momentum(i, state, gradient) for i, gradient in enumerate(gradients)]
        self._vertices = [self._without_messages(i) for i in range(len(self.slots))]
        talks = [self._select(dtype, indices) for dtype, indices in self._selecting.items()]
        talks += [self._scale(i) for i in self._scaled if self._directions[i] is not None]
        together(talks, self._add_up)
        message = self._sums.outgoing(len(PRODUCTS), [self._products(i) for i in range(len(self.slots))])
        self._add_up(message)
        self._headers = self._make_headers(Products(*self._sums.totals(len(PRODUCTS), message)))

    def exchange(self) -> None:
        """Nothing: each rank has the vertices of its own entries, and needs no others."""

    def headers(self) -> Tensor:
        """Step size, gap and effective learning rate of every slot, float64 ``(slots, 3)``, the same on every rank."""
        return self._headers

    def move(self) -> None:
        """This rank's entries after the step."""
        for slot, vertex, header in zip(self.slots, self._vertices, self._headers, strict=True):
            if vertex is not None:
                slot.entries(slot.parameter.detach()).copy_(moved_entries(slot, header[0], vertex))
        self._directions, self._vertices = [], []

    def forget(self, names: Collection[str], state: State) -> None:
        """Let the momentum of these tensors start anew with their next gradients."""
        for i, slot in enumerate(self.slots):
            if slot.name in names:
                self._count(i, state).zero_()

    def _momentum(self, i: int, state: State, gradient: Tensor | None) -> Tensor | None:
        """This rank's entries of the momentum, ``(length,)``."""
        slot, whole = self.slots[i], state[self.slots[i].parameter]
        if gradient is None:
            return None
        if slot.group["momentum"] > 0 and "momentum_buffer" not in whole:  # a scheduler raised the momentum from 0
            whole.update(fresh_state(slot, whole["step"]))
        own = {"step": self._count(i, state)}
        if "momentum_buffer" in whole:
            own["momentum_buffer"] = slot.entries(whole["momentum_buffer"])
        return momentum(slot, own, gradient)

    def _count(self, i: int, state: State) -> Tensor:
        """How many steps the tensor has taken; a view."""
        step, count = state[self.slots[i].parameter]["step"], self._held[i].count
        return step if count is None else step[count]

    def _without_messages(self, i: int) -> Vertex | None:
        """The vertex's entries here, where nothing of other ranks is needed for them."""
        slot, tensor, m = self.slots[i], self._tensors[i], self._directions[i]
        if m is None or tensor.own is None:
            return None
        if isinstance(slot.constraint, Unconstrained):
            return Vertex(None, m)
        if len(tensor.parts) == 1:
            indices, values = slot.constraint.lmo_vertex(m)
            return Vertex(indices, torch.where(values == 0, -0.0, values))
        if slot.constraint.signs_only and not _selects(slot.constraint):
            return Vertex(None, signed(m, slot.constraint.radius(slot.n)))
        return None

    def _select(self, dtype: torch.dtype, indices: Sequence[int]) -> Talk:
        """Vertices of few nonzeros."""
        shares = [self._share(i) for i in indices]
        supports, sums = self._supports[dtype], self._sums_above[dtype]
        places = [indices.index(i) for i in supports]

        def squares_above(above: Callable[[int], Tensor]) -> Tensor:
            return sums.outgoing(1, [_squares_where(shares[j].entries, above, j) for j in places])

        selected, heard = yield from select_across(shares, dtype, self._device, squares_above if supports else None)
        squares = {} if heard is None else dict(zip(supports, sums.totals(1, heard)[0], strict=True))
        for i, (chosen, beside) in zip(indices, selected, strict=True):
            slot, m = self.slots[i], self._directions[i]
            if m is None or chosen is None:
                continue
            radius = slot.constraint.radius(slot.n)
            at_all = scaled_to(m, square_root(squares[i] + beside), radius) if i in squares else m.sign().mul_(-radius)
            # Dense, for to list the nonzeros would wait for a GPU; −0, for that changes no bit of θ, as adding 0 may.
            self._vertices[i] = Vertex(None, torch.where(chosen, at_all, -0.0))

    def _share(self, i: int) -> Share:
        tensor, m = self._tensors[i], self._directions[i]
        index = self._held[i].index if tensor.blocks else None
        support = self.slots[i].constraint.support(self.slots[i].n)
        if m is None or tensor.own is None:
            return Share(support, len(tensor.parts), index=index)
        return Share(support, len(tensor.parts), tensor.own, m, index, tensor.speaks)

    def _scale(self, i: int) -> Talk:
        """The vertex of an L_p ball, 1 < p < ∞: dense, and scaled by a norm."""
        slot, tensor, m, sums = self.slots[i], self._tensors[i], self._directions[i], self._sums_of_scaled[i]
        ball = slot.constraint
        assert isinstance(ball, LpBall) and m is not None
        largest = m.new_zeros(())
        if ball.p != 2:
            by_part = torch.zeros(len(tensor.parts), dtype=torch.float64, device=self._device)
            if tensor.speaks:
                by_part[tensor.own] = m.abs().max()
            largest = as_numbers((yield as_words(by_part))).max().to(m.dtype)
        direction = ball.direction(m, largest)
        heard = yield sums.outgoing(1, [((ball.terms,), (direction,))])
        if tensor.own is not None:
            norm = ball.norm(sums.totals(1, heard)[0, 0])
            self._vertices[i] = Vertex(None, scaled_to(direction, norm, ball.radius(slot.n)))

    def _products(self, i: int) -> Piece | None:
        """What the step size is made of; of an unconstrained tensor, whether its gradient is finite."""
        m, vertex = self._directions[i], self._vertices[i]
        if m is None or vertex is None:
            return None
        if isinstance(self.slots[i].constraint, Unconstrained):
            return (_poison, _zeros, _zeros), (m,)
        theta = self.slots[i].theta()
        if vertex.indices is None:
            return PRODUCTS, (m, theta - vertex.values)
        return PRODUCTS, (m, theta.index_add(0, vertex.indices, -vertex.values))

    def _make_headers(self, totals: Products) -> Tensor:
        headers = torch.zeros(len(self.slots), HEADER, dtype=torch.float64, device=self._device)
        rates = self._learning_rates()
        kinds: dict[str, list[int]] = {}
        for i, (slot, m) in enumerate(zip(self.slots, self._directions, strict=True)):
            if m is not None:
                free = isinstance(slot.constraint, Unconstrained)
                kinds.setdefault("free" if free else slot.group["rescale"], []).append(i)
        for kind, indices in kinds.items():
            lr, sums = rates[indices], Products(*(total[indices] for total in totals))
            if kind == "free":
                headers[indices] = torch.stack([lr + sums.direction_squared, sums.direction_squared, lr], 1)
            else:
                diameters = [self.slots[i].constraint.diameter(self.slots[i].n) for i in indices]
                diameter = torch.tensor(diameters, dtype=torch.float64, device=self._device)
                headers[indices] = step_sizes(sums, lr, kind, diameter)  # type: ignore[arg-type]
        return headers

    def _learning_rates(self) -> Tensor:
        rates = [slot.group["lr"] for slot in self.slots]
        if any(isinstance(rate, Tensor) for rate in rates):
            return torch.stack([torch.as_tensor(rate, dtype=torch.float64, device=self._device) for rate in rates])
        return torch.tensor(rates, dtype=torch.float64, device=self._device)

    def _add_up(self, words: Tensor) -> None:
        if self._ranks.size > 1:
            dist.all_reduce(words, group=self._ranks.group)


def fresh_state(slot: Slot, step: Tensor) -> dict[str, Tensor]:
    """A momentum of zeros, laid out as the slot's parameter, that starts with the next gradient."""
    if slot.group["momentum"] == 0:
        return {"step": step.zero_()}
    return {"step": step.zero_(), "momentum_buffer": torch.zeros_like(slot.parameter, dtype=slot.dtype)}


def _selects(constraint: Constraint) -> bool:
    return isinstance(constraint, KSparsePolytope | KSupportBall) or (
        isinstance(constraint, LpBall) and constraint.p == 1
    )


def _check(slot: Slot) -> None:
    if not isinstance(slot.constraint, KSparsePolytope | KSupportBall | LpBall | Unconstrained):
        raise ValueError(
            f"{slot.constraint!r} of {slot.name} has an LMO that needs the whole tensor: keep that tensor whole, "
            "or take KSparsePolytope, KSupportBall or LpBall"
        )
    if slot.n >= 2**31:
        raise ValueError(f"{slot.name} has {slot.n} entries, more than int32 can count: split it into several")


def _squares_where(m: Tensor | None, above: Callable[[int], Tensor], j: int) -> Piece | None:
    return None if m is None else ((_square,), (torch.where(above(j), m, 0),))


def _square(x: Tensor) -> Tensor:
    return x.double().square()


def _poison(m: Tensor) -> Tensor:
    """NaN where an entry is not finite, else 0."""
    return m.double() * 0


def _zeros(m: Tensor) -> Tensor:
    return torch.zeros_like(m, dtype=torch.float64)
