"""The step of tensors of which no rank has all entries: DTensors, ZeRO's flat partitions, tensors divided under DDP.

Each rank keeps momentum, LMO and update of the entries it holds. From the others it needs the K-th magnitude of each
tensor and a few sums, and all tensors share the same messages::

    message   K-sparse polytope                           k-support ball    L2 ball      other L_p balls
    1         counts by the upper 12 bits of magnitudes   the same          ‖m‖²         ‖m‖_∞
    2         … by the next 12                            the same                       Σ|v_i|^p
    3         … by the last 7, part by part               the same
    4                                                     ‖kept entries‖²
    last      ‖m‖², ‖θ − v‖², ⟨m, θ − v⟩                  the same          the same     the same

No vertex travels. Which entries are selected is exact, and does not depend on how a tensor is divided. Sums are those
of one process to the bit where every part begins at a row of the pairwise sum (:mod:`sfw_dist.ops.sharded_sum`), and to
rounding elsewhere; all ranks have the same ones.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from sfw_dist.constraints import Constraint, Vertex
from sfw_dist.constraints.base import ShardedDirection
from sfw_dist.distributed.coalesced import run_coalesced
from sfw_dist.distributed.rank_group import RankGroup
from sfw_dist.ops.pairwise_sum import PRODUCTS, Products
from sfw_dist.ops.partition import Partition
from sfw_dist.ops.sharded_sum import ShardedSums, partial_sums
from sfw_dist.optim.shard import Shard, State, new_state
from sfw_dist.optim.update import learning_rate, step_stats, update_momentum, updated_entries
from sfw_dist.optim.vertex_codec import STATS

_UNCONSTRAINED = "unconstrained"


class ShardedDistributor:
    """Tensors divided between the same ranks, stepped together; a :class:`~.interface.Distributor`.

    Args:
        shards: one a tensor, in the same order on every rank, also where this rank has no entries of it.
        partitions: of each tensor.
        ranks: who shares them.
        device: of the parameters.

    Raises:
        ValueError: a set whose LMO needs the whole tensor, or a tensor of 2³¹ entries or more.
    """

    def __init__(
        self, shards: Sequence[Shard], partitions: Sequence[Partition], ranks: RankGroup, device: torch.device
    ) -> None:
        self.shards = list(shards)
        self._partitions, self._ranks, self._device = list(partitions), ranks, device
        for shard in self.shards:
            _check(shard)
        # Tensors with the same kind of set and type run their LMOs as one task.
        self._lmos: dict[tuple[type[Constraint], torch.dtype], list[int]] = {}
        for i, (shard, partition) in enumerate(zip(self.shards, self._partitions, strict=True)):
            if len(partition.parts) > 1 and not shard.constraint.is_unconstrained:
                self._lmos.setdefault((type(shard.constraint), shard.dtype), []).append(i)
        self._sums = ShardedSums(self._partitions, device)
        self._parts = torch.tensor([len(partition.parts) for partition in self._partitions], device=device)
        diameters = [s.constraint.diameter(s.global_numel) for s in self.shards]
        self._diameters = torch.tensor(diameters, dtype=torch.float64, device=device)
        self._rules: list[str] = []
        self._by_rule: dict[str, Tensor] = {}
        self._directions: list[Tensor | None] = []
        self.vertices: list[Vertex | None] = []
        """Over this rank's entries, after :meth:`compute_vertices`; ``None`` where it has none, or no gradient."""
        self._stats = torch.zeros(len(self.shards), STATS, dtype=torch.float64, device=device)

    def compute_vertices(self, state: State, gradients: Sequence[Tensor | None]) -> None:
        """Momentum, LMO and step size of all tensors, each rank for its entries; collective.

        A tensor that lacks a gradient on any rank stays as it is on all of them.
        """
        self._directions = [self._momentum(i, state, gradient) for i, gradient in enumerate(gradients)]
        self.vertices = [self._local_vertex(i) for i in range(len(self.shards))]
        groups = list(self._lmos.items())
        tasks = [constraint.sharded_lmos([self._direction(i) for i in group]) for (constraint, _), group in groups]
        for (_, group), found in zip(groups, run_coalesced(tasks, self._ranks.all_reduce), strict=True):
            for i, vertex in zip(group, found, strict=True):
                self.vertices[i] = vertex
        message = self._sums.message(len(PRODUCTS) + 1, [self._products(i) for i in range(len(self.shards))])
        for i, (partition, m) in enumerate(zip(self._partitions, self._directions, strict=True)):
            if m is not None and partition.is_primary:
                message[-1, self._sums.first_own_slot(i)] = 1  # counts the parts that have a gradient
        self._ranks.all_reduce(message)
        self._stats = self._step_stats(self._sums.totals(message))

    def all_gather_vertices(self) -> None:
        """Nothing: each rank has the vertices of its own entries, and needs no others."""

    def step_stats(self) -> Tensor:
        """See :class:`~.interface.Distributor`."""
        return self._stats

    def apply_update(self) -> None:
        """This rank's entries after the step."""
        for shard, vertex, stats in zip(self.shards, self.vertices, self._stats, strict=True):
            if vertex is not None:
                shard.entries(shard.parameter.detach()).copy_(updated_entries(shard, stats[0], vertex))
        self._directions, self.vertices = [], []

    def reset_momentum(self, names: Collection[str], state: State) -> None:
        """See :class:`~.interface.Distributor`."""
        for shard in self.shards:
            if shard.name in names:
                shard.steps_taken(state).zero_()

    def _momentum(self, i: int, state: State, gradient: Tensor | None) -> Tensor | None:
        """This rank's entries of the momentum, ``(numel,)``."""
        shard, own = self.shards[i], state[self.shards[i].parameter]
        if gradient is None or "step" not in own:  # under DDP only owners of a part have state
            return None
        if shard.group["momentum"] > 0 and "momentum_buffer" not in own:  # a scheduler raised the momentum from 0
            own.update(new_state(shard, own["step"]))
        return update_momentum(shard, {**own, "step": shard.steps_taken(state)}, gradient)

    def _local_vertex(self, i: int) -> Vertex | None:
        """The vertex of a tensor that lies with one rank, or that is unconstrained."""
        shard, partition, m = self.shards[i], self._partitions[i], self._directions[i]
        if m is None or partition.own is None:
            return None
        if shard.constraint.is_unconstrained:
            return Vertex(None, m)
        if len(partition.parts) == 1:
            indices, values = shard.constraint.lmo_vertex(m)
            return Vertex(indices, torch.where(values == 0, -0.0, values))
        return None

    def _direction(self, i: int) -> ShardedDirection:
        shard, partition = self.shards[i], self._partitions[i]
        entries = self._directions[i] if partition.own is not None else None
        return ShardedDirection(shard.constraint, entries, partition, shard.dtype, self._device)

    def _products(self, i: int) -> Tensor | None:
        """This rank's share of the sums behind the step size; unconstrained: 0, or NaN for a bad gradient."""
        shard, partition, m, vertex = self.shards[i], self._partitions[i], self._directions[i], self.vertices[i]
        if m is None or vertex is None:
            return None
        if shard.constraint.is_unconstrained:
            return partial_sums(partition, [_zero_or_nan], m)
        theta = shard.theta()
        v = vertex.values
        difference = theta - v if vertex.indices is None else theta.index_add(0, vertex.indices, -v)
        return partial_sums(partition, PRODUCTS, m, difference)

    def _step_stats(self, totals: Tensor) -> Tensor:
        """float64 ``(shards, 3)`` from the sums ``(4, shards)``."""
        stats = torch.zeros(len(self.shards), STATS, dtype=torch.float64, device=self._device)
        rates = self._learning_rates()
        for rule, indices in self._tensors_by_rule().items():
            lr, sums = rates[indices], Products(*totals[:3, indices])
            if rule == _UNCONSTRAINED:
                poison = sums.direction_squared
                stats[indices] = torch.stack([lr + poison, poison, lr], 1)
            else:
                stats[indices] = step_stats(sums, lr, rule, self._diameters[indices])  # type: ignore[arg-type]
        return torch.where((totals[3] == self._parts)[:, None], stats, 0.0)

    def _tensors_by_rule(self) -> dict[str, Tensor]:
        """Which tensors become their step sizes by which rule; sent to the device again only when a rule changed."""
        rules = [_UNCONSTRAINED if s.constraint.is_unconstrained else s.group["rescale"] for s in self.shards]
        if rules != self._rules:
            self._rules, self._by_rule = rules, {}
            for rule in dict.fromkeys(rules):
                places = [i for i, other in enumerate(rules) if other == rule]
                self._by_rule[rule] = torch.tensor(places, device=self._device)
        return self._by_rule

    def _learning_rates(self) -> Tensor:
        rates = [learning_rate(shard.group) for shard in self.shards]
        if any(isinstance(rate, Tensor) for rate in rates):
            return torch.stack([torch.as_tensor(rate, dtype=torch.float64, device=self._device) for rate in rates])
        return torch.tensor(rates, dtype=torch.float64, device=self._device)


def _check(shard: Shard) -> None:
    if not shard.constraint.divisible:
        raise ValueError(
            f"{shard.constraint!r} of {shard.name} has an LMO that needs the whole tensor: keep that tensor whole, "
            "or take KSparsePolytope, KSupportBall or LpBall"
        )
    if shard.global_numel >= 2**31:
        raise ValueError(
            f"{shard.name} has {shard.global_numel} entries, more than int32 can count: split it into several"
        )


def _zero_or_nan(m: Tensor) -> Tensor:
    """NaN where an entry is not finite, else 0."""
    return m.double() * 0
