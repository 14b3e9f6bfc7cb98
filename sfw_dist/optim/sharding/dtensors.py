"""From param groups to the shards this rank holds: of DTensors, or of a framework's flat buffers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from sfw_dist.constraints import Constraint
from sfw_dist.distributed.dtensor import Block, sharing, to_local
from sfw_dist.distributed.rank_group import RankGroup, verify_agreement
from sfw_dist.ops.partition import Partition
from sfw_dist.optim.param_groups import Entry
from sfw_dist.optim.shard import Shard, step_dtype
from sfw_dist.optim.sharding.sharded import ShardedDistributor
from sfw_dist.optim.vertex_codec import VertexCodec

Groups = Sequence[dict[str, Any]]


@dataclass(frozen=True)
class FlatSegment:
    """Consecutive entries of one tensor in the flat buffer that a framework gives to the optimizer."""

    name: str
    shape: torch.Size
    """Of the whole tensor."""
    constraint: Constraint
    """Of the whole tensor, bound."""
    global_offset: int
    """Which entry of the whole tensor these begin with."""
    numel: int
    """How many they are; 0 where this rank has none."""
    offset: int
    """Where they begin in the flat buffer."""


def distributors_of_dtensors(entries: Iterable[Entry]) -> list[ShardedDistributor]:
    """A distributor for each mesh on which DTensors among these tensors lie; collective.

    Raises:
        ValueError: as :func:`sharded_distributor`.
    """
    found = [(entry, entry.parameter) for entry in entries if isinstance(entry.parameter, DTensor)]
    distributors = []
    for mesh, dims in sharing(parameter for _, parameter in found):
        shards = [_of_dtensor(entry, parameter) for entry, parameter in found if parameter.device_mesh == mesh]
        distributors.append(sharded_distributor(shards, ranks_along(mesh, dims)))
    return distributors


def distributors_of_flat_buffers(
    groups: Groups, segments: Mapping[Tensor, Sequence[FlatSegment]], ranks: RankGroup
) -> list[ShardedDistributor]:
    """One distributor for all that lies in the flat parameters of the groups, or none; collective.

    Raises:
        ValueError: as :func:`sharded_distributor`.
    """
    shards = []
    for group in groups:
        for flat in group["params"]:
            for row, segment in enumerate(segments[flat]):
                place = segment.global_offset, segment.offset, segment.offset + segment.numel
                n = segment.shape.numel()
                shards.append(_shard(segment.name, flat, group, segment.constraint, n, *place, state_row=row))
    return [sharded_distributor(shards, ranks)] if shards else []


def sharded_distributor(shards: Sequence[Shard], ranks: RankGroup) -> ShardedDistributor:
    """A distributor of these shards, after the ranks have told each other what they hold; collective.

    Raises:
        ValueError: ranks with other tensors, shards that leave entries out or overlap, a set that needs whole tensors.
    """
    device = to_local(shards[0].parameter).device
    described = [f"{s.name} of {s.global_numel} entries, {s.dtype}, {s.constraint!r}" for s in shards]
    verify_agreement(described, ranks, {device})
    places = [[s.global_offset, s.numel, s.global_indices is not None] for s in shards]
    mine = torch.tensor(places, dtype=torch.int64, device=device)
    everyone = mine.clone()
    if ranks.size > 1:
        everyone = mine.new_empty(ranks.size * len(mine), 3)
        dist.all_gather_into_tensor(everyone, mine, group=ranks.group)
    table = everyone.view(ranks.size, -1, 3).transpose(0, 1).tolist()
    partitions = [
        Partition.of_places(shard.name, shard.global_numel, rows, ranks.rank, shard.global_indices)
        for shard, rows in zip(shards, table, strict=True)
    ]
    return ShardedDistributor(shards, partitions, ranks, device)


def ranks_along(mesh: DeviceMesh, dims: list[int]) -> RankGroup:
    """The ranks that differ from this one in these dimensions of the mesh alone; collective among them."""
    if not dims:
        return RankGroup.alone()
    others = [dim for dim in range(mesh.ndim) if dim not in dims]
    lines = mesh.mesh.permute(*others, *dims).reshape(-1, *(mesh.mesh.shape[dim] for dim in dims))
    mine = next(line.flatten().tolist() for line in lines if (line == dist.get_rank()).any())
    if len(dims) == 1:
        return RankGroup(mesh.get_group(dims[0]), mine.index(dist.get_rank()), len(mine))
    if mine == list(range(dist.get_world_size())):
        return RankGroup.of(None)
    group = dist.new_group(mine, use_local_synchronization=True)
    assert isinstance(group, dist.ProcessGroup)
    return RankGroup.of(group)


def _of_dtensor(entry: Entry, parameter: DTensor) -> Shard:
    block = Block.of(parameter)
    indices = None if block.contiguous else block.indices
    n, place = parameter.numel(), (block.first, 0, block.length)
    return _shard(entry.name, parameter, entry.group, entry.constraint, n, *place, global_indices=indices)


def _shard(
    name: str,
    parameter: Tensor,
    group: dict[str, Any],
    constraint: Constraint,
    global_numel: int,
    global_offset: int,
    start: int,
    stop: int,
    **options: Any,
) -> Shard:
    """A shard whose vertex does not travel. Raises ``ValueError`` if the set is not bound."""
    constraint.radius(global_numel)
    dtype, numel = step_dtype(parameter), stop - start
    codec = VertexCodec(min(numel, 1), min(numel, 1), dtype)  # unused
    place = global_numel, global_offset, start, stop
    return Shard(name, parameter, group, constraint, dtype, *place, codec, **options)
