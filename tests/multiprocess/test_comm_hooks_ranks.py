"""Every way in which gradients and vertices travel, on real gloo ranks: bitwise what one process does.

{all-reduced, reduce_to_owner} × {tensors divided, whole}, on 1, 2, 4 and 8 ranks.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from sfw_dist import (
    SFW,
    KSparsePolytope,
    KSupportBall,
    LpBall,
    Unconstrained,
    constrain,
    reduce_to_owner,
    verify_replicas,
)
from sfw_dist.constraints import Constraint
from sfw_dist.optim.comm_hooks import reduce_to_owner_bf16
from tests.support.ranks import run_on_ranks

WORLD_SIZES = (1, 2, 4, 8)
HOOKS: dict[str, Any] = {"plain": None, "reduce_to_owner": reduce_to_owner}
COMBINATIONS = list(itertools.product(HOOKS, (None, 8192)))
DIVISIBLE: dict[str, Constraint] = {
    "k_support": KSupportBall(k_frac=0.05, k_min=3, radius=2.0),
    "l1": LpBall(1, radius=2.0),
    "l2": LpBall(2, radius=3.0),
    "l3": LpBall(3, radius=3.0),
    "linf": LpBall("inf", radius=0.2),
}
# Of real training; the shorter ones are there for the first steps, in which DDP lays out its buckets anew.
STEPS = {c: 200 if c == ("reduce_to_owner", 8192) else 20 for c in COMBINATIONS}
ids = pytest.mark.parametrize("combination", COMBINATIONS, ids=lambda c: f"{c[0]}-split={c[1]}")


class Given(nn.Module):
    """A network whose gradients are those it is given: of ``Σ ⟨p, g_p⟩``."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        shapes = {"embedding": (3000, 33), "conv": (300, 10, 3, 3), "bias": (17,), "head": (64, 31), "scale": ()}
        for name, shape in shapes.items():
            setattr(self, name, nn.Parameter((0.1 * torch.randn(shape, generator=generator)).to(dtype)))

    def forward(self, gradients: dict[str, Tensor]) -> Tensor:
        return torch.stack([(p * gradients[name]).sum() for name, p in self.named_parameters()]).sum()


def gradients_of(net: Given, step: int) -> dict[str, Tensor]:
    """The same on every rank; a few magnitudes, so that ties cross the borders of the parts."""
    generator = torch.Generator().manual_seed(step)
    found = {}
    for name, p in net.named_parameters():
        noise = torch.randint(-40, 41, p.shape, generator=generator) / 64.0
        found[name] = (noise + (step % 3)).to(p.dtype)
    return found


def build(
    dtype: torch.dtype,
    hook: Any,
    split: int | None,
    memory_format: torch.memory_format,
    large: Constraint | None = None,
) -> tuple[Given, nn.Module, SFW]:
    """``large`` is the set of the two tensors that may be divided."""
    net = Given(dtype)
    net.conv.data = net.conv.data.contiguous(memory_format=memory_format)
    groups = constrain(net, KSparsePolytope(k_frac=0.05, k_min=3, radius=0.2))
    if large is not None:
        groups[0]["constraint"] = groups[1]["constraint"] = large
    groups[3]["constraint"] = LpBall(2, radius=3.0)
    groups[2]["constraint"] = Unconstrained()
    replica: nn.Module = net
    optimizer = SFW(groups, lr=2e-3, split=split)
    if dist.is_initialized():
        replica = DistributedDataParallel(net, bucket_cap_mb=0.05)  # several buckets
        if hook is not None:
            replica.register_comm_hook(optimizer, hook)
    return net, replica, optimizer


def trajectory(
    dtype: torch.dtype,
    hook: str = "plain",
    split: int | None = None,
    steps: int = 6,
    memory_format: torch.memory_format = torch.contiguous_format,
    large: Constraint | None = None,
) -> dict[str, Any]:
    """Parameters, whole state and statistics after some steps."""
    net, replica, optimizer = build(dtype, HOOKS[hook], split, memory_format, large)
    for step in range(steps):
        optimizer.zero_grad()
        replica(gradients_of(net, step)).backward()
        optimizer.step()
    verify_replicas(dict(net.named_parameters()))
    assert all(0 < s.gamma < 1 for s in optimizer.statistics().values()), "a step of length 1 hides where it began"
    return {
        "parameters": [p.detach().clone() for p in net.parameters()],
        "state": optimizer.state_dict()["state"],
        "statistics": {name: tuple(values) for name, values in optimizer.statistics().items()},
        "divided": [slot.name for slot in optimizer._distribution.replicated_shards if not slot.is_whole],
    }


# ----------------------------------------------------------------------------------------------- real training


def small_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 130), nn.Tanh(), nn.Linear(130, 130), nn.Tanh(), nn.Linear(130, 5)).double()


def train(
    rank: int,
    size: int,
    hook: Any = None,
    split: int | None = None,
    steps: int = 30,
    change: Callable[[SFW, nn.Module, int], None] = lambda optimizer, net, step: None,
    accumulate: int = 1,
) -> list[Tensor]:
    """Each rank with its part of every batch, in float64, so that no near tie in a selection tips over."""
    net = small_net()
    groups = constrain(net, KSparsePolytope(k_frac=0.1, k_min=3, tau=5.0))
    optimizer = SFW(groups, lr=0.3, split=split)
    replica: nn.Module = net
    if dist.is_initialized():
        replica = DistributedDataParallel(net, bucket_cap_mb=0.02)
        if hook is not None:
            replica.register_comm_hook(optimizer, hook)
    generator = torch.Generator().manual_seed(1)
    for step in range(steps):
        optimizer.zero_grad()
        for part in range(accumulate):
            inputs = torch.randn(24, 12, generator=generator, dtype=torch.float64)
            labels = inputs[:, :5].argmax(1)
            local = part + 1 < accumulate and isinstance(replica, DistributedDataParallel)
            with replica.no_sync() if local else contextlib.nullcontext():  # type: ignore[operator]
                F.cross_entropy(replica(inputs[rank::size]), labels[rank::size]).backward()
        change(optimizer, net, step)
        optimizer.step()
    verify_replicas(dict(net.named_parameters()))
    return [p.detach().clone() for p in net.parameters()]


def clip(optimizer: SFW, net: nn.Module, step: int) -> None:
    """As everyone does; the rescale rule makes the length matter (γ = lr·‖m‖/‖θ − v‖)."""
    norm = nn.utils.clip_grad_norm_(net.parameters(), 0.05)
    assert norm > 0.05


def scaled(rank: int) -> dict[str, Any]:
    """GradScaler: a step with an overflow on one rank only, and one without."""
    net = Given(torch.float32)
    optimizer = SFW(constrain(net, KSparsePolytope(k_frac=0.05, k_min=3, radius=0.2)), lr=0.05)
    replica = DistributedDataParallel(net, bucket_cap_mb=0.05)
    replica.register_comm_hook(optimizer, reduce_to_owner)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scales = []
    for step in range(3):
        optimizer.zero_grad()
        gradients = gradients_of(net, step)
        if step == 1 and rank == dist.get_world_size() - 1:
            gradients["head"][0, 0] = torch.inf
        scaler.scale(replica(gradients)).backward()
        scaler.step(optimizer)
        scaler.update()
        scales.append(scaler.get_scale())
    return {"scales": scales, "parameters": [p.detach().clone() for p in net.parameters()]}


def errors(rank: int) -> dict[str, str]:
    """What is refused, on every rank."""
    found = {}
    strangers = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    partial = SFW(constrain(strangers[0], KSparsePolytope(k=2, radius=1.0)))
    other = DistributedDataParallel(strangers)
    other.register_comm_hook(partial, reduce_to_owner)
    try:
        other(torch.ones(2, 3)).sum().backward()
    except Exception as error:
        found["strangers"] = str(error)

    torch.manual_seed(0)
    unfrozen = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    unfrozen[0].requires_grad_(False)
    optimizer = SFW(constrain(unfrozen, KSparsePolytope(k=2, radius=1.0)))
    optimizer.step()
    unfrozen[0].requires_grad_(True)
    again = DistributedDataParallel(unfrozen)
    again.register_comm_hook(optimizer, reduce_to_owner)
    try:
        again(torch.ones(2, 3)).sum().backward()
    except Exception as error:
        found["unfrozen"] = str(error)
    optimizer.zero_grad()
    optimizer.step()
    again = DistributedDataParallel(unfrozen)
    again.register_comm_hook(optimizer, reduce_to_owner)
    again(torch.ones(2, 3)).sum().backward()
    before = unfrozen[0].weight.detach().clone()
    optimizer.step()
    assert not torch.equal(unfrozen[0].weight, before)

    layer = nn.Linear(3, 3)
    everywhere = SFW(constrain(layer, KSparsePolytope(k=2, radius=1.0)), replicate_momentum=True)
    owners_alone = DistributedDataParallel(layer)
    owners_alone.register_comm_hook(everywhere, reduce_to_owner)
    try:
        owners_alone(torch.ones(2, 3)).sum().backward()
    except Exception as error:
        found["replicated"] = str(error)
    return found


class TwoHeads(nn.Module):
    """Every second rank uses the other head; a third one is for nobody."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Linear(12, 130)
        self.heads = nn.ModuleList(nn.Linear(130, 5) for _ in range(3))

    def forward(self, x: Tensor, head: int) -> Tensor:
        return self.heads[head](self.body(x).tanh())


def unused(rank: int, hook: Any) -> list[Tensor]:
    net = TwoHeads().double()
    optimizer = SFW(constrain(net, KSparsePolytope(k_frac=0.1, k_min=3, tau=5.0)), lr=0.1)
    replica = DistributedDataParallel(net, find_unused_parameters=True)
    if hook is not None:
        replica.register_comm_hook(optimizer, hook)
    generator = torch.Generator().manual_seed(rank)
    for _ in range(5):
        optimizer.zero_grad()
        inputs = torch.randn(24, 12, generator=generator, dtype=torch.float64)
        F.cross_entropy(replica(inputs, rank % 2), inputs[:, :5].argmax(1)).backward()
        optimizer.step()
    verify_replicas(dict(net.named_parameters()))
    return [p.detach().clone() for p in net.parameters()]


def differing(rank: int) -> str:
    """One entry of one tensor differs on the last rank, by its sign bit."""
    tensors = {"a": torch.zeros(7), "b": torch.zeros(3_000_000), "c": torch.zeros(3, dtype=torch.bfloat16)}
    if rank == dist.get_world_size() - 1:
        tensors["b"][2_999_999] = -0.0
    try:
        verify_replicas(tensors)
    except RuntimeError as error:
        return str(error)
    return ""


def one_gradient_missing(rank: int) -> dict[str, Any]:
    """Every rank but the last has all gradients of a divided tensor."""
    net = Given(torch.float32)
    optimizer = SFW(constrain(net, KSparsePolytope(k_frac=0.05, k_min=3, radius=0.2)), lr=2e-3, split=8192)
    before = net.embedding.detach().clone()
    for name, gradient in gradients_of(net, 0).items():
        getattr(net, name).grad = gradient
    if rank == dist.get_world_size() - 1:
        net.embedding.grad = None
    optimizer.step()
    return {"kept": torch.equal(net.embedding, before), "gamma": optimizer.statistics()["embedding"].gamma}


# ------------------------------------------------------------------------------------------- run by every rank


def on_every_rank(rank: int) -> dict[str, Any]:
    size = dist.get_world_size()
    results: dict[str, Any] = {
        "given": {str(c): trajectory(torch.float32, *c) for c in COMBINATIONS},
        "bf16": {str(c): trajectory(torch.bfloat16, *c) for c in COMBINATIONS[-2:]},
        "strided": trajectory(torch.float32, "reduce_to_owner", 8192, memory_format=torch.channels_last),
        "sets": {name: trajectory(torch.float32, split=8192, large=s) for name, s in DIVISIBLE.items()},
        "one_gradient_missing": one_gradient_missing(rank),
        "trained": {str(c): train(rank, size, HOOKS[c[0]], *c[1:], steps=STEPS[c]) for c in COMBINATIONS},
        "accumulated": train(rank, size, reduce_to_owner, accumulate=3),
        "clipped": train(rank, size, reduce_to_owner, change=clip),
        "rounded": train(rank, size, reduce_to_owner_bf16, steps=3),
        "scaled": scaled(rank),
        "unused": {name: unused(rank, hook) for name, hook in HOOKS.items()},
    }
    if size > 1:
        results["errors"] = errors(rank)
        results["differing"] = differing(rank)
    return results


World = Callable[[int], list[dict[str, Any]]]


@pytest.fixture(scope="module")
def world() -> World:
    return functools.cache(lambda size: run_on_ranks(on_every_rank, size))


on_each = pytest.mark.parametrize("size", WORLD_SIZES)
on_several = pytest.mark.parametrize("size", WORLD_SIZES[1:])
alone = functools.cache(trajectory)
trained_alone = functools.cache(functools.partial(train, 0, 1))


def bits(x: Tensor) -> Tensor:
    return x.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])


def assert_bitwise(actual: list[Tensor], expected: list[Tensor]) -> None:
    for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
        assert torch.equal(bits(a), bits(e)), f"tensor {i} differs by up to {(a - e).abs().max()}"


def assert_same_run(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert_bitwise(found["parameters"], expected["parameters"])
    assert found["statistics"] == expected["statistics"]
    for mine, theirs in zip(found["state"].values(), expected["state"].values(), strict=True):
        assert_bitwise(list(mine.values()), list(theirs.values()))


@ids
@on_each
def test_equal_gradients_give_bitwise_one_process(world: World, size: int, combination: tuple[Any, ...]) -> None:
    """However gradients come, whoever owns what, and whenever the work is done."""
    for rank in world(size):
        assert_same_run(rank["given"][str(combination)], alone(torch.float32))
        divided = set(rank["given"][str(combination)]["divided"])
        expected = {1: set(), 2: {"embedding"}, 4: {"embedding", "conv"}, 8: {"embedding", "conv"}}[size]
        assert divided == (expected if combination[1] is not None else set())


@on_each
@pytest.mark.parametrize("name", DIVISIBLE)
def test_every_divisible_set_gives_bitwise_one_process(world: World, size: int, name: str) -> None:
    """Fails when the norm that scales a vertex is a part's, or is added in another order than in one process."""
    for rank in world(size):
        assert_same_run(rank["sets"][name], alone(torch.float32, large=DIVISIBLE[name]))
        assert ("embedding" in rank["sets"][name]["divided"]) == (size > 1)


@on_each
def test_a_divided_tensor_without_a_gradient_on_one_owner_stays(world: World, size: int) -> None:
    """Fails when the other owners step their parts, which together may lie outside the set."""
    for rank in world(size):
        assert rank["one_gradient_missing"] == {"kept": True, "gamma": 0.0}


@on_each
def test_bfloat16_parameters(world: World, size: int) -> None:
    for rank in world(size):
        for found in rank["bf16"].values():
            assert_same_run(found, alone(torch.bfloat16))


@on_each
def test_channels_last(world: World, size: int) -> None:
    """In the bucket a gradient has its parameter's strides; parts are cut in the order of indices."""
    for rank in world(size):
        assert_same_run(rank["strided"], alone(torch.float32))


@ids
@on_each
def test_real_training(world: World, size: int, combination: tuple[Any, ...]) -> None:
    """Replicas are bitwise equal; sums over ranks differ from one process in their last bits only."""
    expected = trained_alone(steps=STEPS[combination])
    for rank in world(size):
        found = rank["trained"][str(combination)]
        assert_bitwise(found, world(size)[0]["trained"][str(combination)])
        for a, e in zip(found, expected, strict=True):
            torch.testing.assert_close(a, e, rtol=1e-7, atol=1e-10)


@on_each
def test_accumulation_without_sync(world: World, size: int) -> None:
    """Local gradients of earlier passes must be in what the last one reduces."""
    for rank in world(size):
        for a, e in zip(rank["accumulated"], train(0, 1, accumulate=3), strict=True):
            torch.testing.assert_close(a, e, rtol=1e-7, atol=1e-10)


@on_each
def test_clipping_by_the_global_norm(world: World, size: int) -> None:
    """Each rank has the gradients of its own tensors only: their norm alone would clip too little."""
    expected = train(0, 1, change=clip)
    for rank in world(size):
        for a, e in zip(rank["clipped"], expected, strict=True):
            torch.testing.assert_close(a, e, rtol=1e-6, atol=1e-9)


@on_several
def test_rounding_to_bfloat16_on_the_wire(world: World, size: int) -> None:
    """A little off, on every rank by the same."""
    exact = train(0, 1, steps=3)
    for rank in world(size):
        assert_bitwise(rank["rounded"], world(size)[0]["rounded"])
    assert any(not torch.equal(a, e) for a, e in zip(world(size)[0]["rounded"], exact, strict=True))


@on_each
def test_grad_scaler_skips_on_every_rank(world: World, size: int) -> None:
    """Only the owner sees the overflow: the others would step on, wait for it, and keep another scale."""
    net = Given(torch.float32)
    optimizer = SFW(constrain(net, KSparsePolytope(k_frac=0.05, k_min=3, radius=0.2)), lr=0.05)
    for step in (0, 2):
        for name, gradient in gradients_of(net, step).items():
            getattr(net, name).grad = gradient
        optimizer.step()
    for rank in world(size):
        assert rank["scaled"]["scales"] == [1024.0, 512.0, 512.0]
        assert_bitwise(rank["scaled"]["parameters"], [p.detach() for p in net.parameters()])


@on_each
def test_parameters_that_some_ranks_or_all_do_not_use(world: World, size: int) -> None:
    """An owner without a gradient of its own must take the others'; what nobody uses stays."""
    before = [p.detach() for p in TwoHeads().double().parameters()]
    for rank in world(size):
        plain = rank["unused"]["plain"]
        for a, e in zip(rank["unused"]["reduce_to_owner"], plain, strict=True):
            torch.testing.assert_close(a, e, rtol=1e-7, atol=1e-10)
        moved = [not torch.equal(a, b) for a, b in zip(plain, before, strict=True)]
        assert moved == [True, True, True, True, size > 1, size > 1, False, False]


@on_several
def test_what_cannot_work_is_refused(world: World, size: int) -> None:
    for rank in world(size):
        assert "parameters that SFW does not have" in rank["errors"]["strangers"]
        assert "after unfreezing call zero_grad() and step()" in rank["errors"]["unfrozen"]
        assert "replicate_momentum needs all gradients" in rank["errors"]["replicated"]


@on_several
def test_replicas_that_differ_are_named(world: World, size: int) -> None:
    """By tensor and rank, on every rank; even where −0 stands for 0."""
    for rank in world(size):
        assert f"b on rank {size - 1} (compared with rank 0): something changed" in rank["differing"]


def test_a_copy_of_an_optimizer_with_a_hook_can_be_made() -> None:
    """Threads and groups cannot be copied."""
    _, _, optimizer = build(torch.float32, None, None, torch.contiguous_format)
    assert copy.deepcopy(optimizer).param_groups[0]["lr"] == optimizer.param_groups[0]["lr"]
