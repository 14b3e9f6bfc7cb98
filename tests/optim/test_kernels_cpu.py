"""The compiled step against the readable one, to the bit: parameters, momentum, statistics and the bytes sent."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from sfw_dist import SFW, KSparsePolytope, Unconstrained
from sfw_dist.constraints import Constraint
from sfw_dist.errors import UserError
from sfw_dist.optim.kernels import compile as build
from sfw_dist.optim.kernels import cpu

ROW = 8192
MASK, INDICES = KSparsePolytope(k_frac=0.05, radius=0.3), KSparsePolytope(k_frac=0.004, radius=0.3)
Gradients = Callable[[int, int, torch.Generator], Tensor]
"""(step, entries, generator) → float32 ``(entries,)``"""


@pytest.fixture(scope="module", autouse=True)
def compiled() -> None:
    assert cpu.available(), "the kernels must compile where the tests run"


def noise(step: int, n: int, generator: torch.Generator) -> Tensor:
    return torch.randn(n, generator=generator)


GRADIENTS: dict[str, Gradients] = {
    "noise": noise,
    "growing": lambda step, n, g: torch.randn(n, generator=g) * 10.0 ** (2 * (step % 3)),
    "equal magnitudes": lambda step, n, g: torch.randint(0, 2, (n,), generator=g) * 2.0 - 1.0,
    "few magnitudes": lambda step, n, g: torch.randint(-3, 4, (n,), generator=g).float(),
    "zeros": lambda step, n, g: torch.zeros(n),
    "nearly all zero": lambda step, n, g: torch.randn(n, generator=g) * (torch.rand(n, generator=g) < 0.001),
    "denormal": lambda step, n, g: torch.randn(n, generator=g) * 1e-41,
    "one row is large": lambda step, n, g: torch.randn(n, generator=g) * (1 + 99.0 * (torch.arange(n) < ROW)),
    "periodic": lambda step, n, g: torch.arange(n).remainder(9).sub(4.0) + 1e-3 * torch.randn(n, generator=g),
    "minus zero": lambda step, n, g: torch.where(torch.rand(n, generator=g) < 0.5, -0.0, 0.0),
}


def optimizer(
    shapes: list[tuple[int, ...]], sets: list[Constraint], dtype: torch.dtype, *, fused: bool, **options: Any
) -> SFW:
    generator = torch.Generator().manual_seed(0)
    params = [nn.Parameter((0.1 * torch.randn(shape, generator=generator)).to(dtype)) for shape in shapes]
    for p in params:
        p.data.view(-1)[0] = -0.0
    groups = [{"params": [p], "constraint": c} for p, c in zip(params, sets, strict=True)]
    return SFW(groups, **{"lr": 0.05, "weight_decay": 1e-3, **options}, fused=fused)


def parameters(optimizer: SFW) -> list[nn.Parameter]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def bits(x: Tensor) -> Tensor:
    return x.detach().contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])


def assert_same(fused: SFW, plain: SFW) -> None:
    for i, (p, q) in enumerate(zip(parameters(fused), parameters(plain), strict=True)):
        assert torch.equal(bits(p), bits(q)), f"tensor {i} differs in {int((p != q).sum())} entries"
        for key, value in plain.state[q].items():
            assert torch.equal(fused.state[p][key], value), f"{key} of tensor {i}"
    assert fused.statistics() == plain.statistics()
    mine_of, theirs_of = (
        fused._distribution.distributors(fused.param_groups)[0],
        plain._distribution.distributors(plain.param_groups)[0],
    )
    assert mine_of._kernel is not None and theirs_of._kernel is None
    for slot, mine, theirs in zip(fused._distribution.replicated_shards, mine_of._read, theirs_of._read, strict=True):
        size = slot.codec.nbytes  # beyond the statistics, whose NaN may have either sign
        assert torch.equal(mine[24:size], theirs[24:size]), slot.name


def run(pair: tuple[SFW, SFW], gradients: Gradients, steps: int = 6) -> None:
    for step in range(steps):
        for either in pair:
            generator = torch.Generator().manual_seed(step)
            for p in parameters(either):
                p.grad = torch.empty_like(p).copy_(gradients(step, p.numel(), generator).view(p.shape))
            either.step()
        assert_same(*pair)


def pair(shapes: list[tuple[int, ...]], sets: list[Constraint], dtype: torch.dtype, **options: Any) -> tuple[SFW, SFW]:
    return (
        optimizer(shapes, sets, dtype, fused=True, **options),
        optimizer(shapes, sets, dtype, fused=False, **options),
    )


SHAPES: list[tuple[int, ...]] = [(3, 7), (64, 65), (ROW,), (ROW + 1,), (150, 150), (3 * ROW + 70,), (300, 300), (1,)]
SETS: list[Constraint] = [MASK, MASK, MASK, INDICES, MASK, INDICES, Unconstrained(), Unconstrained()]


@pytest.mark.parametrize("gradients", GRADIENTS.values(), ids=GRADIENTS.keys())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_compiled_step_is_the_readable_one(gradients: Gradients, dtype: torch.dtype) -> None:
    """Ties, brackets that miss, full lists of candidates, tails of rows: each once gave another vertex."""
    run(pair(SHAPES, SETS, dtype), gradients)


@pytest.mark.parametrize("k", [1, 2, 20_000, 39_999, 40_000])
@pytest.mark.parametrize("gradients", ["noise", "few magnitudes", "nearly all zero"])
def test_any_k(k: int, gradients: str) -> None:
    """K = 1 leaves the sample no order statistic above, K = n none below."""
    run(pair([(200, 200)], [KSparsePolytope(k=k, radius=0.1)], torch.float32), GRADIENTS[gradients], steps=4)


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 3 * ROW),
    fraction=st.floats(0.0001, 1.0),
    levels=st.integers(1, 50),
    seed=st.integers(0, 1000),
)
def test_any_size_and_any_ties(n: int, fraction: float, levels: int, seed: int) -> None:
    """A few levels of magnitude make ties across blocks and rows, of which the first must win."""

    def gradients(step: int, n: int, generator: torch.Generator) -> Tensor:
        generator.manual_seed(seed + step)
        return torch.randint(-levels, levels + 1, (n,), generator=generator).float()

    run(pair([(n,)], [KSparsePolytope(k_frac=fraction, radius=1.0)], torch.float32), gradients, steps=3)


@pytest.mark.parametrize("rescale", ["gradient", "fast_gradient", "diameter", "none"])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_every_rule_and_momentum(rescale: str, momentum: float) -> None:
    """Without momentum the gradient is the direction, and no buffer is kept."""
    run(pair(SHAPES, SETS, torch.float32, rescale=rescale, momentum=momentum), noise, steps=3)


def test_channels_last() -> None:
    """Memory order is not the order of indices: the copies in which the kernels work must come back."""
    sets: list[Constraint] = [MASK, INDICES, Unconstrained()]
    fused, plain = pair([(40, 30, 5, 5), (20, 30, 5, 5), (8, 6, 3, 3)], sets, torch.float32)
    for p in parameters(fused):
        p.data = p.data.to(memory_format=torch.channels_last)
    run((fused, plain), noise, steps=3)
    assert not any(p.is_contiguous() for p in parameters(fused))


def test_a_missing_gradient_leaves_the_tensor_alone() -> None:
    """Its slot still has last step's vertex, which must not be applied again; momentum must not move."""
    fused, plain = pair(SHAPES, SETS, torch.float32)
    run((fused, plain), noise, steps=2)
    for either in (fused, plain):
        for i, p in enumerate(parameters(either)):
            p.grad = torch.ones_like(p) if i % 3 == 0 else None
        either.step()
    assert_same(fused, plain)
    run((fused, plain), noise, steps=2)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("tensor", [1, 5, 6])
def test_a_gradient_that_is_not_finite_is_refused(bad: float, tensor: int) -> None:
    """NaN has a magnitude above all others as a bit pattern: the selection must end, and nothing move."""
    fused, _ = pair(SHAPES, SETS, torch.float32)
    before = [p.detach().clone() for p in parameters(fused)]
    for p in parameters(fused):
        p.grad = torch.ones_like(p)
    parameters(fused)[tensor].grad.view(-1)[-1] = bad
    with pytest.raises(UserError, match=f"group{tensor}.param0 is not finite"):
        fused.step()
    assert all(torch.equal(p, b) for p, b in zip(parameters(fused), before, strict=True))


@pytest.mark.parametrize("threads", [2, 3, 5])
def test_threads_make_no_difference(threads: int) -> None:
    """Counts, sums and lists of several threads come together in the order of the rows."""
    run(pair(SHAPES, SETS, torch.float32), noise, steps=1)  # with one
    torch.set_num_threads(threads)
    for gradients in ("noise", "growing", "few magnitudes"):
        run(pair(SHAPES, SETS, torch.float32), GRADIENTS[gradients], steps=4)


def test_several_waves() -> None:
    """More rows than fit the scratch memory of one wave."""
    shapes: list[tuple[int, ...]] = [(cpu._WAVE * ROW // 2 + 5,), (100,), (cpu._WAVE * ROW // 2 + 5,), (ROW,)]
    run(pair(shapes, [MASK, MASK, INDICES, Unconstrained()], torch.float32), noise, steps=2)


# ------------------------------------------------------------------------------------------------------- building


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    build.library.cache_clear()
    yield monkeypatch
    build.library.cache_clear()


def test_it_is_compiled_once_into_the_cache(fresh: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Compiling takes seconds, in every process, if the second one does not find it."""
    fresh.setenv("SFW_DIST_CACHE", str(tmp_path))
    assert build.library() is not None
    made = list(tmp_path.iterdir())
    assert [path.suffix for path in made] == [".so"]
    build.library.cache_clear()
    fresh.setattr(build.subprocess, "run", None)  # a second compilation would call it
    assert build.library() is not None


def test_without_a_compiler_it_says_so_and_goes_on(
    fresh: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fresh.setenv("SFW_DIST_CACHE", str(tmp_path))
    fresh.setenv("PATH", str(tmp_path))
    fresh.delenv("CXX", raising=False)
    with caplog.at_level(logging.WARNING):
        step_taken = optimizer([(20, 30)], [MASK], torch.float32, fused=True)
        parameters(step_taken)[0].grad = torch.ones(20, 30)
        step_taken.step()
    assert "install g++" in caplog.text
    assert parameters(step_taken)[0].count_nonzero() > 0


def test_a_cache_that_others_can_write_to_is_not_used(
    fresh: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Whoever can write there could have their code loaded."""
    os.chmod(tmp_path, 0o777)
    fresh.setenv("SFW_DIST_CACHE", str(tmp_path))
    assert build.library() is None
    assert "can be written by others" in caplog.text and not list(tmp_path.iterdir())
