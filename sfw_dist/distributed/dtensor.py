"""DTensors: which meshes they lie on, and which entries of the whole tensor this rank has."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor


@dataclass(frozen=True)
class Block:
    """This rank's entries of a tensor: a box in its index space."""

    shape: torch.Size
    """Of the whole tensor."""
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    @classmethod
    def of(cls, tensor: DTensor) -> Block:
        """Raises ``ValueError`` for a tensor that still has to be added up over ranks."""
        if any(placement.is_partial() for placement in tensor.placements):
            raise ValueError(f"a parameter is {tensor.placements}: SFW takes sharded and replicated tensors")
        # What torch's own distributed checkpoints ask a DTensor.
        (chunk,) = tensor.__create_chunk_list__()
        return cls(tensor.shape, tuple(chunk.offsets), tuple(chunk.sizes))

    @property
    def length(self) -> int:
        return torch.Size(self.sizes).numel()

    @property
    def first(self) -> int:
        """The lowest index, row-major, of its entries in the whole tensor."""
        return sum(offset * stride for offset, stride in zip(self.offsets, self._strides(), strict=True))

    @property
    def contiguous(self) -> bool:
        """Whether the entries follow each other in the whole tensor, row-major."""
        extent = sum((size - 1) * stride for size, stride in zip(self.sizes, self._strides(), strict=True)) + 1
        return self.length == 0 or extent == self.length

    def indices(self) -> Tensor:
        """Where in the whole tensor each entry lies, int64 ``(length,)``."""
        index = torch.zeros((), dtype=torch.int64)
        for offset, size, stride in zip(self.offsets, self.sizes, self._strides(), strict=True):
            index = index[..., None] + torch.arange(offset, offset + size) * stride
        return index.reshape(-1)

    def of_whole(self, x: Tensor) -> Tensor:
        """These entries of a whole tensor, as a view."""
        for dim, (offset, size) in enumerate(zip(self.offsets, self.sizes, strict=True)):
            x = x.narrow(dim, offset, size)
        return x

    def _strides(self) -> list[int]:
        strides = [1]
        for size in reversed(self.shape[1:]):
            strides.insert(0, strides[0] * size)
        return strides[: len(self.shape)]


@dataclass(frozen=True)
class MeshRanks:
    """The ranks that differ from this one in some dimensions of a mesh alone.

    They add along one dimension after the other, in the groups that the mesh has: none is made for them.
    """

    mesh: DeviceMesh
    dims: Sequence[int]

    @property
    def size(self) -> int:
        return math.prod(self.mesh.size(dim) for dim in self.dims)

    @property
    def rank(self) -> int:
        """This rank's place among them, the last of the dimensions running fastest."""
        place = 0
        for dim in self.dims:
            place = place * self.mesh.size(dim) + self.mesh.get_local_rank(dim)
        return place

    def all_reduce(self, x: Tensor, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> None:
        """Add tensors over the ranks, or take their maximum, in place; collective.

        ``x`` may lie elsewhere than the mesh's devices, as parameters that FSDP2 offloads to the CPU do.
        """
        message = x.to(self.mesh.device_type)
        for dim in self.dims:
            dist.all_reduce(message, op, group=self.mesh.get_group(dim))
        if message is not x:
            x.copy_(message)


def sharing(tensors: Iterable[DTensor]) -> list[tuple[DeviceMesh, list[int]]]:
    """The meshes on which the tensors lie, in their order, and on each the dimensions that any of them is cut along."""
    found: dict[DeviceMesh, set[int]] = {}
    for tensor in tensors:
        cut = {dim for dim, placement in enumerate(tensor.placements) if not placement.is_replicate()}
        found.setdefault(tensor.device_mesh, set()).update(cut)
    return [(mesh, sorted(dims)) for mesh, dims in found.items()]


def to_local(x: Tensor) -> Tensor:
    """What this rank holds of a tensor: of a DTensor its local one, else all of it."""
    return x.to_local() if isinstance(x, DTensor) else x


def full_tensor(x: Tensor) -> Tensor:
    """All entries of a tensor; of a DTensor gathered, which is collective."""
    return x.full_tensor().detach() if isinstance(x, DTensor) else x


def copy_entries(target: Tensor, source: Tensor) -> None:
    """Copy a tensor into one of the same shape; either may be a DTensor."""
    if isinstance(target, DTensor) and not isinstance(source, DTensor):
        source = Block.of(target).of_whole(source)
    to_local(target).copy_(to_local(source))


def entries_as(source: Tensor, target: Tensor) -> Tensor:
    """What this rank would hold of ``source`` if it lay as ``target`` does; both have the same shape.

    Collective where ``source`` is a DTensor that lies in another way.
    """
    if not isinstance(target, DTensor):
        return full_tensor(source)
    if not isinstance(source, DTensor):
        return Block.of(target).of_whole(source)
    if source.device_mesh != target.device_mesh:
        return Block.of(target).of_whole(full_tensor(source))
    return source.redistribute(placements=target.placements).to_local()


def wrapped_as(local: Tensor, target: Tensor) -> Tensor:
    """This rank's entries as a tensor that lies as ``target`` does: a DTensor if that is one."""
    if not isinstance(target, DTensor):
        return local
    place = target.device_mesh, target.placements
    return DTensor.from_local(local, *place, run_check=False, shape=target.shape, stride=target.stride())


def has_whole_rows(tensor: DTensor) -> bool:
    """Whether no rank's entries are cut along another dimension than the first; the same answer on every rank."""
    return all(placement.is_replicate() or getattr(placement, "dim", None) == 0 for placement in tensor.placements)


def reshard(model: nn.Module) -> None:
    """Let the parameters of FSDP2's modules be DTensors again.

    After a forward pass without a backward pass the root's are whole copies, and what is written to them is lost.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
