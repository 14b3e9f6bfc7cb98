"""How vertices are encoded to travel between ranks.

A slot of the communication buffer holds the step's statistics for one shard, and its vertex:

    stats     3 float64    step size γ, Frank-Wolfe gap, effective learning rate
    support   the smaller of  a bitmask, n/8 bytes, entry i in bit i mod 8 of byte i div 8
                        and   int32 indices, 4·K bytes, unused ones −1
              (nothing when every entry is given)
    nonzeros  the signs as bits, K/8 bytes (1: negative), where all are ±r and r is known;
              with indices the sign is part of them, as −2 − i for a negative entry i
              else the values, K or n numbers in the tensor's step type

At 5 % a K-sparse vertex takes 0.131 bytes a parameter, a float32 parameter 4.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from sfw_dist.constraints import Vertex

STATS = 3
"""Numbers that travel with a vertex: step size, Frank-Wolfe gap, effective learning rate; float64."""
STATS_BYTES = STATS * 8
_LARGEST_INDEX = 2**31 - 3


@dataclass(frozen=True)
class VertexCodec:
    """How the vertices of one shard are written; fixed at construction, the same on every rank."""

    n: int
    """Entries of the shard."""
    support: int
    """The most nonzeros of a vertex, K."""
    dtype: torch.dtype
    """Of the values: the type in which the step is computed."""
    radius: float | None = None
    """The magnitude of every nonzero, where they all have the same."""

    def __post_init__(self) -> None:
        assert 0 <= self.support <= self.n, self
        if self.n > _LARGEST_INDEX:
            raise ValueError(f"a tensor has {self.n} entries, more than int32 can index: split it into several")

    @cached_property
    def _parts(self) -> tuple[str, int, int]:
        """(how the support is written, its bytes, bytes of the nonzeros)."""
        mask = -(-self.n // 8)
        values = self.support * self.dtype.itemsize
        if self.radius is None and self.support == self.n:
            return "all", 0, values
        if self.radius is None:
            return min((("mask", mask, values), ("indices", 4 * self.support, values)), key=lambda part: part[1])
        options = (("mask", mask, -(-self.support // 8)), ("indices", 4 * self.support, 0))
        return min(options, key=lambda part: part[1] + part[2])

    @cached_property
    def nbytes(self) -> int:
        """Bytes of a slot. Its parts fill words of 8 bytes: values are aligned, and bits can be written by words."""
        _, support, nonzeros = self._parts
        return STATS_BYTES + _aligned(support) + _aligned(nonzeros)

    @property
    def layout(self) -> str:
        """``mask``, ``indices`` or, when every entry is given, ``all``."""
        return self._parts[0]

    def _views(self, slot: Tensor) -> tuple[str, Tensor, Tensor]:
        how, support, nonzeros = self._parts
        return how, slot[STATS_BYTES:][:support], slot[STATS_BYTES + _aligned(support) :][:nonzeros]

    def encode(self, stats: Tensor, vertex: Vertex, slot: Tensor) -> None:
        """Write into ``slot``, uint8 ``(nbytes,)``; ``stats`` is float64 ``(3,)``."""
        how, support, nonzeros = self._views(slot)
        slot[:STATS_BYTES].view(torch.float64).copy_(stats)
        if how == "all":
            nonzeros.view(self.dtype).copy_(vertex.values)
            return
        indices, values = self.canonical(vertex)
        assert indices is not None
        if how == "indices":
            stored = indices.to(torch.int32)
            if self.radius is not None:
                stored = torch.where(values < 0, -2 - stored, stored)
            _fill(support.view(torch.int32), stored, -1)
        else:
            mask = torch.zeros(self.n, dtype=torch.bool, device=slot.device)
            mask[indices] = True
            support.copy_(_pack(mask))
        if self.radius is None:
            _fill(nonzeros.view(self.dtype), values, 0)
        elif how == "mask":
            _fill(nonzeros, _pack(values < 0), 0)

    def decode(self, slot: Tensor) -> tuple[Tensor, Vertex]:
        """The inverse of :meth:`encode`: statistics and vertex, bit for bit, the vertex in its canonical form."""
        how, support, nonzeros = self._views(slot)
        stats = slot[:STATS_BYTES].view(torch.float64)
        if how == "all":
            return stats, Vertex(None, nonzeros.view(self.dtype))
        if how == "mask":
            indices = _unpack(support, self.n).nonzero().view(-1)
            negative = _unpack(nonzeros, indices.numel()) if self.radius is not None else None
        else:
            stored = support.view(torch.int32)
            stored = stored[stored != -1].long()
            negative = stored < 0
            indices = torch.where(negative, -2 - stored, stored)
        if self.radius is None:
            return stats, Vertex(indices, nonzeros.view(self.dtype)[: indices.numel()])
        assert negative is not None
        radius = torch.full((), self.radius, dtype=self.dtype, device=slot.device)
        return stats, Vertex(indices, torch.where(negative, -radius, radius))

    def canonical(self, vertex: Vertex) -> Vertex:
        """The vertex as :meth:`decode` returns it: without zeros, which a support of signs or values cannot show."""
        if self._parts[0] == "all":
            return Vertex(None, vertex.values)
        kept = vertex.values.nonzero().view(-1)
        return Vertex(kept if vertex.indices is None else vertex.indices[kept], vertex.values[kept])


def _aligned(nbytes: int) -> int:
    return -(-nbytes // 8) * 8


def _fill(target: Tensor, values: Tensor, rest: int) -> None:
    target[: values.numel()] = values
    target[values.numel() :] = rest


def _bits(device: torch.device) -> Tensor:
    return torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=device)


def _pack(flags: Tensor) -> Tensor:
    """bool ``(n,)`` → uint8 ``(⌈n/8⌉,)``, little-endian bits."""
    padded = torch.nn.functional.pad(flags.to(torch.uint8), (0, -flags.numel() % 8))
    return (padded.view(-1, 8) * _bits(flags.device)).sum(1, dtype=torch.uint8)


def _unpack(packed: Tensor, n: int) -> Tensor:
    """The inverse of :func:`_pack`."""
    return (packed.view(-1, 1) & _bits(packed.device)).ne(0).view(-1)[:n]
