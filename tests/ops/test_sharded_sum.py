"""Sums over divided tensors: to the bit those of whole ones where parts begin at rows, to rounding elsewhere."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sfw_dist.ops.pairwise_sum import ROW, absolute_sum, inner_product, squared_norm, tree_sum
from sfw_dist.ops.partition import Partition
from sfw_dist.ops.sharded_sum import ShardedSums, begins_at_rows, partial_sums, slots

CPU = torch.device("cpu")
TERMS = (lambda x, y: x.double().square(), lambda x, y: x.double() * y.double())


def totals(tensors: Sequence[tuple[Tensor, Tensor]], edges: Sequence[Sequence[int]], seed: int = 0) -> Tensor:
    """What four ranks make of their messages, added in a random order; they must all find the same."""
    found, messages = [], []
    for rank in range(4):
        partitions, contributions = [], []
        for (x, y), at in zip(tensors, edges, strict=True):
            parts = tuple((a, b - a) for a, b in itertools.pairwise(at) if a < b)
            start, stop = at[rank], at[rank + 1]
            own = parts.index((start, stop - start)) if start < stop else None
            partition = Partition(x.numel(), parts, own, own is not None)
            partitions.append(partition)
            contributions.append(partial_sums(partition, TERMS, x[start:stop], y[start:stop]) if start < stop else None)
        sums = ShardedSums(partitions, CPU)
        found.append(sums)
        messages.append(sums.message(len(TERMS), contributions))
    random.Random(seed).shuffle(messages)
    heard = torch.stack(messages).sum(0)
    results = [sums.totals(heard) for sums in found]
    assert all(torch.equal(a, b) or (a.isnan() == b.isnan()).all() for a, b in itertools.pairwise(results))
    return results[0]


def expected(tensors: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    return torch.stack(
        [torch.stack([squared_norm(x) for x, _ in tensors]), torch.stack([inner_product(*t) for t in tensors])]
    )


def made(sizes: Sequence[int], seed: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(n, generator=generator), torch.randn(n, generator=generator)) for n in sizes]


@given(st.lists(st.integers(1, 5 * ROW), min_size=1, max_size=4), st.data())
def test_parts_that_begin_at_rows_give_the_bits_of_one_process(sizes: list[int], data: st.DataObject) -> None:
    """Fails when a rank's rows land in another's place, or a tree has another shape than over the whole tensor."""
    edges = []
    for n in sizes:
        at = data.draw(st.lists(st.integers(0, n // ROW), min_size=3, max_size=3))
        edges.append([0, *sorted(row * ROW for row in at), n])
    tensors = made(sizes, data.draw(st.integers(0, 2**32 - 1)))
    assert torch.equal(totals(tensors, edges), expected(tensors))


@given(st.lists(st.integers(1, 3 * ROW), min_size=1, max_size=3), st.data())
def test_parts_that_begin_anywhere_give_the_sums_up_to_rounding(sizes: list[int], data: st.DataObject) -> None:
    """Fails when a part is left out or counted twice, or the result depends on the order of the messages."""
    edges = [[0, *sorted(data.draw(st.lists(st.integers(0, n), min_size=3, max_size=3))), n] for n in sizes]
    seed = data.draw(st.integers(0, 2**32 - 1))
    tensors = made(sizes, seed)
    found = totals(tensors, edges, seed)
    assert torch.equal(found, totals(tensors, edges, seed + 1))
    torch.testing.assert_close(found, expected(tensors), rtol=1e-12, atol=1e-9)


def test_interleaved_parts_are_added_in_their_order() -> None:
    """Fails when a part that has no rows of its own is put among rows."""
    x = torch.randn(2 * ROW)
    places = [slice(0, None, 2), slice(1, None, 2)]
    parts = ((0, ROW), (1, ROW))
    total = torch.zeros(1, 2, dtype=torch.float64)
    for own, place in enumerate(places):
        partition = Partition(2 * ROW, parts, own, True, True)
        assert not begins_at_rows(partition) and slots(partition) == 2
        total += partial_sums(partition, [lambda a: a.double().abs()], x[place])
    assert torch.equal(tree_sum(total, 1)[0], tree_sum(torch.stack([absolute_sum(x[place]) for place in places])))


def test_only_the_primary_of_a_replicated_part_counts() -> None:
    """Fails when ranks that hold the same entries add them twice."""
    partition = Partition(10, ((0, 10),), 0, is_primary=False)
    assert not partial_sums(partition, TERMS, torch.ones(10), torch.ones(10)).any()


@pytest.mark.parametrize("n", [64, 3 * ROW])
def test_nan_arrives(n: int) -> None:
    """Fails when what is not finite is lost on the way, and a step goes on with it."""
    x = torch.ones(n)
    x[n // 2] = torch.nan
    assert totals([(x, x)], [[0, n // 3, n // 3, 2 * n // 3, n]]).isnan().all()
