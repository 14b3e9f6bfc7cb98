"""Sums of tensors that are cut anywhere: to the bit those of whole ones, whoever adds up the messages."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sfw_dist.ops.pairwise_sum import LANES, ROW, absolute_sum, inner_product, row_sums, squared_norm, tree_sum
from sfw_dist.ops.sharded_sum import Cut, CutSums, Piece

CPU = torch.device("cpu")
TERMS = (lambda x, y: x.double().square(), lambda x, y: x.double() * y.double())
NEAR_A_ROW = [1, 2, LANES - 1, LANES, LANES + 1, 100, ROW - 1, ROW, ROW + 1, 2 * ROW, 2 * ROW + 5000]


def said(tensors: Sequence[tuple[Tensor, Tensor]], edges: Sequence[Sequence[int]], rank: int) -> tuple[CutSums, Tensor]:
    """What one rank says; its part of tensor j is what lies between ``edges[j][rank]`` and the next."""
    cuts: list[Cut] = []
    pieces: list[Piece | None] = []
    for (x, y), at in zip(tensors, edges, strict=True):
        parts = [(a, b) for a, b in itertools.pairwise(at) if a < b]
        start, stop = at[rank], at[rank + 1]
        own = parts.index((start, stop)) if start < stop else None
        cuts.append(Cut(x.numel(), tuple(parts), own=own))
        pieces.append(None if own is None else (TERMS, (x[start:stop], y[start:stop])))
    sums = CutSums(cuts, CPU)
    return sums, sums.outgoing(len(TERMS), pieces)


@st.composite
def cut_tensors(draw: st.DrawFn) -> tuple[list[int], list[list[int]]]:
    """Lengths of some tensors, and where four ranks cut each."""
    sizes = draw(st.lists(st.sampled_from(NEAR_A_ROW) | st.integers(1, 3 * ROW), min_size=1, max_size=3))
    edges = [[0, *sorted(draw(st.lists(st.integers(0, n), min_size=3, max_size=3))), n] for n in sizes]
    return sizes, edges


@given(cut_tensors(), st.integers(0, 2**32 - 1))
def test_sums_do_not_depend_on_the_cuts(made: tuple[list[int], list[list[int]]], seed: int) -> None:
    """Fails when a subtree of a cut row is left out, sent twice, or added in another order than in a whole row."""
    sizes, edges = made
    generator = torch.Generator().manual_seed(seed)
    tensors = [(torch.randn(n, generator=generator), torch.randn(n, generator=generator)) for n in sizes]
    messages = [said(tensors, edges, rank) for rank in range(4)]
    random.Random(seed).shuffle(messages)  # as a backend may add them
    heard = torch.stack([words for _, words in messages]).sum(0, dtype=torch.int32)
    expected = [torch.stack([squared_norm(x) for x, _ in tensors]), torch.stack([inner_product(*t) for t in tensors])]
    for sums, _ in messages:
        assert torch.equal(sums.totals(len(TERMS), heard), torch.stack(expected))


def test_blocks_are_added_in_the_order_of_the_parts() -> None:
    """Fails when the sum of a tensor cut into blocks depends on which rank's message came first."""
    x = torch.randn(1000)
    parts = [x[0:300], x[300:301], x[301:]]
    messages = []
    for own, part in enumerate(parts):
        sums = CutSums([Cut(1000, (), blocks=3, own=own)], CPU)
        messages.append(sums.outgoing(1, [((lambda a: a.double().abs(),), (part,))]))
    heard = torch.stack(messages).sum(0, dtype=torch.int32)
    assert torch.equal(sums.totals(1, heard)[0], tree_sum(torch.stack([absolute_sum(p) for p in parts])).view(1))


@pytest.mark.parametrize("n", [64, 3 * ROW])
def test_infinities_and_nan_arrive(n: int) -> None:
    """Fails when what is not finite is lost on the way, and a step goes on with it."""
    x = torch.ones(n)
    x[n // 2] = torch.nan
    edges = [0, n // 3, n // 3, 2 * n // 3, n]
    messages = [said([(x, x)], [edges], rank) for rank in range(4)]
    heard = torch.stack([words for _, words in messages]).sum(0, dtype=torch.int32)
    assert messages[0][0].totals(2, heard).isnan().all()
    assert row_sums(lambda a: a.double(), x).isnan().any()


def test_a_cut_costs_ten_subtrees_a_side_at_most() -> None:
    """Fails when a rank sends the entries of its side instead of the sums it can make of them."""
    whole = CutSums([Cut(2 * ROW, ((0, 2 * ROW),), own=0)], CPU).outgoing(1, [None]).numel()
    for at in (1, 17, ROW // 2 + 3, ROW - 1):
        cut = CutSums([Cut(2 * ROW, ((0, at), (at, 2 * ROW)), own=0)], CPU).outgoing(1, [None]).numel()
        assert cut - whole <= 10 * LANES * 2  # two words a float64
