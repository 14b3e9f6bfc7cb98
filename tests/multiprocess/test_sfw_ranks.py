"""The optimizer on 1 to 4 real gloo ranks: bitwise what one process does, and no rank left waiting.

Each world size starts once and does everything; the tests look at what came back.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.nn.parallel import DistributedDataParallel

from sfw_dist import SFW, KSparsePolytope, KSupportBall, LpBall, Unconstrained, constrain
from sfw_dist.constraints import Constraint
from sfw_dist.errors import UserError
from sfw_dist.optim.sharding import state_dict as state
from tests.support.ranks import error_of, run_on_ranks

WORLD_SIZES = (1, 2, 3, 4)
STEPS, HALF = 50, 25
# One tensor of several rows of the blocked sums, one scalar; the third gets no gradient, the fifth its first one late.
SHAPES: list[tuple[int, ...]] = [(8, 3, 3, 3), (200, 201), (30, 20), (1,), (31, 7), (10,)]
WITHOUT_GRADIENT, LATE = 2, 4

K_SPARSE = KSparsePolytope(k_frac=0.05, k_min=10, radius=0.05)  # travels as bitmask and sign bits
SPARSER = KSparsePolytope(k_frac=0.01, radius=0.05)  # travels as indices
K_SUPPORT = KSupportBall(k_frac=0.05, radius=2.0)
L2 = LpBall(2, radius=3.0)
MIX: list[Constraint] = [K_SPARSE, K_SUPPORT, L2, Unconstrained(), LpBall("inf", radius=0.1), Unconstrained()]


def groups(shapes: list[tuple[int, ...]], sets: list[Constraint], dtype: torch.dtype) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    made = [nn.Parameter((0.1 * torch.randn(shape, generator=generator)).to(dtype)) for shape in shapes]
    for p in made:
        p.data.view(-1)[0] = -0.0  # an addition of 0, made on some ranks only, would show in its sign
    return [
        {"params": [(f"t{i}", p)], "constraint": c, "weight_decay": 1e-3}
        for i, (p, c) in enumerate(zip(made, sets, strict=True))
    ]


CASES: dict[str, Callable[[], SFW]] = {
    "k_sparse": lambda: SFW(groups(SHAPES, [K_SPARSE] * 6, torch.float32), lr=0.05),
    "k_sparse_as_indices": lambda: SFW(groups(SHAPES, [SPARSER] * 6, torch.float32), lr=0.05, rescale="fast_gradient"),
    "k_support": lambda: SFW(groups(SHAPES, [K_SUPPORT] * 6, torch.float32), lr=0.05),
    "l2": lambda: SFW(groups(SHAPES, [L2] * 6, torch.float32), lr=0.05, momentum=0.0),
    "mix": lambda: SFW(groups(SHAPES, MIX, torch.float32), lr=0.05),
    "mix_float64": lambda: SFW(groups(SHAPES, MIX, torch.float64), lr=0.05),
    "mix_bfloat16": lambda: SFW(groups(SHAPES, MIX, torch.bfloat16), lr=0.05),
    "two_tensors": lambda: SFW(groups(SHAPES[:2], [K_SPARSE, Unconstrained()], torch.float32), lr=0.05),
}


def parameters(optimizer: SFW) -> list[nn.Parameter]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def set_gradients(optimizer: SFW, step: int) -> None:
    """The same on every rank, as DDP leaves them."""
    generator = torch.Generator().manual_seed(1000 + step)
    for i, p in enumerate(parameters(optimizer)):
        gradient = 0.1 * torch.randn(p.shape, generator=generator) + 0.1 * torch.arange(p.numel()).sin().view(p.shape)
        missing = i == WITHOUT_GRADIENT or (i == LATE and step < 5)
        p.grad = None if missing else gradient.to(p.dtype)


def train(optimizer: SFW, steps: range) -> None:
    for step in steps:
        set_gradients(optimizer, step)
        optimizer.step()


def values(optimizer: SFW) -> list[Tensor]:
    return [p.detach().clone() for p in parameters(optimizer)]


def trajectory(case: str) -> dict[str, Any]:
    """Everything that must not depend on the number of ranks, and the bytes of momentum here."""
    optimizer = CASES[case]()
    train(optimizer, range(HALF))
    halfway = {"parameters": values(optimizer), "state": copy.deepcopy(optimizer.state_dict())}
    train(optimizer, range(HALF, STEPS))
    buffers = [state["momentum_buffer"] for state in optimizer.state.values() if "momentum_buffer" in state]
    return {
        "parameters": values(optimizer),
        "halfway": halfway,
        "statistics": {name: tuple(numbers) for name, numbers in optimizer.statistics().items()},
        "momentum_bytes": sum(buffer.nbytes for buffer in buffers),
    }


one_process = functools.cache(trajectory)


def resume(case: str, halfway: dict[str, Any]) -> list[Tensor]:
    """The parameters at the end of a run that another one began."""
    optimizer = CASES[case]()
    with torch.no_grad():
        for p, value in zip(parameters(optimizer), halfway["parameters"], strict=True):
            p.copy_(value)
    optimizer.load_state_dict(halfway["state"])
    train(optimizer, range(HALF, STEPS))
    return values(optimizer)


# ------------------------------------------------------------------------------------------- run by every rank


def on_every_rank(rank: int, saved: str | None, store: str) -> dict[str, Any]:
    """All that a world size is asked to do; ``saved`` are the halfway points of another one."""
    world_size = dist.get_world_size()
    results: dict[str, Any] = {
        "cases": {case: trajectory(case) for case in CASES},
        "unequal_threads": with_unequal_threads(rank) if world_size == 2 else [],
        "not_finite": not_finite(rank),
        "sparse": sparse_gradient(),
        "differing": differing_models(rank) if world_size > 1 else [],
        "refused_state": refused_state(),
        "shards": trained_on_shards(rank, world_size),
        "checkpointed": through_torch_checkpoint_state(),
        "replicated": replicated(rank),
        "joined_late": joined_late(),
    }
    if saved is not None:
        halfway = torch.load(saved, weights_only=True)
        results["resumed"] = {case: resume(case, halfway[case]) for case in CASES}
    if world_size > 1:
        results["alone"] = state_dict_on_rank_0_alone(rank, world_size, store)  # the last: it breaks the group
    return results


def replicated(rank: int) -> dict[str, Any]:
    """A run of which rank 0 saves the state, alone."""
    optimizer = SFW(groups(SHAPES, MIX, torch.float32), lr=0.05, replicate_momentum=True)
    train(optimizer, range(HALF))
    saved = copy.deepcopy(optimizer.state_dict()) if rank == 0 else None
    train(optimizer, range(HALF, STEPS))
    return {"parameters": values(optimizer), "saved": saved}


def joined_late() -> dict[str, Any]:
    """A run whose optimizer, and first steps, are older than the group of ranks."""
    with mock.patch("sfw_dist.distributed.rank_group.dist.is_initialized", lambda: False):
        optimizer = CASES["mix"]()
        train(optimizer, range(HALF))
    train(optimizer, range(HALF, STEPS))
    buffers = [state["momentum_buffer"] for state in optimizer.state.values() if "momentum_buffer" in state]
    return {"parameters": values(optimizer), "momentum_bytes": sum(buffer.nbytes for buffer in buffers)}


def three_steps() -> list[Tensor]:
    optimizer = CASES["mix"]()
    train(optimizer, range(3))
    return values(optimizer)


def with_unequal_threads(rank: int) -> list[Tensor]:
    """Rank 0, which owns the largest tensor, has the most."""
    torch.set_num_threads(3 if rank == 0 else 1)
    try:
        return three_steps()
    finally:
        torch.set_num_threads(1)


def not_finite(rank: int) -> dict[str, Any]:
    """A NaN that only the owner of a tensor has."""
    optimizer = CASES["mix"]()
    before = values(optimizer)
    set_gradients(optimizer, 0)
    owner = optimizer._distribution.owners()[1]
    if rank == owner:
        parameters(optimizer)[1].grad[5, 5] = torch.nan
    return {"message": error_of(UserError, optimizer.step), "before": before, "after": values(optimizer)}


def sparse_gradient() -> str:
    optimizer = CASES["two_tensors"]()
    set_gradients(optimizer, 0)
    parameters(optimizer)[1].grad = torch.ones(200, 201).to_sparse()
    return error_of(UserError, optimizer.step)


def differing_models(rank: int) -> list[str]:
    """Rank 1 has another name, another shape, another set, one tensor less."""

    def build(change: str) -> SFW:
        mine = groups(SHAPES[:2], [K_SPARSE, K_SPARSE], torch.float32)
        if rank == 1:
            match change:
                case "name":
                    mine[0]["params"] = [("other", mine[0]["params"][0][1])]
                case "shape":
                    mine[0]["params"] = [("t0", nn.Parameter(torch.zeros(3, 8, 3, 3)))]
                case "set":
                    mine[0]["constraint"] = SPARSER
                case "count":
                    del mine[1]
        return SFW(mine)

    return [error_of(ValueError, build, change) for change in ("name", "shape", "set", "count")]


def refused_state() -> str:
    """A state of which one tensor, owned by one rank, has another shape."""
    optimizer = CASES["two_tensors"]()
    state = copy.deepcopy(optimizer.state_dict())
    state["state"][1]["momentum_buffer"] = torch.zeros(7)
    message = error_of(ValueError, optimizer.load_state_dict, state)
    train(optimizer, range(2))  # hangs if one rank alone refused
    return message


def through_torch_checkpoint_state() -> list[str]:
    """What torch's distributed checkpoints ask of an optimizer, of which one rank of three owns nothing."""
    net = nn.Linear(12, 5)
    optimizer = SFW(constrain(net, KSparsePolytope(k=3, radius=1.0)), lr=0.1)
    return sorted(get_optimizer_state_dict(net, optimizer)["state"])  # type: ignore[arg-type]


def small_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 32), nn.Tanh(), nn.Linear(32, 5)).double()


def trained_on_shards(rank: int, world_size: int) -> list[Tensor]:
    """A DDP model, each rank with its part of every batch; in float64, so that no near tie in a selection tips over."""
    net = small_net()
    return train_net(net, DistributedDataParallel(net), slice(rank, None, world_size))


def train_net(net: nn.Module, replica: nn.Module, shard: slice) -> list[Tensor]:
    optimizer = SFW(constrain(net, KSparsePolytope(k_frac=0.1, k_min=3, tau=5.0)), lr=0.3)
    generator = torch.Generator().manual_seed(1)
    for _ in range(10):
        inputs = torch.randn(24, 12, generator=generator, dtype=torch.float64)
        labels = inputs[:, :5].argmax(1)
        optimizer.zero_grad()
        F.cross_entropy(replica(inputs[shard]), labels[shard]).backward()
        optimizer.step()
    return values(optimizer)


def state_dict_on_rank_0_alone(rank: int, world_size: int, store: str) -> str:
    """What rank 0 is told when it saves and the others do not; they stay, outside of any collective, until it is."""
    optimizer = CASES["two_tensors"]()
    told = dist.FileStore(store, world_size)
    if rank > 0:
        told.wait(["told"], timedelta(minutes=2))
        return ""
    state.TIMEOUT = timedelta(seconds=1)
    message = error_of(RuntimeError, optimizer.state_dict)
    told.set("told", "")
    return message


# -------------------------------------------------------------------------------------------------- the tests


World = Callable[[int], list[dict[str, Any]]]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """What :func:`on_every_rank` returned on each rank of a world size. World size 2 resumes what 3 ranks saved."""
    folder: Path = tmp_path_factory.mktemp("ranks")

    @functools.cache  # a failure, too: without it every test would wait for the same one
    def outcome(world_size: int) -> list[dict[str, Any]] | Exception:
        try:
            saved = None
            if world_size == 2:
                saved = str(folder / "saved_by_3.pt")
                torch.save({case: r["halfway"] for case, r in results(3)[0]["cases"].items()}, saved)
            return run_on_ranks(on_every_rank, world_size, saved, str(folder / f"store_{world_size}"))
        except Exception as error:
            return error

    def results(world_size: int) -> list[dict[str, Any]]:
        ended = outcome(world_size)
        if isinstance(ended, Exception):
            raise ended
        return ended

    return results


on_each_world_size = pytest.mark.parametrize("world_size", WORLD_SIZES)
on_several_ranks = pytest.mark.parametrize("world_size", WORLD_SIZES[1:])


def bits(x: Tensor) -> Tensor:
    """The bit patterns, which tell −0 from 0 and one NaN from another."""
    return x.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])


def assert_bitwise(actual: list[Tensor], expected: list[Tensor]) -> None:
    for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
        assert a.dtype == e.dtype
        assert torch.equal(bits(a), bits(e)), f"tensor {i} differs by up to {(a - e).abs().max()}"


@on_each_world_size
@pytest.mark.parametrize("case", CASES)
def test_every_replica_is_bitwise_one_process(world: World, world_size: int, case: str) -> None:
    """Replicas that differ in one bit drift apart, and a run could not be repeated on another number of ranks."""
    expected = one_process(case)
    for rank in world(world_size):
        assert_bitwise(rank["cases"][case]["parameters"], expected["parameters"])


@on_each_world_size
@pytest.mark.parametrize("case", CASES)
def test_statistics_are_the_same_everywhere(world: World, world_size: int, case: str) -> None:
    """They travel with the vertices; a rank that logs zeros for tensors of others misleads."""
    expected = one_process(case)["statistics"]
    assert [rank["cases"][case]["statistics"] for rank in world(world_size)] == [expected] * world_size
    assert {name: gamma > 0 for name, (_, gamma, _) in expected.items()} == {
        name: name != f"t{WITHOUT_GRADIENT}" for name in expected
    }


@pytest.mark.parametrize("case", CASES)
def test_the_trajectories_are_worth_comparing(case: str) -> None:
    """Parameters that never moved, or stand on a vertex, would be equal for no reason."""
    start = values(CASES[case]())
    end = one_process(case)["parameters"]
    moved = [not torch.equal(a, b) for a, b in zip(start, end, strict=True)]
    assert moved == [i != WITHOUT_GRADIENT for i in range(len(start))]


@on_each_world_size
@pytest.mark.parametrize("case", CASES)
def test_momentum_is_kept_once(world: World, world_size: int, case: str) -> None:
    """The memory that sharding saves: all ranks together hold what one process does, and none of several all of it."""
    held = [rank["cases"][case]["momentum_bytes"] for rank in world(world_size)]
    whole = one_process(case)["momentum_bytes"]
    assert sum(held) == whole
    assert world_size == 1 or whole == 0 or max(held) < whole


@on_each_world_size
@pytest.mark.parametrize("case", CASES)
def test_the_state_dict_is_the_whole_state_on_every_rank(world: World, world_size: int, case: str) -> None:
    """A rank's share alone, saved by rank 0, loses the momentum of all the others."""
    expected = one_process(case)["halfway"]["state"]
    for rank in world(world_size):
        state = rank["cases"][case]["halfway"]["state"]
        assert state["param_groups"] == expected["param_groups"]
        assert state["state"].keys() == expected["state"].keys()
        for mine, theirs in zip(state["state"].values(), expected["state"].values(), strict=True):
            assert mine.keys() == theirs.keys()
            assert_bitwise(list(mine.values()), list(theirs.values()))


@on_each_world_size
def test_replicated_momentum_is_saved_by_one_rank_alone(world: World, world_size: int) -> None:
    """Fails when the rank that saves waits for others, or has not followed the momentum of what they own."""
    expected = one_process("mix")
    for rank in world(world_size):
        assert_bitwise(rank["replicated"]["parameters"], expected["parameters"])
    saved, state = world(world_size)[0]["replicated"]["saved"]["state"], expected["halfway"]["state"]["state"]
    for mine, theirs in zip(saved.values(), state.values(), strict=True):
        assert mine.keys() == theirs.keys()
        assert_bitwise(list(mine.values()), list(theirs.values()))


@on_each_world_size
def test_an_optimizer_older_than_the_group_shares_its_work(world: World, world_size: int) -> None:
    """Fails when each rank goes on alone, with all momentum and all LMOs, and nobody is told."""
    found = [rank["joined_late"] for rank in world(world_size)]
    for rank in found:
        assert_bitwise(rank["parameters"], one_process("mix")["parameters"])
    assert sum(rank["momentum_bytes"] for rank in found) == one_process("mix")["momentum_bytes"]


@pytest.mark.parametrize("case", CASES)
def test_what_three_ranks_saved_two_continue(world: World, case: str) -> None:
    """Owners differ between world sizes: momentum must find its new one."""
    for rank in world(2):
        assert_bitwise(rank["resumed"][case], one_process(case)["parameters"])


@pytest.mark.parametrize("case", CASES)
def test_what_three_ranks_saved_one_process_continues(world: World, case: str) -> None:
    """A run on a cluster ends on a laptop."""
    resumed = resume(case, world(3)[2]["cases"][case]["halfway"])
    assert_bitwise(resumed, one_process(case)["parameters"])


def test_ranks_with_unequal_threads_agree(world: World) -> None:
    """A sum split by the number of threads gives each owner its own rounding."""
    for rank in world(2):
        assert_bitwise(rank["unequal_threads"], three_steps())


@on_each_world_size
def test_a_nan_on_the_owner_stops_every_rank_before_anything_moved(world: World, world_size: int) -> None:
    """If only the owner stopped, the others would wait for it in the next step."""
    for rank in world(world_size):
        assert rank["not_finite"]["message"].startswith("the gradient of t1 is not finite: ")
        assert_bitwise(rank["not_finite"]["after"], rank["not_finite"]["before"])


@on_each_world_size
def test_a_sparse_gradient_stops_every_rank(world: World, world_size: int) -> None:
    """If only the owner stopped, the others would wait for it in the exchange."""
    assert all(rank["sparse"].startswith("t1 has a sparse gradient") for rank in world(world_size))


@on_several_ranks
def test_ranks_with_other_models_are_named_on_every_rank(world: World, world_size: int) -> None:
    """Vertices decoded into the wrong tensors would be silent."""
    for rank in world(world_size):
        assert len(rank["differing"]) == 4
        assert all(message.startswith("ranks [1] have other parameters") for message in rank["differing"])


@on_each_world_size
def test_a_state_that_does_not_fit_is_refused_by_every_rank(world: World, world_size: int) -> None:
    """If only the tensor's owner refused it, the others would go on without it."""
    for rank in world(world_size):
        assert rank["refused_state"].startswith("the saved momentum_buffer of t1 has shape (7,)")


@on_each_world_size
def test_torch_checkpoints_find_the_whole_state(world: World, world_size: int) -> None:
    """A rank without state was taken for one that never stepped, and made to step alone: it hung."""
    assert all(rank["checkpointed"] == ["bias", "weight"] for rank in world(world_size))


@on_several_ranks
def test_a_state_dict_that_only_rank_0_asks_for_ends_and_names_the_missing(world: World, world_size: int) -> None:
    """``if rank == 0: torch.save(optimizer.state_dict())`` is what everyone writes first; it must not hang."""
    message = world(world_size)[0]["alone"]
    missing = ", ".join(str(rank) for rank in range(1, world_size))
    assert f"Ranks {missing} failed" in message


@on_each_world_size
def test_ddp_on_shards_follows_one_process_on_the_whole_batch(world: World, world_size: int) -> None:
    """The whole of data-parallel training, with DDP's own reduction of the gradients."""
    net = small_net()
    expected = train_net(net, net, slice(None))
    for rank in world(world_size):
        for a, e in zip(rank["shards"], expected, strict=True):
            torch.testing.assert_close(a, e, rtol=1e-5, atol=1e-8)
        assert_bitwise(rank["shards"], world(world_size)[0]["shards"])
