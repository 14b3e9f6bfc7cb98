"""Sets of filters and of low rank on 1 to 4 ranks: bitwise one process, and the same answer of a DDP training."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from sfw_dist import SFW, GroupKSupportBall, KSparsePolytope, NuclearBall, SpectralKSupportBall, constrain
from sfw_dist.constraints import Constraint
from sfw_dist.errors import UserError
from tests.support.ranks import run_on_ranks

WORLD_SIZES = (1, 2, 3, 4)
SHAPES: list[tuple[int, ...]] = [(16, 8, 3, 3), (40, 50), (12,), (24, 6, 1, 1), (96, 110)]
GROUP = GroupKSupportBall(k_frac=0.2, k_min=2, radius=2.0)
NUCLEAR = NuclearBall(radius=2.0)
SPECTRAL = SpectralKSupportBall(k_frac=0.1, radius=2.0)
SETS: dict[str, list[Constraint]] = {
    "group": [GROUP] * 5,
    "nuclear": [NUCLEAR] * 5,
    "spectral": [SPECTRAL] * 5,
    "powers and others": [
        SpectralKSupportBall(k=2, radius=2.0, svd="power"),
        NuclearBall(radius=2.0, svd="power"),
        KSparsePolytope(k=3, radius=0.1),
        GROUP,
        SPECTRAL,
    ],
}
every_case = pytest.mark.parametrize("case", SETS)
on_each_world_size = pytest.mark.parametrize("world_size", WORLD_SIZES)


def optimizer_of(case: str, dtype: torch.dtype) -> SFW:
    generator = torch.Generator().manual_seed(0)
    made = [nn.Parameter((0.1 * torch.randn(shape, generator=generator)).to(dtype)) for shape in SHAPES]
    groups = [
        {"params": [(f"t{i}", p)], "constraint": s} for i, (p, s) in enumerate(zip(made, SETS[case], strict=True))
    ]
    return SFW(groups, lr=0.05)


def values(optimizer: SFW) -> list[Tensor]:
    return [p.detach().clone() for group in optimizer.param_groups for p in group["params"]]


def set_gradients(optimizer: SFW, step: int) -> None:
    """The same on every rank, as DDP leaves them."""
    generator = torch.Generator().manual_seed(1000 + step)
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = (0.1 * torch.randn(p.shape, generator=generator) + 0.1 * p.detach().cpu()).to(p.dtype)


def trajectory(case: str, dtype: torch.dtype) -> list[Tensor]:
    optimizer = optimizer_of(case, dtype)
    for step in range(20):
        set_gradients(optimizer, step)
        optimizer.step()
    return values(optimizer)


def small_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(216, 5)).double()


def train_net(net: nn.Module, replica: nn.Module, shard: slice, spec: Constraint) -> list[Tensor]:
    optimizer = SFW(constrain(net, spec), lr=0.3)
    generator = torch.Generator().manual_seed(1)
    for _ in range(5):
        images = torch.randn(24, 1, 8, 8, generator=generator, dtype=torch.float64)
        labels = images.flatten(1)[:, :5].argmax(1)
        optimizer.zero_grad()
        F.cross_entropy(replica(images[shard]), labels[shard]).backward()
        optimizer.step()
    return values(optimizer)


SPECS: list[Constraint] = [
    GroupKSupportBall(k_frac=0.4, tau=5.0),
    NuclearBall(tau=5.0),
    SpectralKSupportBall(k_frac=0.4, tau=5.0),
]


def on_every_rank(rank: int, world_size: int) -> dict[str, Any]:
    results: dict[str, Any] = {
        "float32": {case: trajectory(case, torch.float32) for case in SETS},
        "float64": {case: trajectory(case, torch.float64) for case in SETS},
        "ddp": [],
    }
    for spec in SPECS:
        net = small_net()
        shard = slice(rank, None, world_size)
        results["ddp"].append(train_net(net, DistributedDataParallel(net), shard, spec))
    optimizer = optimizer_of("nuclear", torch.float32)
    set_gradients(optimizer, 0)
    if rank == optimizer._distribution.owners()[1]:  # type: ignore[index]
        optimizer.param_groups[1]["params"][0].grad[5, 5] = torch.nan
    before = values(optimizer)
    try:
        optimizer.step()
    except UserError as error:
        results["message"] = str(error)
    results["moved"] = not all(torch.equal(a, b) for a, b in zip(before, values(optimizer), strict=True))
    return results


@functools.cache
def world(world_size: int) -> list[dict[str, Any]]:
    return run_on_ranks(on_every_rank, world_size, world_size)


one_process = functools.cache(trajectory)


@on_each_world_size
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@every_case
def test_every_replica_is_bitwise_one_process(case: str, dtype: str, world_size: int) -> None:
    """A tensor that several ranks divide, or singular vectors from another start, differ within a step."""
    expected = one_process(case, getattr(torch, dtype))
    for rank in world(world_size):
        for mine, theirs in zip(rank[dtype][case], expected, strict=True):
            assert torch.equal(mine, theirs)


@on_each_world_size
def test_ddp_on_shards_follows_one_process_on_the_whole_batch(world_size: int) -> None:
    """The whole of data-parallel training, with ``constrain`` and DDP's own reduction of the gradients."""
    for i, spec in enumerate(SPECS):
        net = small_net()
        expected = train_net(net, net, slice(None), spec)
        for rank in world(world_size):
            for mine, theirs, first in zip(rank["ddp"][i], expected, world(world_size)[0]["ddp"][i], strict=True):
                torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-8)
                assert torch.equal(mine, first)


@on_each_world_size
def test_a_nan_on_the_owner_stops_every_rank_before_anything_moved(world_size: int) -> None:
    """An eigenvalue routine that raises does so on the owner alone, and the others wait for it for ever."""
    for rank in world(world_size):
        assert rank["message"].startswith("the gradient of t1 is not finite: ") and not rank["moved"]
