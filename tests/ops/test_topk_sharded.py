"""Selection over ranks, played by threads of one process: the entries that a selection of the whole tensor takes."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sfw_dist.distributed.coalesced import run_coalesced
from sfw_dist.ops.partition import Partition
from sfw_dist.ops.topk import reference
from sfw_dist.ops.topk.sharded import select_sharded

CPU = torch.device("cpu")
EXTREMES = [0.0, -0.0, 1e-45, -1e-45, 1e-38, 1.0, -1.0, 1.0000001, 3e38, -3e38]
numbers = st.sampled_from(EXTREMES) | st.floats(-10, 10, width=32)


def on_ranks(world_size: int, work: Callable[[int, Callable[[Tensor], None]], Any]) -> tuple[list[Any], int]:
    """What each rank's ``work`` returns, and in how many messages."""
    barrier, said, found = threading.Barrier(world_size), [None] * world_size, [None] * world_size
    messages = [0]

    def run(rank: int) -> None:
        def add_up(words: Tensor) -> None:
            said[rank] = words.clone()  # type: ignore[call-overload]
            barrier.wait(30)
            words.copy_(torch.stack(said).sum(0, dtype=torch.int32))  # type: ignore[arg-type]
            messages[0] += rank == 0
            barrier.wait(30)

        found[rank] = work(rank, add_up)

    threads = [threading.Thread(target=run, args=[rank]) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found, messages[0]


def selected(x: Tensor, k: int, places: list[Tensor], *, interleaved: bool) -> tuple[list[int], int]:
    """Indices of the whole that the ranks select, ascending; ``places``: where each rank's entries lie."""
    parts = tuple((int(place[0]), len(place)) for place in places if len(place))

    def work(rank: int, all_reduce: Callable[[Tensor], None]) -> list[int]:
        mine = places[rank]
        own = parts.index((int(mine[0]), len(mine))) if len(mine) else None
        partition = Partition(len(x), parts, own, own is not None, interleaved, lambda: mine)
        task = select_sharded([k], [partition], [x[mine] if len(mine) else None], x.dtype, CPU)
        (chosen,) = run_coalesced([task], all_reduce)[0]
        return [] if chosen is None else mine[chosen & (x[mine] != 0)].tolist()

    found, messages = on_ranks(len(places), work)
    return sorted(i for indices in found for i in indices), messages


def expected(x: Tensor, k: int) -> list[int]:
    return [i for i in reference.select(x, k).tolist() if x[i] != 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@given(data=st.data())
def test_parts_that_follow_each_other(dtype: torch.dtype, data: st.DataObject) -> None:
    """Fails when ties, zeros, denormals or the largest numbers are selected otherwise than in one process."""
    x = torch.tensor(data.draw(st.lists(numbers, min_size=1, max_size=40)), dtype=torch.float64).to(dtype)
    k = data.draw(st.integers(1, len(x)))
    edges = [0, *sorted(data.draw(st.lists(st.integers(0, len(x)), min_size=2, max_size=2))), len(x)]
    places = [torch.arange(a, b) for a, b in itertools.pairwise(edges)]
    found, messages = selected(x, k, places, interleaved=False)
    assert found == expected(x, k)
    assert messages == (3 if dtype == torch.float32 else 6)


@given(data=st.data())
def test_parts_that_interleave(data: st.DataObject) -> None:
    """Fails when ties go to a part's lowest index instead of the whole tensor's."""
    x = torch.tensor(data.draw(st.lists(numbers, min_size=1, max_size=40)), dtype=torch.float64).float()
    k = data.draw(st.integers(1, len(x)))
    owner = torch.tensor(data.draw(st.lists(st.integers(0, 2), min_size=len(x), max_size=len(x))))
    found, messages = selected(x, k, [(owner == rank).nonzero().view(-1) for rank in range(3)], interleaved=True)
    assert found == expected(x, k)
    magnitudes = x.abs().sort(descending=True).values
    tied = k < len(x) and magnitudes[k - 1] == magnitudes[k] != 0
    assert messages == (6 if tied else 3)


def test_ranks_that_hold_the_same_entries_select_the_same() -> None:
    """Fails when a replicated part is counted twice."""
    x = torch.arange(1.0, 11.0)
    halves = [slice(0, 5), slice(5, 10)]

    def work(rank: int, all_reduce: Callable[[Tensor], None]) -> list[int]:
        partition = Partition(10, ((0, 5), (5, 5)), rank // 2, is_primary=rank % 2 == 0)
        task = select_sharded([7], [partition], [x[halves[rank // 2]]], x.dtype, CPU)
        (chosen,) = run_coalesced([task], all_reduce)[0]
        return (5 * (rank // 2) + chosen.nonzero().view(-1)).tolist()

    found, _ = on_ranks(4, work)
    assert found == [[3, 4], [3, 4], [5, 6, 7, 8, 9], [5, 6, 7, 8, 9]]
