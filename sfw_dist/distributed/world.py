"""The ranks of this run, and the few things they agree on outside the optimizer."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from sfw_dist.distributed.rank_group import RankGroup


@dataclass(frozen=True)
class World:
    """This process among the ranks. One process without torchrun is rank 0 of 1."""

    rank: int
    size: int
    local_rank: int
    device: torch.device

    @property
    def main(self) -> bool:
        """Whether this rank writes the files and prints to the user."""
        return self.rank == 0

    @property
    def ranks(self) -> RankGroup:
        """The same for the library."""
        return RankGroup(None, self.rank, self.size)


@contextmanager
def joined_world() -> Iterator[World]:
    """Join the process group of torchrun's environment (NCCL on GPUs, else gloo), and leave it at the end."""
    rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if size > 1:
        if os.environ.get("LOCAL_WORLD_SIZE") == str(size):
            # On one machine gloo need not resolve the host's name, which laptops and containers often cannot.
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        dist.init_process_group("nccl" if cuda else "gloo", device_id=device if cuda else None)
    try:
        yield World(rank, size, local_rank, device)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
            # Frees the groups. Gloo's threads, which may still let go of tensors, then end here, and not while the
            # interpreter does: it would end a thread that asks for its lock, and abort.
            gc.collect()


def any_rank(flag: bool, world: World) -> bool:
    """Whether ``flag`` is set on any rank; the same result on every rank."""
    if world.size == 1:
        return flag
    votes = torch.tensor([flag], dtype=torch.int32, device=world.device)
    dist.all_reduce(votes, op=dist.ReduceOp.MAX)
    return bool(votes.item())


def sum_over_ranks(values: Tensor, world: World) -> Tensor:
    """The elementwise sum over the ranks, in place."""
    if world.size > 1:
        dist.all_reduce(values)
    return values


def max_over_ranks(value: int, world: World) -> int:
    """The greatest of all ranks' ``value``."""
    return int(max(gather_floats(value, world)))


def gather_floats(value: float, world: World) -> list[float]:
    """Every rank's ``value``, by rank."""
    everyone = torch.zeros(world.size, dtype=torch.float64, device=world.device)
    everyone[world.rank] = value
    return sum_over_ranks(everyone, world).tolist()


def barrier(world: World) -> None:
    """Wait for all ranks."""
    if world.size > 1:
        dist.barrier()


def broadcast_buffers(module: torch.nn.Module, world: World) -> None:
    """Give every rank rank 0's buffers (BatchNorm's running statistics), as DDP does before each forward pass."""
    if world.size > 1:
        for buffer in module.buffers():
            dist.broadcast(buffer, src=0)
