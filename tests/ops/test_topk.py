"""Exact selection: every implementation against the definition, written out in Python with float64 magnitudes."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sfw_dist.ops import topk
from sfw_dist.ops.topk import cpu, reference

Select = Callable[[Tensor, int], Tensor]
SELECTIONS: dict[str, Select] = {"cpu": cpu.select, "reference": reference.select, "entry point": topk.select}
every_selection = pytest.mark.parametrize("select", SELECTIONS.values(), ids=SELECTIONS.keys())

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def definition(x: Tensor, k: int) -> list[int]:
    """The k largest magnitudes, the lower index first among equals; in ascending order of the indices."""
    magnitudes = [abs(entry) for entry in x.double().flatten().tolist()]
    return sorted(sorted(range(len(magnitudes)), key=lambda i: (-magnitudes[i], i))[:k])


def check(select: Select, x: Tensor, k: int) -> None:
    indices = select(x, k)
    assert indices.dtype == torch.int64 and indices.shape == (k,)
    assert indices.tolist() == definition(x, k)


def special_values(dtype: torch.dtype) -> Tensor:
    """±0, the two smallest denormals and the largest, 1 and its neighbours, the largest number and infinity, ±."""
    info = torch.finfo(dtype)
    smallest = info.smallest_normal * info.eps
    values = [0.0, smallest, 2 * smallest, info.smallest_normal - smallest, info.smallest_normal]
    values += [1 - info.eps / 2, 1.0, 1 + info.eps, info.max, math.inf]
    return torch.tensor(values + [-value for value in values], dtype=torch.float64).to(dtype)


@every_selection
@every_dtype
@given(data=st.data())
def test_select_is_the_definition(select: Select, dtype: torch.dtype, data: st.DataObject) -> None:
    """Ties, zeros, denormals taken for zeros, −0 below +0, or an order of bit patterns that is not that of numbers."""
    values = special_values(dtype)
    picks = data.draw(st.lists(st.integers(0, values.numel() - 1), min_size=1, max_size=25))
    x = values[torch.tensor(picks)]
    n = x.numel()
    k = data.draw(st.one_of(st.sampled_from([0, 1, n - 1, n]), st.integers(0, n)))
    check(select, x, k)


@every_dtype
@pytest.mark.parametrize("n", [1, 2, 1000, 20_001])
def test_the_implementations_agree(dtype: torch.dtype, n: int) -> None:
    """Normal numbers (in the half types they are full of ties), quantised ones, and one value throughout."""
    normal = torch.randn(n)
    for x in (normal, (normal * 2).round(), torch.full((n,), -2.0), torch.zeros(n)):
        for k in {0, 1, n // 20, n // 2, n - 1, n}:
            expected = reference.select(x.to(dtype), k)
            assert torch.equal(cpu.select(x.to(dtype), k), expected), k
            assert (expected.diff() > 0).all()


@every_selection
@every_dtype
def test_indices_count_in_the_order_of_the_shape(select: Select, dtype: torch.dtype) -> None:
    """channels_last, transposed, strided and expanded tensors: their memory is ordered otherwise, or shared."""
    image = (torch.randn(3, 4, 5, 6) * 2).round().to(dtype)
    column = image[0, 0, :, :1]
    channels_last = image.to(memory_format=torch.channels_last)
    for view in (channels_last, image.permute(3, 2, 1, 0), image[:, 1::2, :, ::3], column.expand(5, 7)):
        assert not view.is_contiguous()
        for k in (1, view.numel() // 3, view.numel() - 1):
            check(select, view, k)


@every_selection
def test_parameters_and_scalars_can_be_selected_from(select: Select) -> None:
    """numpy refuses tensors that require a gradient; a scalar parameter has no dimension. The input stays as it is."""
    parameter = torch.nn.Parameter(torch.tensor([[1.0, -3.0], [2.0, -0.0]]))
    before = parameter.detach().clone()
    check(select, parameter, 2)
    assert torch.equal(parameter, before) and parameter.signbit().tolist() == before.signbit().tolist()
    check(select, torch.tensor(-2.0), 1)
    check(select, torch.tensor(-2.0), 0)


@every_selection
@every_dtype
def test_nan_counts_as_the_largest(select: Select, dtype: torch.dtype) -> None:
    """The LMO of a gradient with NaN anywhere must hold one, so the selection must not drop it."""
    x = torch.tensor([1.0, math.inf, -math.nan, 2.0], dtype=dtype)
    assert select(x, 1).tolist() == [2]
