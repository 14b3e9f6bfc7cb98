"""The step of tensors that every rank has whole, as under DDP: owners compute vertices, all ranks apply them."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from itertools import groupby
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from sfw_dist.constraints import Vertex
from sfw_dist.distributed.rank_group import RankGroup
from sfw_dist.ops.partition import Partition
from sfw_dist.optim.kernels import kernel_for
from sfw_dist.optim.kernels.interface import Kernel, KernelShard
from sfw_dist.optim.shard import Shard, State, new_momentum
from sfw_dist.optim.sharding.assignment import lay_out
from sfw_dist.optim.sharding.sharded import ShardedDistributor
from sfw_dist.optim.update import (
    apply_update,
    compute_vertex,
    is_first_step,
    learning_rate,
    momentum_disabled,
    no_update,
    update_momentum,
)
from sfw_dist.optim.vertex_codec import STATS


class ReplicatedDistributor:
    """Shards that are stepped and all-gathered together; a :class:`~.interface.Distributor`. All buffers are made once.

    Args:
        shards: in the order of the assignment; the shards of one tensor are adjacent.
        owners: rank of each.
        ranks: who shares the work.
        fused: whether compiled kernels take what they can; the results are the same.
        replicate: whether momentum is updated for the shards of other ranks too.
    """

    def __init__(
        self,
        shards: Sequence[Shard],
        owners: Sequence[int],
        ranks: RankGroup,
        *,
        fused: bool = True,
        replicate: bool = False,
    ) -> None:
        self.shards, self._owners, self._ranks = list(shards), list(owners), ranks
        self._make_buffers()
        self._make_divided()
        device = self.shards[0].parameter.device
        kernel = kernel_for(device) if fused else None
        self._fused = [i for i, shard in enumerate(self.shards) if kernel and _fusible(shard, device)]
        fused_too, divided = set(self._fused), set(self._divided_shards)
        self._applied_plainly = [i for i in range(len(self.shards)) if i not in fused_too]
        # The kernels apply every vertex they know, but the LMO of a divided tensor takes messages.
        own_whole = [i for i, out in enumerate(self._written) if out is not None and i not in divided]
        self._computed = [i for i in own_whole if i in fused_too]
        self._computed_plainly = [i for i in own_whole if i not in fused_too]
        self._followed = [i for i, out in enumerate(self._written) if out is None and replicate]
        self._kernel: Kernel | None = None
        if kernel and self._fused:
            self._kernel = kernel([self._kernel_shard(i) for i in self._fused])
        self._unkept: dict[int, Tensor] = {}

    def _make_buffers(self) -> None:
        """One slot a shard: this rank's segment, which it writes, and the gathered one, which it reads."""
        device, size, rank = self.shards[0].parameter.device, self._ranks.size, self._ranks.rank
        nbytes = [shard.codec.nbytes for shard in self.shards]
        layout = lay_out(nbytes, self._owners, size)
        self._segment = torch.zeros(layout.segment, dtype=torch.uint8, device=device)
        self._gathered = self._segment
        if size > 1:
            self._gathered = torch.zeros(size * layout.segment, dtype=torch.uint8, device=device)
        slots = list(zip(layout.starts, nbytes, self._owners, strict=True))
        self._read = [self._gathered[start:][:length] for start, length, _ in slots]
        self._written = [
            self._segment[start - owner * layout.segment :][:length] if owner == rank else None
            for start, length, owner in slots
        ]
        first_numbers = torch.tensor(layout.starts, device=device) // 8
        self._stats_places = first_numbers[:, None] + torch.arange(STATS, device=device)

    def _make_divided(self) -> None:
        """The constrained tensors that several ranks share; their vertices are computed as those of DTensors are."""
        candidates = [i for i, s in enumerate(self.shards) if not (s.is_whole or s.constraint.is_unconstrained)]
        self._divided_shards = candidates
        shards: list[Shard] = []
        partitions: list[Partition] = []
        self._divided_own: list[int | None] = []
        for _, group in groupby(candidates, key=lambda i: id(self.shards[i].parameter)):
            parts = list(group)
            mine = next((j for j, i in enumerate(parts) if self._written[i] is not None), None)
            places = tuple((self.shards[i].global_offset, self.shards[i].numel) for i in parts)
            partitions.append(Partition(self.shards[parts[0]].global_numel, places, mine, mine is not None))
            shards.append(self.shards[parts[mine or 0]])
            self._divided_own.append(None if mine is None else parts[mine])
        device = self.shards[0].parameter.device
        self._divided = ShardedDistributor(shards, partitions, self._ranks, device) if shards else None

    def _kernel_shard(self, i: int) -> KernelShard:
        shard = self.shards[i]
        unconstrained = shard.constraint.is_unconstrained
        diameter = 0.0 if unconstrained else shard.constraint.diameter(shard.global_numel)
        written = self._written[i] if i in self._computed else None
        return KernelShard(shard.parameter, shard.start, shard.codec, diameter, written, self._read[i])

    def compute_vertices(self, state: State, gradients: Sequence[Tensor | None]) -> None:
        """Momentum, LMO and step size of the shards that this rank owns; the gradients of others are not looked at."""
        if self._kernel is not None and self._computed:
            self._compute_fused(self._kernel, state, gradients)
        if self._divided is not None:
            self._compute_divided(self._divided, state, gradients)
        for i in self._computed_plainly:
            self._write(i, *compute_vertex(self.shards[i], state[self.shards[i].parameter], gradients[i]))
        for i in self._followed:
            update_momentum(self.shards[i], state[self.shards[i].parameter], gradients[i])

    def _write(self, i: int, stats: Tensor, vertex: Vertex) -> None:
        written = self._written[i]
        assert written is not None
        self.shards[i].codec.encode(stats, vertex, written)

    def _compute_fused(self, kernel: Kernel, state: State, gradients: Sequence[Tensor | None]) -> None:
        options: list[dict[str, Any]] = []
        momenta: list[Tensor | None] = []
        counts: list[NDArray[np.float32]] = []
        taken: list[Tensor | None] = []
        plainly: list[int] = []
        for i in self._computed:
            shard, own = self.shards[i], state[self.shards[i].parameter]
            gradient = gradients[i]
            if gradient is not None and not kernel.takes(gradient, shard.parameter):
                plainly.append(i)
                gradient = None
            taken.append(gradient)
            if gradient is None:
                options.append(shard.group | {"lr": 0.0, "first": True})
                momenta.append(None)
                continue
            keeps = shard.group["momentum"] > 0
            first = not keeps or is_first_step(shard, own)
            options.append(shard.group | {"lr": learning_rate(shard.group), "first": first})
            momenta.append(own["momentum_buffer"] if keeps else self._unkept_momentum(i, shard))
            if momentum_disabled(shard, own):
                own["step"].zero_()
            else:
                counts.append(own["step"].numpy())  # a view; torch takes ten times as long to add 1 to a number
        kernel.compute_vertices(taken, momenta, options)
        for count in counts:
            count += 1
        for i in plainly:
            self._write(i, *compute_vertex(self.shards[i], state[self.shards[i].parameter], gradients[i]))

    def _unkept_momentum(self, i: int, shard: Shard) -> Tensor:
        """Memory for the direction of a step without momentum."""
        if i not in self._unkept:
            self._unkept[i] = new_momentum(shard)
        return self._unkept[i]

    def _compute_divided(self, divided: ShardedDistributor, state: State, gradients: Sequence[Tensor | None]) -> None:
        by_parameter = {shard.parameter: gradient for shard, gradient in zip(self.shards, gradients, strict=True)}
        divided.compute_vertices(state, [by_parameter[shard.parameter] for shard in divided.shards])
        for i, vertex, stats in zip(self._divided_own, divided.vertices, divided.step_stats(), strict=True):
            if i is not None:
                self._write(i, *(no_update(self.shards[i]) if vertex is None else (stats, vertex)))

    def all_gather_vertices(self) -> None:
        """One all-gather, after which every rank has all vertices."""
        if self._ranks.size > 1:
            dist.all_gather_into_tensor(self._gathered, self._segment, group=self._ranks.group)

    def step_stats(self) -> Tensor:
        """See :class:`~.interface.Distributor`."""
        return self._gathered.view(torch.float64)[self._stats_places]

    def apply_update(self) -> None:
        """All parameters after the step, on every rank, from the same bytes."""
        if self._kernel is not None:
            self._kernel.apply_update()
            # The kernels write to memory; a backward pass that still needs the old values must notice.
            torch.autograd.graph.increment_version([self.shards[i].parameter for i in self._fused])
        for i in self._applied_plainly:
            stats, vertex = self.shards[i].codec.decode(self._read[i])
            apply_update(self.shards[i], stats[0], vertex)

    def reset_momentum(self, names: Collection[str], state: State) -> None:
        """See :class:`~.interface.Distributor`."""
        for shard in self.shards:
            if shard.name in names and "step" in state[shard.parameter]:
                state[shard.parameter]["step"].zero_()


def _fusible(shard: Shard, device: torch.device) -> bool:
    """Whether the compiled kernels know the step: signs of K entries or plain momentum, in float32, on one device."""
    known = (shard.constraint.selects and shard.constraint.signs_only) or shard.constraint.is_unconstrained
    return known and shard.dtype == torch.float32 and shard.parameter.device == device
