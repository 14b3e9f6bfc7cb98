"""DTensors: which meshes they lie on, and which entries of the whole tensor this rank has."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
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
