"""Groups, parameters and state that change on several ranks alike: owners change, momentum stays with its tensor."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from sfw_dist import SFW, KSparsePolytope, constrain, reduce_to_owner, verify_replicas
from sfw_dist.distributed.dtensor import full_tensor
from tests.support.changing_groups import KEEPS_MOMENTUM, LOSES_ALL, LOSES_B, Run, expected
from tests.support.ranks import run_on_ranks

CHANGES = {change.__name__: change for change in (*KEEPS_MOMENTUM, *LOSES_ALL, *LOSES_B)}


def on_every_rank(rank: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, change in CHANGES.items():
        run = Run("abc", split=8192)
        found[name] = run.train(change)
        verify_replicas(dict(run.tensors))
        found[f"{name} state"] = len(run.optimizer.state_dict()["state"])
    return found


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, Any]]:
    return run_on_ranks(on_every_rank, 3)


@pytest.mark.parametrize("name", CHANGES)
def test_ranks_follow_as_one_process_does(ranks: list[dict[str, Any]], name: str) -> None:
    """Fails when a new owner starts without the momentum that another rank had."""
    wanted = expected(CHANGES[name])
    for rank in ranks:
        for tensor, value in rank[name].items():
            assert torch.equal(value, wanted[tensor]), tensor
        assert rank[f"{name} state"] == len(rank[name])


def reordered(rank: int) -> dict[str, torch.Tensor]:
    """Groups change their order between the backward pass and the step; gradients have gone to their owners alone."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(40, 50), nn.Linear(50, 30))
    optimizer = SFW(constrain(net, KSparsePolytope(k_frac=0.1, tau=5.0)), lr=0.1)
    replica: nn.Module = net
    if dist.is_initialized():
        replica = DistributedDataParallel(net)
        replica.register_comm_hook(optimizer, reduce_to_owner)
    for _ in range(4):
        optimizer.zero_grad()
        replica(torch.ones(4, 40)).square().mean().backward()
        optimizer.param_groups.reverse()
        optimizer.step()
    return {name: p.detach().clone() for name, p in net.named_parameters()}


def test_owners_stay_when_groups_are_reordered() -> None:
    """Fails when a new owner steps on the gradient that went to the old one: replicas agree, and all are wrong."""
    wanted = reordered(0)
    for rank in run_on_ranks(reordered, 2):
        for name, value in rank.items():
            torch.testing.assert_close(value, wanted[name], rtol=1e-5, atol=1e-6)


def saved_alone(rank: int) -> int:
    """Rank 0 alone saves, as most scripts do, after all ranks have given a tensor another set."""
    run = Run("ab", replicate_momentum=True)
    run.step(0)
    run.optimizer.param_groups[0]["constraint"] = KSparsePolytope(k_frac=0.2, radius=0.5)
    saved = len(run.optimizer.state_dict()["state"]) if rank == 0 else 2
    run.step(1)
    verify_replicas(dict(run.tensors))
    return saved


def test_rank_0_may_save_alone_after_a_set_has_changed() -> None:
    """Fails when a state dict that waits for nobody begins to plan, and the others take a step meanwhile."""
    assert run_on_ranks(saved_alone, 2, timeout=60.0) == [2, 2]


def prepared(rank: int) -> dict[str, Any]:
    """As Accelerate prepares FSDP2: the module's parameters become DTensors, and take the place of those in groups."""
    torch.manual_seed(0)
    net = nn.Linear(20, 30)
    optimizer = SFW(constrain(net, KSparsePolytope(k_frac=0.2, tau=5.0)), lr=0.1)
    names = {p: name for name, p in net.named_parameters()}
    fully_shard(net, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    new = dict(net.named_parameters())
    for group in optimizer.param_groups:
        group["params"] = [new[names[p]] for p in group["params"]]
    before = [full_tensor(p).clone() for p in net.parameters()]
    saved = len(optimizer.state_dict()["state"])  # before a step has taken in what changed, as a resume does
    for _ in range(3):
        net(torch.ones(4, 20)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    moved = [not torch.equal(full_tensor(p), old) for p, old in zip(net.parameters(), before, strict=True)]
    state = optimizer.state_dict()["state"]
    return {
        "saved": saved,
        "moved": moved,
        "sharded": all(isinstance(s["momentum_buffer"], DTensor) for s in state.values()),
    }


def test_parameters_that_became_dtensors_are_trained() -> None:
    """Fails when nothing is trained, without a word, after a framework has replaced the parameters."""
    for rank in run_on_ranks(prepared, 2):
        assert rank == {"saved": 2, "moved": [True, True], "sharded": True}
