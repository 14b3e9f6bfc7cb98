"""One process without torchrun: it is rank 0 of 1, and no collective needs a process group."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn

from sfw_dist.distributed.world import (
    World,
    any_rank,
    barrier,
    broadcast_buffers,
    gather_floats,
    joined_world,
    sum_over_ranks,
)

LONE = World(rank=0, size=1, local_rank=0, device=torch.device("cpu"))


@pytest.mark.parametrize("flag", [False, True])
def test_any_rank_of_one_is_itself(flag: bool) -> None:
    """Fails when one process asks a group that does not exist, or an answer is fixed."""
    assert any_rank(flag, LONE) is flag


def test_sum_over_one_rank_keeps_the_values_in_place() -> None:
    """Fails when one process needs a group, or the sum is not the caller's tensor."""
    values = torch.tensor([1.5, -2.0], dtype=torch.float64)
    assert sum_over_ranks(values, LONE) is values
    assert values.tolist() == [1.5, -2.0]


def test_gather_from_one_rank_keeps_all_bits() -> None:
    """Fails when a float passes through float32 on its way."""
    assert gather_floats(1 / 3, LONE) == [1 / 3]


def test_one_rank_waits_for_nobody_and_keeps_its_buffers() -> None:
    """Fails when a barrier or a broadcast of one process needs a group."""
    layer = nn.BatchNorm1d(3)
    layer.running_mean.fill_(2.0)
    barrier(LONE)
    broadcast_buffers(layer, LONE)
    assert layer.running_mean.tolist() == [2.0] * 3


def test_without_torchrun_a_process_is_a_world_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails when ``python -m sfw_dist.train`` waits for ranks that never come."""
    for variable in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(variable, raising=False)
    with joined_world() as world:
        assert (world.rank, world.size, world.local_rank, world.main) == (0, 1, 0, True)
        assert world.device.type == ("cuda" if torch.cuda.is_available() else "cpu")
        assert not dist.is_initialized()


def test_only_rank_0_speaks() -> None:
    """Fails when every rank writes the files, or none does."""
    mains = [World(rank, 4, rank % 2, torch.device("cpu")).main for rank in range(4)]
    assert mains == [True, False, False, False]
