"""Sums over the shards of several tensors, and how a tensor is divided; tests/multiprocess has several ranks."""

from __future__ import annotations

import pytest
import torch

from sfw_dist.ops.partition import Partition
from sfw_dist.ops.shards import Shards


def _indices() -> torch.Tensor:
    return torch.zeros(0, dtype=torch.int64)


def test_parts_are_those_of_all_ranks_in_order() -> None:
    """Fails when replicas count twice, a rank without entries has a part, or two ranks count one part."""
    places = [(4, 2, 0), (0, 4, 0), (0, 4, 0), (6, 0, 0)]
    found = [Partition.of_places("w", 6, places, rank, _indices) for rank in range(4)]
    assert all(partition.parts == ((0, 4), (4, 2)) and not partition.interleaved for partition in found)
    assert [partition.own for partition in found] == [1, 0, 0, None]
    assert [partition.is_primary for partition in found] == [True, True, False, False]
    columns = Partition.of_places("w", 6, [(0, 3, 1), (1, 3, 1)], 1, _indices)
    assert columns.interleaved and columns.indices is _indices and columns.own == 1


@pytest.mark.parametrize("places", [[(0, 3, 0), (4, 2, 0)], [(0, 4, 0), (3, 2, 0)], [(0, 4, 0), (3, 3, 0)]])
def test_entries_that_are_missing_or_held_twice_are_told(places: list[tuple[int, int, int]]) -> None:
    """Fails when a layout that is not understood gives wrong masks instead of an error."""
    with pytest.raises(ValueError, match=r"w has 6 entries, and the ranks hold .*: all ranks together must hold each"):
        Partition.of_places("w", 6, places, 0, _indices)


def test_the_first_tensor_with_an_entry_is_found() -> None:
    """Fails when an error names another tensor than the first, or one that is right."""
    shards = Shards({"a": torch.zeros(2, 2), "b": torch.tensor([[1.0, torch.nan]]), "c": torch.tensor([torch.nan])})
    assert shards.first_with(torch.isnan) == "b"
    assert shards.first_with(torch.isinf) is None
