"""Boxes of a tensor's entries: which they are, and whether they follow each other."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from sfw_dist.distributed.dtensor import Block

sizes = st.lists(st.integers(1, 5), min_size=0, max_size=4)


@given(sizes, st.data())
def test_a_blocks_indices_are_those_of_its_entries(shape: list[int], data: st.DataObject) -> None:
    """Fails when an entry is looked for in another place of the whole tensor than where it is."""
    offsets, extents = [], []
    for size in shape:
        offsets.append(data.draw(st.integers(0, size - 1)))
        extents.append(data.draw(st.integers(0, size - offsets[-1])))
    block = Block(torch.Size(shape), tuple(offsets), tuple(extents))
    whole = torch.arange(block.shape.numel()).view(shape)
    taken = block.of_whole(whole).reshape(-1)
    assert torch.equal(block.indices(), taken) and block.length == len(taken)
    if len(taken):
        assert block.first == taken[0]
        assert block.contiguous == bool((taken.diff() == 1).all())
    else:
        assert block.contiguous
