"""What ranks that are no replicas, a forgotten DDP and frozen layers do to SFW on several ranks."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from sfw_dist import SFW, AdaGradSFW, KSparsePolytope, LpBall, ProjectedSGD, constrain
from tests.support.ranks import run_on_ranks

SET = KSparsePolytope(k_frac=0.1, radius=0.05)


def network(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(12, 20), nn.ReLU(), nn.Linear(20, 3))


def batch(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(16, 12, generator=generator), torch.randint(3, (16,), generator=generator)


def train(net: nn.Module, optimizer: torch.optim.Optimizer, steps: range, seed: int = 0) -> None:
    for step in steps:
        inputs, targets = batch(100 * seed + step)
        optimizer.zero_grad()
        F.cross_entropy(net(inputs), targets).backward()
        optimizer.step()


def parameters(net: nn.Module) -> list[torch.Tensor]:
    return [p.detach().clone() for p in net.parameters()]


def message_of(function: Callable[[], Any]) -> str | None:
    """Of the error that the function raises, if it does."""
    try:
        function()
    except ValueError as error:
        return str(error)
    return None


def programs(rank: int) -> dict[str, Any]:
    said: dict[str, Any] = {}

    # Without DDP, ranks seeded differently hold no replicas.
    net = network(seed=rank)
    optimizer = SFW(constrain(net, SET), lr=0.1)
    before = parameters(net)
    said["no replicas"] = message_of(lambda: train(net, optimizer, range(1)))
    said["stayed"] = all(torch.equal(p, q) for p, q in zip(before, net.parameters(), strict=True))

    # A rate of 0 is how torch's distributed checkpoints create state, before DDP sends rank 0's weights.
    early = network(seed=rank)
    optimizer = SFW(constrain(early, SET), lr=0.0)
    train(early, optimizer, range(1))
    DistributedDataParallel(early)
    for group in optimizer.param_groups:
        group["lr"] = 0.1
    said["rate 0"] = message_of(lambda: train(early, optimizer, range(1)))

    # The same weights and other data: gradients that nothing averages.
    net = network(seed=0)
    optimizer = SFW(constrain(net, SET), lr=0.1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(net, optimizer, range(2), seed=rank)
    said["warned"] = [str(w.message) for w in caught if issubclass(w.category, UserWarning)]

    # A model of its own on each rank.
    groups = [dist.new_group([r]) for r in range(dist.get_world_size())]
    net = network(seed=rank)
    optimizer = SFW(constrain(net, SET), lr=0.1, process_group=groups[rank])
    train(net, optimizer, range(3), seed=rank)
    said["alone"] = parameters(net)
    other = groups[(rank + 1) % dist.get_world_size()]
    said["outside"] = message_of(lambda: SFW(constrain(net, SET), process_group=other))

    # The baselines compare too, sets first: their radii may depend on this rank's weights.
    net = network(seed=rank)
    for kind in (AdaGradSFW, ProjectedSGD):
        said[f"{kind.__name__} replicas"] = message_of(
            lambda kind=kind: train(net, kind(constrain(net, LpBall(2, radius=0.5)), lr=0.1), range(1))
        )
        own = LpBall(2 if rank == 0 else 1, radius=0.5)
        said[f"{kind.__name__} sets"] = message_of(
            lambda kind=kind, own=own: train(net, kind(constrain(net, own), lr=0.1), range(1))
        )
        mine = kind(constrain(net, own), lr=0.1, process_group=groups[rank])
        assert message_of(lambda mine=mine: train(net, mine, range(1))) is None

    said["unfrozen"] = unfrozen(DistributedDataParallel)
    return said


def unfrozen(wrap: Any) -> list[torch.Tensor]:
    """A network whose first layer is frozen for two steps, then trained; frozen again at the end."""
    net = network(seed=0)
    net[0].requires_grad_(False)
    optimizer = SFW(constrain(net, SET), lr=0.1)
    train(wrap(net), optimizer, range(2))
    net[0].requires_grad_(True)
    train(wrap(net), optimizer, range(2, 4))
    net[2].requires_grad_(False)
    train(wrap(net), optimizer, range(4, 6))
    return parameters(net)


def test_ranks_that_are_no_replicas_are_told_so() -> None:
    """Fails when SFW takes each tensor from another model, steps from gradients that nothing averages, or hangs."""
    torch.set_num_threads(1)
    ranks = run_on_ranks(programs, 3)
    wanted_alone = []
    for rank in range(3):
        net = network(seed=rank)
        train(net, SFW(constrain(net, SET), lr=0.1), range(3), seed=rank)
        wanted_alone.append(parameters(net))
    wanted = unfrozen(lambda net: net)
    for rank, said in enumerate(ranks):
        assert said["no replicas"].startswith("at the first step parameters differ between ranks"), said["no replicas"]
        assert "0.weight on ranks 1, 2 (compared with rank 0)" in said["no replicas"]
        assert "process_group=" in said["no replicas"] and "DistributedDataParallel" in said["no replicas"]
        for kind in ("AdaGradSFW", "ProjectedSGD"):
            assert said[f"{kind} replicas"].startswith("at the first step parameters differ between ranks")
            assert said[f"{kind} sets"].startswith("ranks [1, 2] have other parameters or constraints than rank 0")
        assert said["stayed"], "a refused step has moved parameters"
        assert said["rate 0"] is None, said["rate 0"]
        if rank == 0:
            (text,) = said["warned"]
            assert text.startswith("at the first step gradients differ between ranks (0.weight on ranks 1, 2")
        else:
            assert said["warned"] == []
        assert all(torch.equal(p, q) for p, q in zip(said["alone"], wanted_alone[rank], strict=True))
        assert said["outside"].startswith(f"rank {rank} is not in process_group"), said["outside"]
        # DDP's mean of three equal gradients may differ in the last bit from each.
        for p, q in zip(said["unfrozen"], wanted, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)
        assert all(torch.equal(p, q) for p, q in zip(said["unfrozen"], ranks[0]["unfrozen"], strict=True))


def fsdp1(rank: int) -> dict[str, str | None]:
    from torch.distributed.fsdp import FullyShardedDataParallel

    said = {}
    for use_orig_params in (False, True):
        net = network(seed=0)
        early = SFW(constrain(net, SET), lr=0.1)
        wrapped = FullyShardedDataParallel(net, use_orig_params=use_orig_params, device_id=torch.device("cpu"))
        said[f"late {use_orig_params}"] = message_of(
            lambda wrapped=wrapped: SFW([{"params": wrapped.parameters(), "constraint": SET}])
        )
        said[f"constrain {use_orig_params}"] = message_of(lambda wrapped=wrapped: constrain(wrapped, SET))
        said[f"early {use_orig_params}"] = message_of(early.step)
    return said


def test_fsdp1_is_refused_by_name() -> None:
    """Fails when parameters that are slices of a flat one end the process, or train on another rank's gradient."""
    for said in run_on_ranks(fsdp1, 2):
        # Without use_orig_params the parameters of the early one are no longer the model's, as with any optimizer.
        assert said.pop("early False") is None
        for message in said.values():
            assert message is not None and "FullyShardedDataParallel" in message and "fully_shard" in message, said
