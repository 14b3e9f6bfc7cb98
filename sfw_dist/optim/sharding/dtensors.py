"""From param groups to what this rank holds of their tensors: DTensors, or an engine's flat memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from sfw_dist.constraints import Constraint
from sfw_dist.distributed.dtensor import Block, local, sharing
from sfw_dist.distributed.rank_group import Ranks
from sfw_dist.optim.param_groups import constraint_of, name_of
from sfw_dist.optim.shard import Slot, step_dtype
from sfw_dist.optim.sharding.replicated import State
from sfw_dist.optim.sharding.segment import Segment
from sfw_dist.optim.sharding.sharded import Held, Sharded, fresh_state
from sfw_dist.optim.vertex_codec import VertexFormat

Groups = Sequence[dict[str, Any]]


class Shared:
    """The tensors of an optimizer of which no rank has all, as batches that step together; made when asked for."""

    def __init__(self) -> None:
        self._batches: list[Sharded] | None = None
        self._segments: dict[Tensor, Sequence[Segment]] | None = None
        self._ranks = Ranks(None, 0, 1)
        self._adopted: dict[tuple[int, ...], tuple[Groups, list[Sharded]]] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Without what belongs to this process's groups of ranks."""
        return {**self.__dict__, "_batches": None, "_adopted": {}}

    @property
    def flat(self) -> bool:
        """Whether an engine keeps the parameters in flat tensors of its own."""
        return self._segments is not None

    @property
    def slots(self) -> list[Slot]:
        """Of all tensors, whatever groups step now."""
        return [slot for batch in self._batches or () for slot in batch.slots]

    def batches(self, groups: Groups) -> list[Sharded]:
        """What there is in these groups; collective where it is not yet known."""
        if self._segments is not None:
            # An engine may step group by group, and bring other groups after it has loaded them.
            key = tuple(map(id, groups))
            if key not in self._adopted:
                self._adopted[key] = groups, of_segments(groups, self._segments, self._ranks)
            return self._adopted[key][1]
        if self._batches is None:
            self._batches = of_dtensors(groups)
        return self._batches

    def remake(self, groups: Groups, state: State) -> None:
        """After groups have come, or their sets have changed; makes the state of new DTensors."""
        self._batches = None
        self.batches(groups)
        for slot in self.slots:
            if not state[slot.parameter]:
                state[slot.parameter].update(fresh_state(slot, torch.zeros(())))

    def adopt(self, groups: Groups, segments: Mapping[int, Sequence[Segment]], ranks: Ranks, state: State) -> None:
        """See :meth:`sfw_dist.SFW.adopt`."""
        self._segments = {groups[number]["params"][0]: tensors for number, tensors in segments.items()}
        self._ranks, self._adopted = ranks, {}
        self._batches = [batch for group in groups for batch in self.batches([group])]
        state.clear()
        for slot in self.slots:
            count = torch.zeros(len(self._segments[slot.parameter]), device=slot.parameter.device)
            state[slot.parameter] = fresh_state(slot, count)


def of_dtensors(groups: Groups) -> list[Sharded]:
    """The DTensors of the groups, by the mesh on which they lie; collective."""
    found = [
        (group, name_of(group, number, j), parameter, constraint_of(group, j))
        for number, group in enumerate(groups)
        for j, parameter in enumerate(group["params"])
        if isinstance(parameter, DTensor)
    ]
    batches = []
    for mesh, dims in sharing(parameter for _, _, parameter, _ in found):
        held = [
            _held(group, name, parameter, constraint)
            for group, name, parameter, constraint in found
            if parameter.device_mesh == mesh
        ]
        batches.append(Sharded(held, ranks_along(mesh, dims), local(held[0].slot.parameter).device))
    return batches


def ranks_along(mesh: DeviceMesh, dims: list[int]) -> Ranks:
    """The ranks that differ from this one in these dimensions of the mesh alone; collective among them."""
    if not dims:
        return Ranks(None, 0, 1)
    others = [dim for dim in range(mesh.ndim) if dim not in dims]
    lines = mesh.mesh.permute(*others, *dims).reshape(-1, *(mesh.mesh.shape[dim] for dim in dims))
    mine = next(line.flatten().tolist() for line in lines if (line == dist.get_rank()).any())
    if len(dims) == 1:
        return Ranks(mesh.get_group(dims[0]), mine.index(dist.get_rank()), len(mine))
    if mine == list(range(dist.get_world_size())):
        return Ranks.of(None)
    group = dist.new_group(mine, use_local_synchronization=True)
    assert isinstance(group, dist.ProcessGroup)
    return Ranks.of(group)


def _held(group: dict[str, Any], name: str, parameter: DTensor, constraint: Constraint) -> Held:
    block = Block.of(parameter)
    slot = _slot(group, name, parameter, constraint, parameter.numel(), 0, block.length)
    return Held(slot, block.first, None if block.contiguous else block.indices)


def of_segments(groups: Groups, segments: Mapping[Tensor, Sequence[Segment]], ranks: Ranks) -> list[Sharded]:
    """What lies in the flat parameters of the groups; collective."""
    held = []
    for group in groups:
        for flat in group["params"]:
            for count, segment in enumerate(segments[flat]):
                offset, n = segment.offset, segment.shape.numel()
                slot = _slot(group, segment.name, flat, segment.constraint, n, offset, offset + segment.length)
                held.append(Held(slot, segment.first, count=count))
    return [Sharded(held, ranks, held[0].slot.parameter.device)] if held else []


def _slot(
    group: dict[str, Any], name: str, parameter: Tensor, constraint: Constraint, n: int, start: int, stop: int
) -> Slot:
    """Raises ``ValueError`` if the set is not bound."""
    constraint.radius(n)
    dtype: torch.dtype = step_dtype(parameter)
    # Its vertices do not travel: no int32 has to index them.
    vertex_format = VertexFormat(min(n, stop - start), min(constraint.support(n), stop - start), dtype)
    return Slot(name, parameter, group, dtype, constraint, start, stop, n, vertex_format)
