"""The optimizer on DTensors that 2 to 4 real gloo ranks share: what one process does, and in how many messages.

Each world size starts once and does everything; the tests look at what came back. ``gradient`` makes the same gradients
everywhere, and each rank takes its part, so that every difference comes from the step. Selection is exact. Where all
parts begin at a row of the pairwise sum (``aligned``) parameters and statistics are those of one process to the bit;
elsewhere a step size may differ in its last bits, and a float32 parameter then in its last.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from sfw_dist import SFW, KSparsePolytope, KSupportBall, LpBall, Unconstrained, constrain
from sfw_dist.constraints import Constraint
from sfw_dist.distributed.dtensor import Block, full_tensor
from sfw_dist.errors import UserError
from tests.support.ranks import run_on_ranks

WORLD_SIZES = (2, 3, 4)
STEPS, HALF = 50, 25
SETS: dict[str, Constraint] = {
    "k_sparse": KSparsePolytope(k_frac=0.05, k_min=10, tau=15.0),
    "k_support": KSupportBall(k_frac=0.05, tau=15.0),
    "l2": LpBall(2, tau=15.0),
    "l3": LpBall(3, tau=15.0),
    "l1": LpBall(1, tau=15.0),
    "linf": LpBall("inf", tau=15.0),
}
MESSAGES = {"k_sparse": 4, "k_support": 5, "l2": 2, "l3": 3, "l1": 4, "linf": 1}
"""Of a step, for all tensors together."""
WITHOUT_GRADIENT, LATE = "3.weight", "0.bias"


def network(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """Tensors of several rows of the sums, of a row cut several times, of one entry, and fewer rows than ranks."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 40, 3), nn.BatchNorm2d(40), nn.Conv2d(40, 33, 3, bias=False), nn.Linear(67, 301), nn.Linear(301, 1)
    ).to(dtype)


def aligned() -> nn.Sequential:
    """On 2 and on 4 ranks every part begins at a row of the sums."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 1024, bias=False))


def gradient(step: int, name: str, shape: torch.Size, *, coarse: bool) -> Tensor | None:
    """The same wherever it is called; ``coarse`` ones have many equal magnitudes."""
    if name == WITHOUT_GRADIENT or (name == LATE and step < 5):
        return None
    generator = torch.Generator().manual_seed(1000 * step + sum(map(ord, name)))
    x = 0.1 * torch.randn(shape, generator=generator)
    return (x * 20).round() / 20 if coarse else x


def train(model: nn.Module, optimizer: SFW, steps: range, *, coarse: bool = False) -> None:
    for step in steps:
        for name, p in model.named_parameters():
            g = gradient(step, name, p.shape, coarse=coarse)
            p.grad = None if g is None else part_of(g.to(p.dtype), p)
        optimizer.step()


def part_of(x: Tensor, p: Tensor) -> Tensor:
    """``x`` laid out as the parameter."""
    if not isinstance(p, DTensor):
        return x
    here = Block.of(p).of_whole(x).contiguous()
    layout: dict[str, Any] = {"shape": p.shape, "stride": p.stride(), "run_check": False}
    return DTensor.from_local(here, p.device_mesh, p.placements, **layout)


def values(model: nn.Module) -> dict[str, Tensor]:
    return {name: full_tensor(p).detach().clone() for name, p in model.named_parameters()}


def build(model: nn.Module, key: str, **options: Any) -> SFW:
    groups = constrain(model, SETS[key], unconstrained="norm_and_bias")
    if isinstance(groups[-1]["constraint"], Unconstrained):
        groups[-1] |= {"weight_decay": 1e-3, "lr": 0.02}
    return SFW(groups, **{"lr": 0.05, **options})


@functools.cache
def one_process(key: str, coarse: bool = False, dtype: torch.dtype = torch.float32, rows: bool = False) -> Any:
    model = aligned() if rows else network(dtype)
    optimizer = build(model, key)
    train(model, optimizer, range(HALF), coarse=coarse)
    halfway = {"parameters": values(model), "state": optimizer.state_dict()}
    train(model, optimizer, range(HALF, STEPS), coarse=coarse)
    return {"parameters": values(model), "statistics": statistics(optimizer), "halfway": halfway}


def statistics(optimizer: SFW) -> dict[str, list[float]]:
    return {name: list(numbers) for name, numbers in optimizer.statistics().items()}


# ------------------------------------------------------------------------------------------- run by every rank


def sharded(model: nn.Sequential, mesh: DeviceMesh, **options: Any) -> nn.Sequential:
    for child in model:
        if list(child.parameters()):
            fully_shard(child, mesh=mesh, **options)
    fully_shard(model, mesh=mesh, **options)
    return model


@contextmanager
def counted() -> Iterator[list[int]]:
    """How many all-reduces are made meanwhile, and that nothing else is sent."""
    made, original = [0], dist.all_reduce

    def all_reduce(*arguments: Any, **options: Any) -> Any:
        made[0] += 1
        return original(*arguments, **options)

    nothing = mock.Mock(side_effect=AssertionError("a message that is no all-reduce"))
    others = {name: nothing for name in ("all_gather_into_tensor", "all_gather", "broadcast", "reduce", "all_to_all")}
    with mock.patch.multiple(dist, all_reduce=all_reduce, **others):
        yield made


def trajectory(
    key: str, mesh: DeviceMesh, coarse: bool = False, dtype: torch.dtype = torch.float32, rows: bool = False
) -> dict[str, Any]:
    model = sharded(aligned() if rows else network(dtype), mesh)
    optimizer = build(model, key)
    train(model, optimizer, range(1), coarse=coarse)  # batches are laid out in it
    with counted() as made:
        train(model, optimizer, range(1, STEPS), coarse=coarse)
    found: dict[str, Any] = {"parameters": values(model), "statistics": statistics(optimizer)}
    found["messages"] = made[0] / (STEPS - 1)
    shares = [s["momentum_buffer"].to_local().numel() for s in optimizer.state.values()]
    return found | {"momentum": sum(shares)}


def on_every_rank(rank: int, folder: str) -> dict[str, Any]:
    world_size = dist.get_world_size()
    flat = init_device_mesh("cpu", (world_size,))
    found: dict[str, Any] = {key: trajectory(key, flat) for key in SETS}
    found["ties"] = trajectory("k_sparse", flat, coarse=True)
    found["ties_k_support"] = trajectory("k_support", flat, coarse=True)
    found["float64"] = trajectory("k_sparse", flat, dtype=torch.float64)
    found["bfloat16"] = trajectory("k_sparse", flat, dtype=torch.bfloat16)
    found["resumed"] = resumed_from_one_process(flat)
    found["not_finite"] = not_finite(rank, flat)
    found["momentum_comes_and_goes"] = momentum_comes_and_goes(flat)
    found["clipped"] = clipped(flat)
    found["mixed_precision"] = mixed_precision(flat)
    found["disagreement"] = disagreement(rank, flat)
    if world_size != 3:
        found["aligned"] = {key: trajectory(key, flat, rows=True) for key in SETS}
    if world_size == 3:
        save(flat, folder)
    if world_size != 3:
        found["loaded"] = load(flat, folder)
    if world_size == 4:
        two = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
        found["hybrid"] = trajectory("k_sparse", two)
        found["hybrid_k_support"] = trajectory("k_support", two)
        found["hybrid_loaded"] = load(two, folder)
        found["tensor_parallel"] = {key: tensor_parallel(key) for key in ("k_sparse", "k_support", "l2")}
    return found


def resumed_from_one_process(mesh: DeviceMesh) -> dict[str, Tensor]:
    halfway = one_process("k_sparse")["halfway"]
    model = network()
    model.load_state_dict(halfway["parameters"], strict=False)
    optimizer = build(sharded(model, mesh), "k_sparse")
    optimizer.load_state_dict(halfway["state"])
    train(model, optimizer, range(HALF, STEPS))
    return values(model)


def save(mesh: DeviceMesh, folder: str) -> None:
    """As a user of torch's distributed checkpoints does."""
    model = sharded(network(), mesh)
    optimizer = build(model, "k_sparse")
    train(model, optimizer, range(HALF))
    state = {"model": model.state_dict(), "optimizer": get_optimizer_state_dict(model, optimizer)}
    dcp.save(state, checkpoint_id=folder)


def load(mesh: DeviceMesh, folder: str) -> dict[str, Tensor]:
    model = sharded(network(), mesh)
    optimizer = build(model, "k_sparse")
    state = {"model": model.state_dict(), "optimizer": get_optimizer_state_dict(model, optimizer)}
    dcp.load(state, checkpoint_id=folder)
    model.load_state_dict(state["model"])
    set_optimizer_state_dict(model, optimizer, state["optimizer"])
    train(model, optimizer, range(HALF, STEPS))
    return values(model)


def not_finite(rank: int, mesh: DeviceMesh) -> dict[str, Any]:
    """One entry, on the last rank that has any; then the run goes on."""
    model = sharded(network(), mesh)
    optimizer = build(model, "k_sparse")
    train(model, optimizer, range(6))
    before = values(model)
    for name, p in model.named_parameters():
        g = gradient(6, name, p.shape, coarse=False)
        if g is not None and name in ("2.weight", "1.bias"):
            g.view(-1)[-1] = torch.nan
        p.grad = None if g is None else part_of(g, p)
    try:
        optimizer.step()
        message = "nothing was raised"
    except UserError as error:
        message = str(error)
    unchanged = all(torch.equal(p, before[name]) for name, p in values(model).items())
    counts = {name: float(optimizer.state[p]["step"]) for name, p in model.named_parameters()}
    train(model, optimizer, range(7, 8))
    return {"message": message, "unchanged": unchanged, "counts": counts, "after": values(model)}


def momentum_comes_and_goes(mesh: DeviceMesh | None) -> dict[str, Tensor]:
    model = network()
    optimizer = build(model if mesh is None else sharded(model, mesh), "k_sparse", momentum=0.0)
    for step, momentum in enumerate((0.0, 0.9, 0.9, 0.0, 0.5)):
        for group in optimizer.param_groups:
            group["momentum"] = momentum
        train(model, optimizer, range(step, step + 1))
    return values(model)


def clipped(mesh: DeviceMesh | None) -> dict[str, Tensor]:
    model = network()
    optimizer = build(model if mesh is None else sharded(model, mesh), "k_sparse", rescale="diameter")
    for step in range(5):
        for name, p in model.named_parameters():
            g = gradient(step, name, p.shape, coarse=False)
            p.grad = None if g is None else part_of(g, p)
        norm = nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        assert full_tensor(norm) > 1  # or nothing would be clipped
        optimizer.step()
    return values(model)


def mixed_precision(mesh: DeviceMesh) -> dict[str, Any]:
    """Real gradients under a policy: the shards stay float32 and feasible."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(30, 47), nn.ReLU(), nn.Linear(47, 5))
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    optimizer = SFW(constrain(sharded(model, mesh, mp_policy=policy), SETS["k_sparse"]), lr=1.0)
    x, y = torch.randn(64, 30), torch.arange(64) % 5
    losses = []
    for _ in range(30):
        loss = F.cross_entropy(model(x).float(), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    gauges = [float(g["constraint"].gauge(full_tensor(g["params"][0]))) for g in optimizer.param_groups]
    dtypes = {str(t.dtype) for s in optimizer.state.values() for t in s.values()}
    return {"losses": losses, "gauge": max(gauges), "dtypes": sorted(dtypes)}


def disagreement(rank: int, mesh: DeviceMesh) -> str:
    model = sharded(network(), mesh)
    groups = constrain(model, KSparsePolytope(k_frac=0.05, radius=0.5))
    if rank == 1:
        groups[0]["constraint"] = KSparsePolytope(k=3, radius=0.5)
    try:
        SFW(groups)
    except ValueError as error:
        return str(error)
    return "nothing was raised"


def tensor_parallel(key: str) -> dict[str, Any]:
    """FSDP over one dimension of a mesh, tensor parallelism over the other: consecutive parts, and blocks."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    model = two_layers()
    parallelize_module(model, mesh["tensor"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
    fully_shard(model, mesh=mesh["data"])
    optimizer = SFW(constrain(model, SETS[key]), lr=0.05)
    placements = {name: str(p.placements) for name, p in model.named_parameters() if isinstance(p, DTensor)}
    train(model, optimizer, range(STEPS), coarse=True)
    return {"parameters": values(model), "placements": placements}


def two_layers() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(130, 200), nn.ReLU(), nn.Linear(200, 66))


# ------------------------------------------------------------------------------------------------------- tests


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict[str, Any]]]:
    """By world size, what every rank found; three ranks first, whose checkpoint the others load."""
    folder = str(tmp_path_factory.mktemp("checkpoint"))
    return {size: run_on_ranks(on_every_rank, size, folder) for size in (3, 2, 4)}


every_size = pytest.mark.parametrize("size", WORLD_SIZES)


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, value in expected.items():
        differing = int((found[name] != value).sum())
        assert differing == 0, f"{name} differs in {differing} of {value.numel()} entries"


def close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Up to the last bits of step sizes."""
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-6, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")


@every_size
@pytest.mark.parametrize("key", SETS)
def test_fully_sharded_parameters_are_those_of_one_process(runs: Any, size: int, key: str) -> None:
    """Fails when a shard selects its own top-K, a part of a sum is left out, or replicas of a norm differ."""
    expected = one_process(key)
    for rank in runs[size]:
        close(rank[key]["parameters"], expected["parameters"])
        same(rank[key]["parameters"], runs[size][0][key]["parameters"])
        assert rank[key]["statistics"] == runs[size][0][key]["statistics"]
        for name, numbers in expected["statistics"].items():
            assert rank[key]["statistics"][name] == pytest.approx(numbers, rel=1e-6)


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("key", SETS)
def test_parts_that_begin_at_rows_give_the_bits_of_one_process(runs: Any, size: int, key: str) -> None:
    """Fails when the sums over aligned parts are added in another order than over a whole tensor."""
    for rank in runs[size]:
        found, expected = rank["aligned"][key], one_process(key, rows=True)
        same(found["parameters"], expected["parameters"])
        assert found["statistics"] == expected["statistics"]


@every_size
@pytest.mark.parametrize(("case", "key"), [("ties", "k_sparse"), ("ties_k_support", "k_support")])
def test_ties_go_to_the_lowest_index_of_the_whole_tensor(runs: Any, size: int, case: str, key: str) -> None:
    """Fails when each shard takes ties of its own, so that more than K are chosen, or others than in one process."""
    for rank in runs[size]:
        close(rank[case]["parameters"], one_process(key, coarse=True)["parameters"])


@every_size
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_other_types_are_those_of_one_process(runs: Any, size: int, dtype: torch.dtype) -> None:
    """Fails when the bits of float64 magnitudes are cut off, or bfloat16 shards step in bfloat16."""
    for rank in runs[size]:
        close(rank[str(dtype).removeprefix("torch.")]["parameters"], one_process("k_sparse", dtype=dtype)["parameters"])


@every_size
@pytest.mark.parametrize("key", SETS)
def test_a_step_takes_few_messages(runs: Any, size: int, key: str) -> None:
    """Fails when tensors send messages of their own, or ties take one more."""
    for case in (key, *(["ties"] if key == "k_sparse" else [])):
        assert {rank[case]["messages"] for rank in runs[size]} == {MESSAGES[key]}


@every_size
def test_momentum_lies_in_the_shards(runs: Any, size: int) -> None:
    """Fails when a rank keeps momentum of entries that others have."""
    entries = sum(p.numel() for p in network().parameters())
    assert sum(rank["k_sparse"]["momentum"] for rank in runs[size]) == entries


@every_size
def test_a_run_of_one_process_goes_on_in_shards(runs: Any, size: int) -> None:
    """Fails when whole momentum is not cut as its parameter is."""
    for rank in runs[size]:
        close(rank["resumed"], one_process("k_sparse")["parameters"])


@pytest.mark.parametrize(("size", "case"), [(2, "loaded"), (4, "loaded"), (4, "hybrid_loaded")])
def test_a_distributed_checkpoint_goes_on_at_another_world_size(runs: Any, size: int, case: str) -> None:
    """Fails when the state of shards is not stored whole, or asking for it counts as a tensor's first step."""
    for rank in runs[size]:
        close(rank[case], one_process("k_sparse")["parameters"])


@pytest.mark.parametrize(("case", "key"), [("hybrid", "k_sparse"), ("hybrid_k_support", "k_support")])
def test_hybrid_shards_are_those_of_one_process(runs: Any, case: str, key: str) -> None:
    """Fails when replicas are added to each other, or drift apart."""
    for rank in runs[4]:
        close(rank[case]["parameters"], one_process(key)["parameters"])
        assert rank[case]["messages"] == MESSAGES[key]


@pytest.mark.parametrize("key", ["k_sparse", "k_support", "l2"])
def test_tensor_parallel_parameters_are_those_of_one_process(runs: Any, key: str) -> None:
    """Fails when parts that interleave in the whole tensor are taken for consecutive ones."""
    model = two_layers()
    optimizer = SFW(constrain(model, SETS[key]), lr=0.05)
    train(model, optimizer, range(STEPS), coarse=True)
    for rank in runs[4]:
        found = rank["tensor_parallel"][key]
        assert "Shard(dim=1)" in found["placements"]["2.weight"], found["placements"]
        close(found["parameters"], values(model))


@every_size
def test_a_gradient_that_is_not_finite_stops_all_ranks(runs: Any, size: int) -> None:
    """Fails when only the rank that has the entry raises, and the others wait for it, or a parameter has moved."""
    for rank in runs[size]:
        found = rank["not_finite"]
        assert found["message"].startswith("the gradient of 2.weight, 1.bias is not finite"), found["message"]
        assert found["unchanged"]
        assert found["counts"]["2.weight"] == found["counts"]["1.bias"] == 0 and found["counts"]["4.weight"] == 7
        assert all(p.isfinite().all() for p in found["after"].values())


@every_size
def test_momentum_that_a_scheduler_raises_starts_afresh(runs: Any, size: int) -> None:
    """Fails when shards go on with the momentum of before, or have no room for one."""
    for rank in runs[size]:
        close(rank["momentum_comes_and_goes"], momentum_comes_and_goes(None))


@every_size
def test_gradients_are_clipped_by_their_global_norm(runs: Any, size: int) -> None:
    """Fails when a shard's gradients are clipped by the shard's norm. Norms are torch's: they differ in last bits."""
    expected = clipped(None)
    for rank in runs[size]:
        for name, value in expected.items():
            torch.testing.assert_close(rank["clipped"][name], value, rtol=1e-6, atol=1e-7)


@every_size
def test_mixed_precision_keeps_shards_and_momentum_in_float32(runs: Any, size: int) -> None:
    """Fails when the policy's bfloat16 reaches the optimizer, or a step leaves the set."""
    for rank in runs[size]:
        found = rank["mixed_precision"]
        assert found["dtypes"] == ["torch.float32"]
        assert found["gauge"] <= 1 + 1e-6
        assert found["losses"][-1] < 0.8 * found["losses"][0]


@every_size
def test_ranks_with_other_sets_hear_of_it(runs: Any, size: int) -> None:
    """Fails when ranks that disagree wait for each other, or step apart."""
    for rank in runs[size]:
        assert rank["disagreement"].startswith("ranks [1] have other parameters or constraints"), rank["disagreement"]


def test_one_process_takes_dtensors(tmp_path: Path) -> None:
    """Fails when a mesh of one rank is not taken for what it is."""
    (alone,) = run_on_ranks(alone_on_a_mesh, 1)
    same(alone, one_process("k_sparse")["parameters"])


def alone_on_a_mesh(rank: int) -> dict[str, Tensor]:
    found: dict[str, Tensor] = trajectory("k_sparse", init_device_mesh("cpu", (1,)))["parameters"]
    return found


def test_unbound_and_missing_sets_are_refused() -> None:
    """Fails when a specification that nobody has bound reaches the shards."""
    with pytest.raises(ValueError, match="bind it with constrain"):
        SFW([{"params": [nn.Parameter(torch.zeros(3))], "constraint": KSparsePolytope(k=1, tau=1.0)}])
    assert Unconstrained().radius(3) == float("inf")
