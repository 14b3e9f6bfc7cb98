"""The selection over shards, in one process that holds all of them; tests/multiprocess has several."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sfw_dist.pruning.granularity import Ranking
from sfw_dist.pruning.masks import global_masks, layerwise_masks
from sfw_dist.pruning.sharded_masks import keep_largest
from tests.support.pruning import removed_count, sparsities, tied_matrices


def _kept(scores: dict[str, Tensor], sparsity: float, ranking: Ranking) -> dict[str, Tensor]:
    rankings = [list(scores)] if ranking == "global" else [[name] for name in scores]
    totals = [sum(scores[name].numel() for name in names) for names in rankings]
    return keep_largest(scores, rankings, [n - removed_count(sparsity, n) for n in totals])


@pytest.mark.parametrize("ranking", get_args(Ranking))
@given(scores=tied_matrices(), sparsity=sparsities, absolute=st.booleans())
def test_it_is_the_selection_of_whole_tensors(
    ranking: Ranking, scores: list[Tensor], sparsity: float, absolute: bool
) -> None:
    """Fails when signs, types, ties or the numbers 0 and N of wanted entries go wrong in the counts by bits."""
    named = {str(i): score.abs() if absolute else score for i, score in enumerate(scores)}
    expected = {"global": global_masks, "layerwise": layerwise_masks}[ranking](named, sparsity)
    found = _kept(named, sparsity, ranking)
    assert list(found) == list(expected)
    assert all(found[name].equal(mask) for name, mask in expected.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_numbers_that_differ_in_any_bit_are_told_apart(dtype: torch.dtype) -> None:
    """Fails when a message leaves bits out, or -0 is less than 0."""
    largest = torch.finfo(dtype).max
    one = torch.ones((), dtype=dtype)
    values = torch.tensor([-torch.inf, -largest, -1.0, -1e-37, -0.0, 0.0, 1e-37, 1.0, largest, torch.inf]).to(dtype)
    values = torch.cat([values, torch.nextafter(one, 2 * one)[None], -torch.nextafter(one, 2 * one)[None]])
    values = values[torch.randperm(len(values), generator=torch.Generator().manual_seed(0))]
    order = values.sort(descending=True, stable=True).indices
    for kept in range(len(values) + 1):
        mask = keep_largest({"x": values}, [["x"]], [kept])["x"]
        assert set(mask.nonzero().flatten().tolist()) == set(order[:kept].tolist()), kept
