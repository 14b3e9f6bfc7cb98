"""How the last step went, tensor by tensor."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from torch import Tensor

from sfw_dist.constraints import Unconstrained
from sfw_dist.optim.shard import Slot
from sfw_dist.optim.vertex_codec import HEADER


class StepStatistics(NamedTuple):
    """What the last step did to one constrained tensor."""

    gap: float
    """Frank-Wolfe gap ``⟨m, θ − v⟩ ≥ 0`` of the momentum; of a full gradient it is 0 just at stationary points."""
    gamma: float
    """Step size γ in [0, 1]: the fraction of the way from θ to the vertex."""
    effective_lr: float
    """``γ·‖θ − v‖₂ / ‖m‖₂``: the learning rate with which SGD would have moved the tensor as far."""


class Headers:
    """The headers of the last step, on their device, by the names of the tensors that stepped together."""

    def __init__(self) -> None:
        self._tables: dict[tuple[str, ...], Tensor] = {}

    def clear(self) -> None:
        self._tables.clear()

    def keep(self, slots: Sequence[Slot], table: Tensor) -> None:
        """Take the headers ``(slots, 3)`` of some tensors, in the place of their last ones.

        They may have stepped in other company then: DDP lays its buckets out anew, and overlap comes and goes.
        """
        names = tuple(slot.name for slot in slots)
        for old in [old for old in self._tables if not set(names).isdisjoint(old)]:
            del self._tables[old]
        self._tables[names] = table

    def not_finite(self, *, wait: bool) -> set[str]:
        """The tensors whose gradients were not finite; of those on a GPU only with ``wait``, for it takes waiting."""
        bad: set[str] = set()
        for names, table in self._tables.items():
            if wait or table.device.type == "cpu":
                finite = table[:, 0].isfinite()
                if not finite.all():
                    bad |= {name for name, good in zip(names, finite.tolist(), strict=True) if not good}
        return bad

    def statistics(self, slots: Iterable[Slot]) -> dict[str, StepStatistics]:
        """Of the constrained tensors, in their order; 0 for those that have not stepped. Waits for a GPU."""
        rows = {n: row for names, table in self._tables.items() for n, row in zip(names, table.tolist(), strict=True)}
        return {
            slot.name: StepStatistics(gap=gap, gamma=gamma, effective_lr=effective)
            for slot in slots
            if not isinstance(slot.constraint, Unconstrained)
            for gamma, gap, effective in [rows.get(slot.name, [0.0] * HEADER)]
        }
