"""The kernels of the step on a GPU: the bits of torch's operations on the CPU, without waiting, and in a graph."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from step_pairs import (
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
from torch import Tensor

from sfw_dist.constraints import Unconstrained
from sfw_dist.step import Slot

pytest.importorskip("triton")

GPU = "cuda:0"


def large() -> list[Slot]:
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
            pair.step.answer(gradients, pair.options())
            pair.step.move()
        outcomes.append([pair.buffer, *(piece.parameter for piece in pair.pieces)])
    assert all(torch.equal(a, b) for a, b in zip(*outcomes, strict=True))


def test_nothing_waits_for_the_gpu() -> None:
    """The host stands still in each step until the GPU has caught up."""
    pair = large_pair()
    run_steps(pair)  # compiles
    options, gradients = pair.options(), pair.gradients()
    for _ in range(2):  # the second time at other addresses, which have to be sent
        there = on_the_gpu(gradients)
        with waiting_is_an_error():
            pair.step.answer(there, options)
            pair.step.move()
        pair.compare_answers(gradients)
        pair.compare_moves()


def test_a_graph_of_a_step_replays_it() -> None:
    """A captured step waits, reads addresses that later steps overwrite, or leaves the next one out of step."""
    pair = large_pair()
    run_steps(pair)  # compiles
    options, fixed = pair.options(), on_the_gpu(pair.gradients())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        pair.step.answer(fixed, options)
        pair.step.move()
    for _ in range(3):
        run_steps(pair)  # gradients at other addresses
        gradients = pair.gradients()
        for there, new in zip(fixed, gradients, strict=True):
            assert new is not None
            there.copy_(new)
        graph.replay()
        pair.compare_answers(gradients)
        pair.compare_moves()
