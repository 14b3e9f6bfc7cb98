"""A set written outside of the package: on one rank, divided under DDP, and on DTensors."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from sfw_dist import SFW, Constraint, LpBall, constrain
from sfw_dist.constraints import Vertex, constraint_from_spec
from sfw_dist.constraints.base import ShardedDirection, SizedConstraint
from sfw_dist.distributed.coalesced import AsyncTask, as_numbers, as_words
from sfw_dist.distributed.dtensor import Block, full_tensor
from tests.support.ranks import run_on_ranks

RANKS = 2


class OwnBall(SizedConstraint):
    """The L2 ball, as a user would write it who does not know the package's own."""

    kind = "test_own_ball"
    divisible: ClassVar[bool] = True

    def lmo_vertex(self, x: Tensor) -> Vertex:
        norm = x.double().square().sum().sqrt()
        return Vertex(None, (-self.radius(x.numel()) * x.double() / norm).to(x.dtype).view(-1))

    def sharded_lmo(self, direction: ShardedDirection) -> AsyncTask:
        x, partition = direction.entries, direction.partition
        share = torch.zeros(len(partition.parts), dtype=torch.float64)
        if x is not None and partition.is_primary:
            share[partition.own] = x.double().square().sum()
        norm = as_numbers((yield as_words(share))).sum().sqrt()
        return None if x is None else Vertex(None, (-self.radius(partition.numel) * x.double() / norm).to(x.dtype))

    def gauge(self, x: Tensor) -> Tensor:
        return x.double().square().sum().sqrt() / self.radius(x.numel())

    def radius_for(self, diameter: float, n: int) -> float:
        return diameter / 2


def stepped(constraint: Constraint, how: str) -> dict[str, Any]:
    """The parameters after some steps from equal gradients."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 300), nn.Linear(300, 2))
    if how == "dtensors":
        fully_shard(net, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    optimizer = SFW(constrain(net, constraint), lr=0.05, split=8192 if how == "divided" else None)
    for step in range(5):
        generator = torch.Generator().manual_seed(step)
        for p in net.parameters():
            gradient = torch.randn(p.shape, generator=generator)
            p.grad = gradient
            if how == "dtensors":
                local = Block.of(p).of_whole(gradient).contiguous()  # type: ignore[arg-type]
                p.grad = type(p.data).from_local(local, p.device_mesh, p.placements, shape=p.shape, stride=p.stride())  # type: ignore[attr-defined]
        optimizer.step()
    divided = sum(not shard.is_whole for shard in optimizer._distribution.replicated_shards)
    return {"parameters": [full_tensor(p).detach().clone() for p in net.parameters()], "divided": divided}


def on_every_rank(rank: int) -> dict[str, Any]:
    return {how: stepped(OwnBall(tau=3.0), how) for how in ("whole", "divided", "dtensors")}


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, Any]]:
    return run_on_ranks(on_every_rank, RANKS)


@pytest.mark.parametrize("how", ["whole", "divided", "dtensors"])
def test_an_own_set_steps_as_the_packages_own_does(ranks: list[dict[str, Any]], how: str) -> None:
    """Fails when the code asks a set for its class instead of what it can do."""
    expected = stepped(LpBall(2, tau=3.0), "whole")["parameters"]
    for rank in ranks:
        assert (rank[how]["divided"] > 0) == (how == "divided")
        for found, wanted in zip(rank[how]["parameters"], expected, strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


def test_an_own_set_is_in_state_dicts() -> None:
    """Fails when only the package's sets can be saved and loaded."""
    net = nn.Linear(3, 2)
    optimizer = SFW(constrain(net, OwnBall(radius=1.0)))
    state = optimizer.state_dict()
    assert constraint_from_spec(state["param_groups"][0]["constraint"]) == OwnBall(radius=1.0)
    optimizer.load_state_dict(state)


def test_a_set_that_is_not_divisible_says_so_on_dtensors() -> None:
    """Fails when a shard takes the vertex of its own entries for that of the tensor."""
    (message,) = run_on_ranks(_refused, 1)
    assert "needs the whole tensor" in message


class WholeBall(OwnBall):
    kind = "test_whole_ball"
    divisible: ClassVar[bool] = False


def _refused(rank: int) -> str:
    net = nn.Linear(3, 2)
    fully_shard(net, mesh=init_device_mesh("cpu", (1,)))
    try:
        SFW(constrain(net, WholeBall(radius=1.0)))
    except ValueError as error:
        return str(error)
    return "nothing was raised"
