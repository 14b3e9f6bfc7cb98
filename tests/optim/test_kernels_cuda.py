"""The kernels for a GPU, run by Triton's interpreter on the CPU: bit for bit what torch's operations make.

Triton decides at its import whether it interprets, so these tests run in a process of their own; those that compile the
kernels for GPUs that need not be here run in another. ``gpu/test_step_gpu.py`` has the same comparisons on a GPU.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from importlib.util import find_spec
from typing import Any
from unittest import mock

import pytest
import torch

from sfw_dist.constraints import KSparsePolytope, Unconstrained
from tests.support.step_pairs import (
    RESCALES,
    ROW,
    Pair,
    mixed,
    parts,
    run_not_finite,
    run_ranks,
    run_steps,
    run_ties,
    sparse,
    stats_of,
    tensor,
    tied,
)
from tests.support.step_runs import Twins, parameters, run_missing, run_mixed, run_schedules
from tests.support.step_runs import run_not_finite as run_whole_not_finite

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")

_workers: dict[bool, ProcessPoolExecutor] = {}


def in_process(*, interpreted: bool) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Runs a test in a process whose Triton interprets, or does not; all such tests in the same one."""

    def decorate(test: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(test)
        def run(**arguments: Any) -> None:
            _workers[interpreted].submit(_run, test.__name__, arguments).result()

        return run

    return decorate


def _run(name: str, arguments: dict[str, Any]) -> None:
    torch.manual_seed(0)
    globals()[name].__wrapped__(**arguments)


@pytest.fixture(scope="module", autouse=True)
def _processes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    spawn = multiprocessing.get_context("spawn")
    for interpreted in (True, False):
        worker = ProcessPoolExecutor(1, spawn, initializer=torch.set_num_threads, initargs=(1,))
        cache = str(tmp_path_factory.mktemp("triton"))
        environment = {"TRITON_INTERPRET": str(int(interpreted)), "TRITON_CACHE_DIR": cache}
        with mock.patch.dict(os.environ, environment):  # before the process starts: to import torch may import Triton
            worker.submit(int).result()
        _workers[interpreted] = worker
    yield
    for worker in _workers.values():
        worker.shutdown()


@in_process(interpreted=True)
def test_steps_are_those_of_torch() -> None:
    """Momentum, a vertex, its bytes, a step size or the move differ from those of a run on the CPU."""
    pair = Pair(mixed())
    assert {shard.codec.layout for shard in pair.shards} == {"mask", "indices", "all"}
    run_steps(pair)


@in_process(interpreted=True)
def test_tensors_may_lie_at_any_address() -> None:
    """The fast path for whole aligned rows is taken where it must not, or differs from the other."""
    run_steps(Pair(mixed(), misaligned=True))


@in_process(interpreted=True)
def test_ties_go_to_the_lowest_index_and_zeros_are_never_chosen() -> None:
    """The support of equal magnitudes, of zeros or of denormal numbers depends on the device."""
    run_ties(Pair(tied()))


@pytest.mark.parametrize("rescale", RESCALES)
@in_process(interpreted=True)
def test_step_sizes_by_every_rule(rescale: str) -> None:
    """A rule for the step size differs, or a step at the vertex, or of a momentum of 0, is not a finite one."""
    slots = [tensor(ROW, sparse(3), rescale=rescale, lr=lr) for lr in (0.001, 1.0, 1000.0)]
    pair = Pair(slots)
    gradients = pair.gradients()
    for _ in range(2):  # the second starts at the vertex where γ was 1
        pair.compute_vertices(gradients)
        pair.apply_update()
    pair = Pair(slots)
    pair.compute_vertices([torch.zeros(ROW)] * len(slots))
    pair.apply_update()


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
@in_process(interpreted=True)
def test_a_gradient_that_is_not_finite_makes_the_step_size_nan(value: float) -> None:
    """An overflow goes unnoticed, spoils other tensors, or leaves something behind for the next step."""
    run_not_finite(Pair(mixed()), value)


@in_process(interpreted=True)
def test_huge_and_tiny_gradients_do_not_overflow() -> None:
    """Sums of squares are taken in float32: the step size is NaN or 0 for a gradient that float32 can hold."""
    pair = Pair([tensor(3 * ROW, sparse(9)), tensor(3 * ROW, Unconstrained())])
    for scale in (1e30, 1e-30, 1.0):
        pair.compute_vertices([g * scale for g in pair.gradients() if g is not None])
        assert all(stats_of(shard.read)[0] > 0 for shard in pair.shards)
        pair.apply_update()


@pytest.mark.parametrize("kinds", ["sparse", "unconstrained"])
@in_process(interpreted=True)
def test_tensors_may_all_be_of_one_kind(kinds: str) -> None:
    """A kernel without a row to handle is launched."""
    wanted = Unconstrained if kinds == "unconstrained" else KSparsePolytope
    run_steps(Pair([slot for slot in mixed()[-3:] if isinstance(slot.constraint, wanted)]))


@in_process(interpreted=True)
def test_parameters_are_rounded_to_the_nearest_and_of_two_to_the_even_one() -> None:
    """Half precision drifts: sums that lie between two numbers all go up, or down."""
    for dtype, digits in ((torch.bfloat16, 8), (torch.float16, 11)):
        slot = tensor(ROW, Unconstrained(), dtype, momentum=0.0, lr=1.0)
        with torch.no_grad():
            slot.parameter.copy_(1 + torch.arange(ROW) * 2.0 ** (1 - digits))
        pair = Pair([slot])
        before = slot.parameter.detach().clone()
        pair.compute_vertices([torch.full((ROW,), -(2.0**-digits), dtype=dtype)])
        pair.apply_update()
        assert torch.equal(slot.parameter[::2], before[::2]) and (slot.parameter[1::2] > before[1::2]).all()


@in_process(interpreted=True)
def test_gradients_may_have_another_type_than_parameters() -> None:
    """A float32 gradient of a bfloat16 parameter is read as bfloat16."""
    pair = Pair([tensor(ROW + 9, sparse(8), torch.bfloat16), tensor(ROW, Unconstrained(), torch.float16)])
    gradients = pair.gradients()
    pair.kernel.compute_vertices([g.float() for g in gradients if g is not None], list(pair.momenta), pair.options())
    pair.compare_answers(gradients)


@in_process(interpreted=True)
def test_a_rank_moves_what_others_own_by_the_same_bytes() -> None:
    """Replicas of several ranks drift apart."""
    run_ranks(Pair(mixed()))


@in_process(interpreted=True)
def test_more_rows_than_are_added_up_at_a_time() -> None:
    """The last program of a large tensor forgets what it had so far."""
    import triton.language as tl

    from sfw_dist.optim.kernels import triton_kernels as cuda_kernels
    from sfw_dist.optim.kernels import triton_layout as cuda_layout

    few = tl.constexpr(2)
    with mock.patch.object(cuda_layout, "SPAN", few), mock.patch.object(cuda_kernels, "SPAN", few):
        run_steps(Pair(mixed()[:5]))
        run_ties(Pair(tied()[2:]))


@in_process(interpreted=True)
def test_parts_of_tensors() -> None:
    """A part is stepped from the tensor's first entry on, or over its end."""
    starts = (0, 2 * ROW, 3 * ROW)
    run_steps(
        Pair(
            [
                *parts(4 * ROW + 5, sparse(20), starts),
                *parts(4 * ROW + 5, sparse(2), starts, dtype=torch.bfloat16),
                *parts(4 * ROW + 5, Unconstrained(), starts, lr=0.1, weight_decay=0.1),
            ]
        )
    )


@in_process(interpreted=True)
def test_nothing_is_sent_when_nothing_changed() -> None:
    """Every step sends a table to the GPU, or none does."""
    pair = Pair([tensor(ROW, sparse(3)), tensor(ROW, Unconstrained())])
    pair.compute_vertices(pair.gradients())
    given, options = pair.given(pair.gradients()), pair.options()
    tables = []
    for lr in (0.5, 0.5, 0.4):
        pair.kernel.compute_vertices(*given, [values | {"lr": lr} for values in options])
        pair.kernel.apply_update()
        tables.append((pair.kernel._steps._sent, pair.kernel._parameters._sent))
    assert tables[1][0] is tables[0][0] and tables[2][0] is not tables[1][0]
    assert tables[2][1] is tables[0][1]


@pytest.mark.parametrize("run", [run_mixed, run_missing, run_whole_not_finite, run_schedules])
@in_process(interpreted=True)
def test_whole_steps_are_those_of_torch(run: Callable[[Twins], None]) -> None:
    """The optimizer gives the kernels the wrong gradient, momentum, option or memory."""
    run(Twins())


@in_process(interpreted=True)
def test_channels_last() -> None:
    """Memory order is not the order of indices: the copies in which the kernels work must come back."""
    twins = Twins(channels_last=True)
    twins.run(range(2))
    assert not all(p.is_contiguous() for p in parameters(twins.fused))


@in_process(interpreted=True)
def test_two_ranks_with_divided_tensors() -> None:
    """Vertices of a tensor that ranks share are moved by wrong parts, or what others answered is not read."""
    fork = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        ranks = [fork.Process(target=_rank, args=(rank, f"file://{folder}/store")) for rank in range(2)]
        for rank in ranks:
            rank.start()
        for rank in ranks:
            rank.join(100)
            rank.kill()
    assert [rank.exitcode for rank in ranks] == [0, 0]


def _rank(rank: int, store: str) -> None:
    torch.distributed.init_process_group("gloo", store, rank=rank, world_size=2)
    half = KSparsePolytope(k_frac=0.05, radius=0.3)
    groups = [
        ((5, 5_000), torch.float32, {"constraint": half}),
        ((130, 70), torch.bfloat16, {"constraint": half}),
        ((20_000,), torch.float32, {"weight_decay": 0.01}),
        ((60,), torch.float32, {}),
    ]
    twins = Twins(row=4096, groups=groups, split=8192)
    assert any(not slot.is_whole for slot in twins.fused._distribution.replicated_shards)
    twins.run(range(2))
    torch.distributed.destroy_process_group()


SIGNATURE = {
    "rows": "*i32",
    "shards": "*i64",
    "steps": "*i64",
    "parameters": "*i64",
    "state": "*i32",
    "histogram": "*i32",
    "counts": "*i32",
    "sums": "*fp64",
}
KERNELS = (
    "momentum_kernel",
    "histogram_kernel",
    "count_kernel",
    "encode_kernel",
    "count_mask_kernel",
    "update_kernel",
)


@pytest.mark.parametrize("capability", [80, 90])
@in_process(interpreted=False)
def test_the_kernels_compile_for_a_gpu(capability: int) -> None:
    """What the interpreter accepts is no program for a GPU, spills, goes entry by entry, or contracts a·b + c."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from sfw_dist.optim.kernels import cuda
    from sfw_dist.optim.kernels import triton_kernels as cuda_kernels

    target = GPUTarget("cuda", capability, 32)
    for name in KERNELS:
        kernel = getattr(cuda_kernels, name)
        constants = {"ROW": cuda._ROW, "SHIFT": 10}
        source = ASTSource(
            kernel,
            {argument: SIGNATURE.get(argument, "constexpr") for argument in kernel.arg_names},
            {argument: constants[argument] for argument in kernel.arg_names if argument in constants},
        )
        options = {"num_warps": cuda._WARPS, "enable_fp_fusion": False}
        try:
            compiled = triton.compile(source, target, options)
        except RuntimeError as error:
            if not str(error).startswith("Cannot find"):  # of a kernel, and not of the machine
                raise
            pytest.skip(f"Triton has no assembler here: {error}")
        ptx = compiled.asm["ptx"]
        assert compiled.asm["cubin"] and "depot" not in ptx, f"{name} has local memory"
        assert "fma" not in ptx, f"{name} contracts"
        if name != "count_mask_kernel":
            assert re.search(r"ld\.global(\.\w+)*\.v4\.b32", ptx), f"{name} loads entry by entry"
