"""The kernels of the step on a GPU: the bits of torch's operations on the CPU, without waiting, and in a graph."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from sfw_dist.constraints import Unconstrained
from sfw_dist.errors import UserError
from sfw_dist.optim.shard import Shard
from tests.support.step_pairs import (
    Pair,
    mixed,
    run_missing,
    run_not_finite,
    run_ranks,
    run_steps,
    run_ties,
    sparse,
    tensor,
    tied,
)
from tests.support.step_runs import (
    INDICES,
    MASK,
    Twins,
    kernels,
    optimizer,
    parameters,
    run_mixed,
    run_schedules,
    set_gradients,
)
from tests.support.step_runs import run_missing as run_whole_missing

pytest.importorskip("triton")

GPU = "cuda:0"


def large() -> list[Shard]:
    """Hundreds of rows of the size that training uses, whole ones and others, in all types and ways of writing."""
    layer = 512 * 512 * 9
    return [
        tensor(layer, sparse(layer // 20)),
        tensor(layer // 4 + 7, sparse(layer // 400), torch.bfloat16),
        tensor(100_003, sparse(100_003), torch.float16, rescale="diameter"),
        tensor(layer // 4, Unconstrained(), torch.bfloat16, weight_decay=0.01, lr=0.1),
        tensor(65, sparse(3), rescale="fast_gradient"),
        tensor(1_000, Unconstrained(), lr=0.1),
    ]


def large_pair() -> Pair:
    return Pair(large(), GPU, row=4096)


def on_the_gpu(gradients: list[Tensor | None]) -> list[Tensor]:
    """Copies, whose addresses stay."""
    return [g.to(GPU) for g in gradients if g is not None]


@contextmanager
def waiting_is_an_error() -> Iterator[None]:
    """Where torch makes the host wait for the GPU."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("misaligned", [False, True])
def test_steps_are_those_of_torch_on_the_cpu(misaligned: bool) -> None:
    """A GPU trains otherwise than a CPU, or only as long as tensors are aligned."""
    run_steps(Pair(mixed(), GPU, misaligned=misaligned))


def test_large_tensors() -> None:
    """Programs that run at the same time get in each other's way: counts, sums or signs are lost."""
    run_steps(large_pair())


def test_ties_among_many_programs() -> None:
    """Which of equal magnitudes are chosen depends on which program comes first."""
    run_ties(Pair(tied(), GPU))
    n = 1_000_000
    run_ties(Pair([tensor(n, sparse(k), momentum=0.5) for k in (1, 50_000, n - 1)], GPU, row=4096))


def test_missing_gradients() -> None:
    """A tensor moves without a gradient."""
    run_missing(Pair(mixed(), GPU))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_gradients_that_are_not_finite(value: float) -> None:
    """An overflow goes unnoticed or spoils the steps that follow."""
    run_not_finite(Pair(mixed(), GPU), value)


def test_ranks() -> None:
    """Replicas drift apart."""
    run_ranks(Pair(mixed(), GPU))


def test_the_same_step_twice_gives_the_same_bits() -> None:
    """A sum depends on the order in which programs finish."""
    outcomes = []
    for _ in range(2):
        torch.manual_seed(1)
        pair = large_pair()
        gradients = on_the_gpu(pair.gradients())
        pair.buffer.zero_()
        for _ in range(5):
            pair.kernel.compute_vertices(gradients, pair.momenta, pair.options())
            pair.kernel.apply_update()
        outcomes.append([pair.buffer, *(shard.parameter for shard in pair.shards)])
    assert all(torch.equal(a, b) for a, b in zip(*outcomes, strict=True))


def test_nothing_waits_for_the_gpu() -> None:
    """The host stands still in each step until the GPU has caught up."""
    pair = large_pair()
    run_steps(pair)  # compiles
    options, gradients = pair.options(), pair.gradients()
    for _ in range(2):  # the second time at other addresses, which have to be sent
        there = on_the_gpu(gradients)
        with waiting_is_an_error():
            pair.kernel.compute_vertices(there, pair.momenta, options)
            pair.kernel.apply_update()
        pair.compare_answers(gradients)
        pair.compare_moves()


def test_a_graph_of_a_step_replays_it() -> None:
    """A captured step waits, reads addresses that later steps overwrite, or leaves the next one out of step."""
    pair = large_pair()
    run_steps(pair)  # compiles
    options, fixed = pair.options(), on_the_gpu(pair.gradients())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        pair.kernel.compute_vertices(fixed, pair.momenta, options)
        pair.kernel.apply_update()
    for _ in range(3):
        run_steps(pair)  # gradients at other addresses
        gradients = pair.gradients()
        for there, new in zip(fixed, gradients, strict=True):
            assert new is not None
            there.copy_(new)
        graph.replay()
        pair.compare_answers(gradients)
        pair.compare_moves()


# ------------------------------------------------------------------------------------------------- whole steps

FUSIBLE = [
    ((64, 32, 3, 3), torch.float32, {"constraint": MASK}),
    ((1000, 33), torch.bfloat16, {"constraint": INDICES}),
    ((1000,), torch.float32, {"weight_decay": 0.01}),
    ((64,), torch.float16, {}),
]


@pytest.mark.parametrize("row", [64, None])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("run", [run_mixed, run_whole_missing, run_schedules])
def test_whole_steps_are_those_of_torch_on_the_gpu(
    run: Callable[[Twins], None], channels_last: bool, row: int | None
) -> None:
    """The optimizer gives the kernels the wrong gradient, momentum, option or memory."""
    run(Twins(GPU, row, channels_last=channels_last))


def test_the_optimizer_takes_the_kernels_by_itself() -> None:
    """Nothing asks for them."""
    from sfw_dist.optim.kernels.cuda import CUDAKernel

    fused = optimizer(GPU, FUSIBLE, fused=True)
    set_gradients(fused, 0)
    fused.step()
    assert isinstance(fused._distribution.distributors(fused.param_groups)[0]._kernel, CUDAKernel)


def test_a_gradient_that_is_not_finite_is_told_of_by_the_statistics() -> None:
    """A step that waits for nothing raises nothing either."""
    fused = optimizer(GPU, FUSIBLE, fused=True)
    set_gradients(fused, 0)
    parameters(fused)[1].grad[3, 3] = math.nan
    fused.step()
    with pytest.raises(UserError, match=r"group1\.param0 is not finite"):
        fused.statistics()


@pytest.mark.parametrize("channels_last", [False, True])
def test_a_whole_step_does_not_wait_for_the_gpu(channels_last: bool) -> None:
    """The host stands still in each step until the GPU has caught up."""
    twins = Twins(GPU, None, groups=FUSIBLE, channels_last=channels_last)
    twins.run(range(2))
    for either in twins.both:
        set_gradients(either, 2)
    with waiting_is_an_error():
        twins.fused.step()
    twins.plain.step()
    twins.compare()


@pytest.mark.parametrize("channels_last", [False, True])
def test_a_graph_of_a_whole_step_replays_it(channels_last: bool) -> None:
    """A captured step waits, keeps the learning rate of its capture, or its statistics stay behind."""
    twins = Twins(GPU, None, groups=FUSIBLE, channels_last=channels_last)
    for either in twins.both:
        for group in either.param_groups:
            group["lr"] = torch.tensor(0.05, device=GPU)
    twins.run(range(2))  # compiles, and leaves the first step behind
    fixed = [p.grad for p in parameters(twins.fused)]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), kernels(None):
        twins.fused.step()
    for step in range(3, 6):
        for either in twins.both:
            set_gradients(either, step)
            for group in either.param_groups:
                group["lr"].fill_(0.1 / step)
        for there, p in zip(fixed, parameters(twins.fused), strict=True):
            there.copy_(p.grad)
        graph.replay()
        twins.plain.step()
        for p, q in zip(*map(parameters, twins.both), strict=True):  # a replay does not count
            twins.fused.state[p]["step"].copy_(twins.plain.state[q]["step"])
        twins.compare()
        assert twins.fused.statistics().keys() == twins.plain.statistics().keys()
        for name, expected in twins.plain.statistics().items():
            assert twins.fused.statistics()[name] == pytest.approx(expected, rel=1e-9)
