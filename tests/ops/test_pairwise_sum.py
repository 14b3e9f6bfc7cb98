"""Sums that must not depend on the number of threads, against exact references."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from sfw_dist.ops.pairwise_sum import (
    Products,
    absolute_sum,
    frank_wolfe_products,
    inner_product,
    row_sums,
    squared_norm,
    tree_sum,
)

ROW, BLOCK = 8192, 262_144
SIZES = [0, 1, 2, ROW - 1, ROW, ROW + 1, 2 * ROW, 2 * ROW + 1, 2 * BLOCK + 3]
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
every_size = pytest.mark.parametrize("n", SIZES)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def exact_sum(x: Tensor) -> float:
    return float(x.double().numpy().sum())  # pairwise, in one thread


def check(actual: Tensor, expected: float, rel: float = 1e-12) -> None:
    assert actual.dtype == torch.float64 and actual.shape == ()
    assert float(actual) == pytest.approx(expected, rel=rel, abs=0)


@every_dtype
@every_size
def test_norms_are_exact(n: int, dtype: torch.dtype) -> None:
    """Rows or a rest left out, or squares summed in the input's type (off by 7e-5 at 300,000 float32 entries)."""
    x = torch.randn(n).to(dtype)
    check(squared_norm(x), exact_sum(x.double().square()))
    check(absolute_sum(x), exact_sum(x.double().abs()))


@every_dtype
@every_size
def test_inner_products_are_exact(n: int, dtype: torch.dtype) -> None:
    """Products rounded to the inputs' type are off by 1e-6 of their sum in float32."""
    x, y = torch.randn(n).to(dtype), torch.rand(n).to(dtype)
    products = x.double() * y.double()
    error = abs(float(inner_product(x, y)) - exact_sum(products))
    assert error <= 1e-13 * exact_sum(products.abs())


@pytest.mark.parametrize("n", [1, 15, 16, 17, ROW - 1, ROW, ROW + 1, 5 * ROW + 33])
def test_the_order_of_additions_is_the_documented_one(n: int) -> None:
    """Compiled kernels and other ranks repeat it: any other order differs in the last bits."""

    def pairs(values: list[Any]) -> Any:
        while len(values) > 1:
            values += [0.0] * (len(values) % 2)
            values = [values[i] + values[i + 1] for i in range(0, len(values), 2)]
        return values[0]

    x = torch.randn(n, dtype=torch.float64)
    filled = x.abs().tolist() + [0.0] * (-n % ROW)
    rows = [filled[start : start + ROW] for start in range(0, len(filled), ROW)]
    sums = [pairs([pairs(row[lane::16]) for lane in range(16)]) for row in rows]
    assert row_sums(torch.abs, x).tolist() == sums
    assert float(absolute_sum(x)) == pairs(list(sums))


@pytest.mark.parametrize("magnitude", [1e30, 1e-38])
def test_squares_neither_overflow_nor_vanish(magnitude: float) -> None:
    """1e60 and 1e-76 are not float32 numbers."""
    x = torch.full((ROW + 5,), magnitude)
    check(squared_norm(x), (ROW + 5) * float(x[0]) ** 2)
    check(absolute_sum(x), (ROW + 5) * float(x[0]))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_bad_entry_shows_in_every_sum(value: float) -> None:
    """In the last row, too: the optimizer finds diverged gradients by these sums."""
    x = torch.ones(ROW + 3)
    x[-1] = value
    ones = torch.ones_like(x)
    for total in (squared_norm(x), absolute_sum(x), inner_product(x, ones)):
        assert not total.isfinite()


def test_any_shape_and_memory_format() -> None:
    """Entries are paired by their place in the shape, not in memory."""
    x, y = torch.randn(40, 30, 5, 4), torch.randn(40, 30, 5, 4)
    x_last = x.to(memory_format=torch.channels_last)
    check(squared_norm(x_last), exact_sum(x.double().square()))
    assert torch.equal(inner_product(x_last, y), inner_product(x, y))
    check(squared_norm(torch.tensor(-3.0)), 9.0)


# Threads


@pytest.mark.parametrize("n", [ROW + 1, 2 * ROW, 3 * ROW + 1, 2 * BLOCK + 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_sums_do_not_depend_on_threads(n: int, dtype: torch.dtype) -> None:
    """One rank with four threads would drift from four ranks with one, by the last bit of a step size.

    The thread count is as before after every test, see conftest.py.
    """
    x, y = torch.randn(n).to(dtype), torch.randn(n).to(dtype)
    indices = torch.randperm(n)[: n // 20].sort().values

    def sums(threads: int) -> Tensor:
        torch.set_num_threads(threads)
        sparse = frank_wolfe_products(x, y, indices, y[: indices.numel()])
        dense = frank_wolfe_products(x, y, None, x.flip(0))
        return torch.cat([torch.stack([squared_norm(x), absolute_sum(x), inner_product(x, y)]), *sparse, *dense])

    one = sums(threads=1)
    for threads in (2, 4):
        assert torch.equal(sums(threads), one), threads


# The three sums of a step


def check_products(m: Tensor, theta: Tensor, indices: Tensor | None, values: Tensor) -> None:
    """Against the formulas, entry by entry; θ − v is rounded to the step's type, as the step's own is."""
    before = theta.clone()
    rows = frank_wolfe_products(m, theta, indices, values)
    assert {len(sums) for sums in rows} == {-(-m.numel() // ROW)}
    found = Products(*map(tree_sum, rows))
    vertex = values if indices is None else torch.zeros_like(m).index_copy(0, indices, values)
    direction, difference = m.double(), (theta - vertex).double()
    check(found.direction_squared, exact_sum(direction.square()))
    check(found.distance_squared, exact_sum(difference.square()))
    products = direction * difference
    error = abs(float(found.gap) - exact_sum(products))
    assert error <= max(torch.finfo(m.dtype).eps, 1e-12) * exact_sum(products.abs())
    assert torch.equal(theta, before)


@pytest.mark.parametrize("n", [1, 2, ROW + 1, BLOCK, BLOCK + 1, 2 * BLOCK + 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_products_of_a_step(n: int, dtype: torch.dtype) -> None:
    """Dense, without a nonzero, and with nonzeros on both sides of the blocks' borders, or in one block only."""
    m, theta = torch.randn(n, dtype=dtype), torch.randn(n, dtype=dtype)
    check_products(m, theta, None, torch.randn(n, dtype=dtype))
    check_products(m, theta, torch.arange(0), torch.zeros(0, dtype=dtype))
    borders = [0, 1, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK - 1, 2 * BLOCK, n - 1]
    for chosen in (borders, borders[:3], borders[3:5], [n - 1]):
        indices = torch.tensor(sorted({i for i in chosen if i < n}), dtype=torch.int64)
        check_products(m, theta, indices, 1e3 * torch.randn(indices.numel(), dtype=dtype))


def test_distance_does_not_cancel_near_the_vertex() -> None:
    """``‖θ‖² − 2⟨θ, v⟩ + ‖v‖²`` in float32 has no right digit when θ is 1e-6 from v, and the step size none either."""
    vertex = torch.randn(1000)
    theta = vertex * (1 + 1e-6)
    exact = exact_sum((theta.double() - vertex.double()).square())
    check(tree_sum(frank_wolfe_products(vertex, theta, None, vertex).distance_squared), exact, rel=1e-6)
    assert frank_wolfe_products(vertex, vertex, None, vertex).distance_squared == 0
