"""Checks that all ranks hold the same bits."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor

_CHUNK = 1 << 20


def verify_replicas(tensors: Mapping[str, Tensor], process_group: dist.ProcessGroup | None = None) -> None:
    """Compare 64-bit checksums of the tensors with the first rank's; collective.

    A few passes over memory and 8 bytes a tensor: cheap enough for every few hundred steps.

    Args:
        tensors: by name, in the same order on every rank: ``dict(model.named_parameters())``.
        process_group: whose ranks hold replicas; ``None``: the default group.

    Raises:
        RuntimeError: on every rank of the group, with the first tensors that differ and the ranks on which they do.

    Example:
        >>> verify_replicas(dict(torch.nn.Linear(2, 2).named_parameters()))  # one process has nothing to compare
    """
    if not (dist.is_available() and dist.is_initialized()) or not tensors:
        return
    mine = torch.stack([checksum(tensor) for tensor in tensors.values()])
    gathered = mine.new_empty(dist.get_world_size(process_group) * len(mine))
    dist.all_gather_into_tensor(gathered, mine, group=process_group)
    differs = gathered.view(-1, len(mine)).ne(gathered[: len(mine)])  # (ranks, tensors)
    if not differs.any():
        return
    members = dist.get_process_group_ranks(process_group)
    found = [
        f"{name} on rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"
        for name, column in zip(tensors, differs.T, strict=True)
        if (ranks := [members[i] for i in column.nonzero().view(-1).tolist()])
    ]
    names = "; ".join(found[:3]) + (" …" if len(found) > 3 else "")
    raise RuntimeError(
        f"replicas differ from rank {members[0]}'s: {names}: something changed them outside of the optimizer; "
        "resume from the last checkpoint"
    )


def checksum(x: Tensor) -> Tensor:
    """An int64 scalar; any change of a single word of memory changes it, and of several nearly every one."""
    flat = x.detach().contiguous().view(-1).view(torch.uint8)
    words = torch.nn.functional.pad(flat, (0, -flat.numel() % 4)).view(torch.int32)
    total = torch.zeros((), dtype=torch.int64, device=x.device)
    for start in range(0, len(words), _CHUNK):
        chunk = words[start : start + _CHUNK].long()
        odd = 2 * torch.arange(start, start + len(chunk), device=x.device) + 1  # weights that have an inverse mod 2^64
        total += (chunk * odd).sum()
    return total
