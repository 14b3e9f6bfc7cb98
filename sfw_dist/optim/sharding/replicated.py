"""The slots whose vertices travel together: in a step all of them or, when steps overlap, those of a DDP bucket."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from sfw_dist.constraints import KSparsePolytope, Unconstrained, Vertex
from sfw_dist.distributed.coalesced import together
from sfw_dist.distributed.rank_group import Ranks
from sfw_dist.ops.pairwise_sum import ROW, Products, frank_wolfe_products
from sfw_dist.ops.topk.sharded import Share, select_across
from sfw_dist.optim.kernels import kernel_for
from sfw_dist.optim.kernels.interface import Kernel, Piece
from sfw_dist.optim.shard import Slot, momentum_buffer
from sfw_dist.optim.sharding.assignment import lay_out
from sfw_dist.optim.update import answer, forgets, is_first, momentum, move, no_step, step_size
from sfw_dist.optim.vertex_codec import HEADER

State = dict[Tensor, dict[str, Any]]


@dataclass(frozen=True)
class Divided:
    """A tensor that several ranks share, as this one sees it."""

    parts: list[int]
    """Its slots, in the order of their entries."""
    own: int | None
    """This rank's slot."""
    support: int
    """K, of the whole tensor."""
    rows: slice
    """Its rows among those of all divided tensors of its type."""

    @property
    def place(self) -> int:
        """Of this rank's part among the parts."""
        return 0 if self.own is None else self.parts.index(self.own)


class Batch:
    """Answers, exchanges and applies the vertices of some slots; all buffers are made once.

    Args:
        slots: in the order of the plan; the parts of one tensor follow each other.
        owners: rank of each.
        ranks: who shares the work.
        fused: whether compiled kernels take what they can; the answers are the same.
        replicate: whether momentum is moved on for the slots of other ranks too.
    """

    def __init__(
        self,
        slots: Sequence[Slot],
        owners: Sequence[int],
        ranks: Ranks,
        *,
        fused: bool = True,
        replicate: bool = False,
    ) -> None:
        self.slots, self._owners, self._ranks = list(slots), list(owners), ranks
        device = slots[0].parameter.device
        nbytes = [slot.format.nbytes for slot in slots]
        layout = lay_out(nbytes, owners, ranks.size)
        self._segment = torch.zeros(layout.segment, dtype=torch.uint8, device=device)
        self._gathered = self._segment
        if ranks.size > 1:
            self._gathered = torch.zeros(ranks.size * layout.segment, dtype=torch.uint8, device=device)
        places = list(zip(layout.starts, nbytes, owners, strict=True))
        self._read = [self._gathered[start:][:size] for start, size, _ in places]
        self._written = [
            self._segment[start - owner * layout.segment :][:size] if owner == ranks.rank else None
            for start, size, owner in places
        ]
        firsts = torch.tensor(layout.starts, device=device) // 8
        self._header_places = firsts[:, None] + torch.arange(HEADER, device=device)

        divided = {i for i, slot in enumerate(slots) if not slot.whole and _selects(slot)}
        own_whole = [i for i in range(len(slots)) if self._written[i] is not None and i not in divided]
        self._divided = self._divided_tensors(sorted(divided))
        kernel = kernel_for(device) if fused else None
        self._fused = [i for i, slot in enumerate(slots) if kernel and _fusible(slot, device)]
        self._moved_plainly = [i for i in range(len(slots)) if i not in set(self._fused)]
        # The kernels move all they know, but the LMO of a divided tensor takes messages.
        self._answered = [i for i in own_whole if i in set(self._fused)]
        self._answered_plainly = [i for i in own_whole if i not in set(self._fused)]
        self._followed = [i for i, written in enumerate(self._written) if written is None and replicate]
        self._kernel = kernel([self._piece(i) for i in self._fused]) if kernel and self._fused else None
        self._directions: dict[int, Tensor] = {}

    def _divided_tensors(self, slots: Sequence[int]) -> dict[torch.dtype, list[Divided]]:
        """By the type of their step; the parts of a tensor follow each other among the slots."""
        tensors: dict[torch.dtype, list[Divided]] = {}
        for _, group in groupby(slots, key=lambda i: id(self.slots[i].parameter)):
            parts = list(group)
            slot, n = self.slots[parts[0]], self.slots[parts[0]].parameter.numel()
            own = next((i for i in parts if self._written[i] is not None), None)
            same = tensors.setdefault(slot.dtype, [])
            first = same[-1].rows.stop if same else 0
            same.append(Divided(parts, own, slot.constraint.support(n), slice(first, first - (-n // ROW))))
        return tensors

    def _piece(self, i: int) -> Piece:
        slot = self.slots[i]
        diameter = 0.0 if isinstance(slot.constraint, Unconstrained) else slot.constraint.diameter(slot.format.n)
        written = self._written[i] if i in self._answered else None
        return Piece(slot.parameter, slot.start, slot.format, diameter, written, self._read[i])

    def answer(self, state: State, gradients: Sequence[Tensor | None]) -> None:
        """Momentum, LMO and step size of the slots that this rank owns.

        Args:
            state: ``step`` and ``momentum_buffer`` by parameter; moved on.
            gradients: one a slot, shaped as its parameter; only those of own slots are looked at.
        """
        if self._kernel is not None and self._answered:
            self._answer_fused(self._kernel, state, gradients)
        for dtype, tensors in self._divided.items():
            self._answer_divided(tensors, dtype, state, gradients)
        for i in self._answered_plainly:
            slot = self.slots[i]
            self._write(i, *answer(slot, state[slot.parameter], gradients[i]))
        for i in self._followed:
            momentum(self.slots[i], state[self.slots[i].parameter], gradients[i])

    def _write(self, i: int, header: Tensor, vertex: Vertex) -> None:
        written = self._written[i]
        assert written is not None
        self.slots[i].format.encode(header, vertex, written)

    def _answer_fused(self, kernel: Kernel, state: State, gradients: Sequence[Tensor | None]) -> None:
        options: list[dict[str, Any]] = []
        momenta: list[Tensor | None] = []
        counts: list[NDArray[np.float32]] = []
        for i in self._answered:
            slot, own = self.slots[i], state[self.slots[i].parameter]
            if gradients[i] is None:
                options.append(slot.group | {"first": True})
                momenta.append(None)
                continue
            keeps = slot.group["momentum"] > 0
            options.append(slot.group | {"first": not keeps or is_first(slot, own)})
            momenta.append(own["momentum_buffer"] if keeps else self._direction(i, slot))
            if forgets(slot, own):
                own["step"].zero_()
            else:
                counts.append(own["step"].numpy())  # a view; torch takes ten times as long to add 1 to a number
        kernel.answer([gradients[i] for i in self._answered], momenta, options)
        for count in counts:
            count += 1

    def _direction(self, i: int, slot: Slot) -> Tensor:
        """Room for the direction of a step without momentum."""
        if i not in self._directions:
            self._directions[i] = momentum_buffer(slot)
        return self._directions[i]

    def _answer_divided(
        self, tensors: Sequence[Divided], dtype: torch.dtype, state: State, gradients: Sequence[Tensor | None]
    ) -> None:
        """The LMOs of tensors that several ranks share, of one type, all of them in the same four messages."""
        directions = [
            None if i is None else momentum(self.slots[i], state[self.slots[i].parameter], gradients[i])
            for i in (tensor.own for tensor in tensors)
        ]
        shares = [
            Share(tensor.support, len(tensor.parts), tensor.place, m)
            for tensor, m in zip(tensors, directions, strict=True)
        ]
        device = self._gathered.device
        ((selected, _),) = together([select_across(shares, dtype, device)], self._add_up)

        sums = torch.zeros(3, tensors[-1].rows.stop, dtype=torch.float64, device=device)
        vertices: list[Vertex | None] = []
        for tensor, m, (chosen, _) in zip(tensors, directions, selected, strict=True):
            if tensor.own is None or m is None or chosen is None:
                vertices.append(None)
                continue
            slot = self.slots[tensor.own]
            assert slot.format.radius is not None
            indices = chosen.nonzero().view(-1)
            vertex = slot.format.canonical(Vertex(indices, m[indices].sign() * -slot.format.radius))
            vertices.append(vertex)
            products = torch.stack(list(frank_wolfe_products(m, slot.theta(), *vertex)))  # (3, rows of the part)
            first = tensor.rows.start + slot.start // ROW
            sums[:, first : first + products.shape[1]] = products
        self._add_up(sums)
        for tensor, found in zip(tensors, vertices, strict=True):
            if tensor.own is not None:
                slot = self.slots[tensor.own]
                header = None if found is None else step_size(slot, Products(*sums[:, tensor.rows]))
                self._write(tensor.own, *(no_step(slot) if header is None or found is None else (header, found)))

    def forget(self, names: Collection[str], state: State) -> None:
        """Let the momentum of these tensors start anew with their next gradients."""
        for slot in self.slots:
            if slot.name in names and "step" in state[slot.parameter]:
                state[slot.parameter]["step"].zero_()

    def _add_up(self, x: Tensor) -> None:
        if self._ranks.size > 1:
            dist.all_reduce(x, group=self._ranks.group)

    def exchange(self) -> None:
        """One all-gather, after which all vertices are with all ranks."""
        if self._ranks.size > 1:
            dist.all_gather_into_tensor(self._gathered, self._segment, group=self._ranks.group)

    def headers(self) -> Tensor:
        """Step size, gap and effective learning rate of every slot, float64 ``(slots, 3)``; waits for nothing."""
        return self._gathered.view(torch.float64)[self._header_places]

    def move(self) -> None:
        """All parameters after the step, on every rank, from the same bytes."""
        if self._kernel is not None:
            self._kernel.move()
        for i in self._moved_plainly:
            header, vertex = self.slots[i].format.decode(self._read[i])
            move(self.slots[i], header[0], vertex)


def _selects(slot: Slot) -> bool:
    return isinstance(slot.constraint, KSparsePolytope)


def _fusible(slot: Slot, device: torch.device) -> bool:
    """What the compiled kernels know: sign vertices and plain momentum, in float32, on one device."""
    known = _selects(slot) or isinstance(slot.constraint, Unconstrained)
    return known and slot.dtype == torch.float32 and slot.parameter.device == device
