"""The entries of several tensors that this rank holds, and sums over the ranks that hold the others."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from sfw_dist.distributed.dtensor import Block, MeshRanks, sharing, to_local
from sfw_dist.ops.partition import Partition


class Shards:
    """What this rank holds of each tensor: all of it, or a DTensor's shard.

    A tensor that is no DTensor is taken to be the same on every rank. The DTensors of each mesh travel together, and
    every rank must be in all of their meshes. Collective, as is all that adds.

    Args:
        tensors: by name, in the same order on every rank.

    Attributes:
        tensors: those.
        local: this rank's entries of each, ``(n,)``, row-major.

    Raises:
        ValueError: shards that are no boxes of the tensor (torch's strided ones, unevenly divided).

    Example:
        >>> shards = Shards({"a": torch.ones(2, 3), "b": torch.ones(4)})
        >>> {name: int(total) for name, total in shards.each(lambda name: shards.local[name].sum()[None]).items()}
        {'a': 6, 'b': 4}
        >>> shards.joint(lambda names: torch.tensor([len(names)]), torch.device("cpu"))
        tensor([2])
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors = tensors
        self.local = {name: to_local(tensor.detach()).reshape(-1) for name, tensor in tensors.items()}
        divided = {name: tensor for name, tensor in tensors.items() if isinstance(tensor, DTensor)}
        self._whole = [name for name in tensors if name not in divided]
        self._meshes = [
            (MeshRanks(mesh, dims), [name for name, tensor in divided.items() if tensor.device_mesh == mesh])
            for mesh, dims in sharing(divided.values())
        ]
        self._partitions: dict[str, Partition] = {}
        for ranks, names in self._meshes:
            self._partitions |= _partitions({name: divided[name] for name in names}, ranks)

    def by_mesh(self, names: Collection[str]) -> list[tuple[MeshRanks, dict[str, Partition]]]:
        """Those of the tensors that are divided, mesh by mesh, with the ranks that share them."""
        found = []
        for ranks, of_mesh in self._meshes:
            divided = [name for name in of_mesh if name in names and len(self._partitions[name].parts) > 1]
            if divided:
                found.append((ranks, {name: self._partitions[name] for name in divided}))
        return found

    def is_divided(self, name: str) -> bool:
        """Whether no rank has all entries of a tensor."""
        return name in self._partitions and len(self._partitions[name].parts) > 1

    def joint(self, part: Callable[[Sequence[str]], Tensor], device: torch.device) -> Tensor:
        """The sum over all tensors and ranks of ``part``, which sums over this rank's entries of the tensors named.

        Args:
            part: a tensor of the same shape whatever the names.
            device: of the answer.
        """
        total = part(self._whole).to(device)
        for ranks, names in self._meshes:
            share = part([name for name in names if self._partitions[name].is_primary])
            ranks.all_reduce(share)
            total = total + share.to(device)
        return total

    def each(self, part: Callable[[str], Tensor], op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> dict[str, Tensor]:
        """For each tensor the sum, or maximum, over the ranks of ``part``, ``(m,)``, of this rank's entries.

        Args:
            part: a tensor whose type and shape depend on the name alone; also where this rank has no entries.
            op: sum or maximum.
        """
        found = {name: part(name) for name in self._whole}
        for ranks, names in self._meshes:
            shares = [part(name) for name in names]
            if op == dist.ReduceOp.SUM:
                pairs = zip(names, shares, strict=True)
                shares = [x if self._partitions[name].is_primary else torch.zeros_like(x) for name, x in pairs]
            message = torch.cat([share.to(shares[0].device) for share in shares])
            ranks.all_reduce(message, op)
            found |= zip(names, message.split([len(share) for share in shares]), strict=True)
        return {name: found[name] for name in self.tensors}

    def first_with(self, holds: Callable[[Tensor], Tensor]) -> str | None:
        """The first tensor of which ``holds`` is true for any entry, the same on every rank; ``None``: there is none.

        Args:
            holds: from entries ``(n,)`` to bools of that shape.
        """
        found = self.each(lambda name: holds(self.local[name]).any().long()[None])
        return next((name for name, count in found.items() if count), None)


def _partitions(tensors: Mapping[str, DTensor], ranks: MeshRanks) -> dict[str, Partition]:
    """How tensors of one mesh are divided, after the ranks have told each other what they hold."""
    blocks = {name: Block.of(tensor) for name, tensor in tensors.items()}
    held = {name: to_local(tensor).numel() for name, tensor in tensors.items()}
    places = [[block.first, held[name], not block.contiguous] for name, block in blocks.items()]
    everyone = torch.zeros(ranks.size, len(blocks), 3, dtype=torch.int64)
    everyone[ranks.rank] = torch.tensor(places)
    ranks.all_reduce(everyone)
    rows = everyone.transpose(0, 1).tolist()
    return {
        name: Partition.of_places(name, tensors[name].numel(), row, ranks.rank, block.indices)
        for (name, block), row in zip(blocks.items(), rows, strict=True)
    }
