"""Checks that all ranks hold the same bits."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from sfw_dist.distributed.rank_group import RankGroup

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
    if found := differences(tensors, RankGroup.of(process_group)):
        raise RuntimeError(
            f"replicas differ: {found}: something changed them outside of the optimizer; "
            "resume from the last checkpoint"
        )


def differences(tensors: Mapping[str, Tensor | None], ranks: RankGroup) -> str:
    """The first tensors that differ between ranks, and where; empty if none does. Collective, the same on every rank.

    Args:
        tensors: by name, in the same order on every rank. ``None``, on any rank, differs from nothing.
        ranks: who compares.
    """
    if not tensors or ranks.size == 1:
        return ""
    device = next((x.device for x in tensors.values() if x is not None), None)
    mine = torch.zeros(len(tensors), 2, dtype=torch.int64, device=device or _device_of(ranks))
    for row, tensor in zip(mine, tensors.values(), strict=True):
        if tensor is not None:
            row[0], row[1] = checksum(tensor), 1
    gathered = mine.new_empty(ranks.size * len(mine), 2)
    dist.all_gather_into_tensor(gathered, mine, group=ranks.group)
    sums, there = gathered.view(ranks.size, len(mine), 2).cpu().unbind(-1)
    first = there.argmax(0)  # the first rank that has each tensor
    differs = sums.ne(sums.gather(0, first[None])) & there.bool()  # (ranks, tensors)
    members = list(range(ranks.size)) if ranks.group is None else dist.get_process_group_ranks(ranks.group)
    found = []
    for name, column, one in zip(tensors, differs.T, first.tolist(), strict=True):
        others = [str(members[i]) for i in column.nonzero().view(-1).tolist()]
        if others:
            found.append(
                f"{name} on rank{'s' * (len(others) > 1)} {', '.join(others)} (compared with rank {members[one]})"
            )
    return "; ".join(found[:3]) + (" …" if len(found) > 3 else "")


def _device_of(ranks: RankGroup) -> torch.device:
    on_gpu = dist.get_backend(ranks.group) == "nccl"
    return torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")


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
