"""How the last step went, tensor by tensor."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from torch import Tensor

from sfw_dist.optim.shard import Shard
from sfw_dist.optim.vertex_codec import STATS


class StepStatistics(NamedTuple):
    """What the last step did to one constrained tensor."""

    gap: float
    """Frank-Wolfe gap ``⟨m, θ − v⟩ ≥ 0`` of the momentum; for a full gradient it is 0 only at stationary points."""
    gamma: float
    """Step size γ in [0, 1]: the fraction of the way from θ to the vertex."""
    effective_lr: float
    """``γ·‖θ − v‖₂ / ‖m‖₂``: the learning rate with which SGD would have moved the tensor as far."""


class LastStep:
    """The statistics of the last step, on their device, one table for the tensors that stepped together."""

    def __init__(self) -> None:
        self._tables: dict[tuple[str, ...], Tensor] = {}

    def clear(self) -> None:
        """Forget the last step, when other tensors step together from now on."""
        self._tables.clear()

    def record(self, shards: Sequence[Shard], stats: Tensor) -> None:
        """Keep the statistics ``(shards, 3)`` of some shards until their next step."""
        self._tables[tuple(shard.name for shard in shards)] = stats

    def not_finite(self, *, wait: bool) -> set[str]:
        """The tensors whose gradients were not finite; those on a GPU only with ``wait``, because it means waiting."""
        bad: set[str] = set()
        for names, table in self._tables.items():
            if wait or table.device.type == "cpu":
                finite = table[:, 0].isfinite()
                if not finite.all():
                    bad |= {name for name, good in zip(names, finite.tolist(), strict=True) if not good}
        return bad

    def statistics(self, shards: Iterable[Shard]) -> dict[str, StepStatistics]:
        """By name, of the constrained tensors; zeros for those that have not stepped. Waits for a GPU."""
        rows = {n: row for names, table in self._tables.items() for n, row in zip(names, table.tolist(), strict=True)}
        return {
            shard.name: StepStatistics(gap=gap, gamma=gamma, effective_lr=effective)
            for shard in shards
            if not shard.constraint.is_unconstrained
            for gamma, gap, effective in [rows.get(shard.name, [0.0] * STATS)]
        }
