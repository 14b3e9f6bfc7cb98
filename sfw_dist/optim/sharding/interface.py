"""What the optimizer asks of a distributor: the step of some tensors, shared by several ranks."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Protocol

from torch import Tensor

from sfw_dist.optim.shard import Shard, State


class Distributor(Protocol):
    """The step of a fixed list of shards, in four phases that every rank enters in this order."""

    shards: list[Shard]

    def compute_vertices(self, state: State, gradients: Sequence[Tensor | None]) -> None:
        """Momentum, LMO and step size.

        Args:
            state: ``step`` and ``momentum_buffer`` by parameter; updated.
            gradients: one a shard, of its parameter.
        """

    def all_gather_vertices(self) -> None:
        """Give every rank the vertices that it needs for the update."""

    def step_stats(self) -> Tensor:
        """Step size, Frank-Wolfe gap and effective learning rate of every shard, float64 ``(shards, 3)``.

        They are the same on every rank, and lie on the parameters' device: nothing waits for it.
        """

    def apply_update(self) -> None:
        """``θ ← (1 − γ)·θ + γ·v`` for all entries that this rank holds, in place."""

    def reset_momentum(self, names: Collection[str], state: State) -> None:
        """Let the momentum of these tensors start afresh with their next gradients."""
