"""The norm of the K largest entries, summed in a way that ranks which share a tensor can follow to the bit.

Nobody knows the selected entries before the last message of a selection; a message more would be needed to add their
squares. But magnitudes that agree with the K-th in all but their last 7 bits are counted in that message one by one,
so that their squares follow from the counts, and those above are known before it. So the sum is made of two: a tree
over all entries, with zeros for those that are not above, and a tree over the 2^7 magnitudes that the last bits make.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sfw_dist.ops.pairwise_sum import squared_norm, tree_sum

INTEGERS = {torch.float32: torch.int32, torch.float64: torch.int64}
"""Whose order is that of magnitudes."""
LAST_BITS = 7


def squared_norm_of_kept(x: Tensor, indices: Tensor) -> Tensor:
    """``Σ x_i²`` over ``indices``, the K largest of ``x`` ``(n,)``, float32 or float64; a float64 scalar."""
    values = x[indices]
    keys = values.abs().view(INTEGERS[x.dtype]).long()
    kth = keys.min()
    prefix = kth >> LAST_BITS
    beside = (keys >> LAST_BITS) == prefix
    above = torch.zeros_like(x).index_copy_(0, indices, torch.where(beside, 0, values))
    counts = torch.zeros(2**LAST_BITS, dtype=torch.int64, device=x.device)
    counts.scatter_add_(0, keys & (2**LAST_BITS - 1), beside.long())
    return squared_norm(above) + _squares(counts[None], prefix[None], x.dtype)[0]


def kept_beside_the_kth(counts: Tensor, last: Tensor, left: Tensor, prefix: Tensor, dtype: torch.dtype) -> Tensor:
    """``Σ x_i²`` over the selected entries whose leading bits are ``prefix``, float64 ``(tensors,)``.

    Args:
        counts: int64 ``(tensors, 2^7)``, of all such entries by their last bits.
        last, left: bin of the K-th magnitude, and how many of the entries in it are selected, ``(tensors,)``.
    """
    bins = torch.arange(counts.shape[1], device=counts.device)
    selected = torch.where(bins > last[:, None], counts, torch.where(bins == last[:, None], left[:, None], 0))
    return _squares(selected, prefix, dtype)


def _squares(counts: Tensor, prefix: Tensor, dtype: torch.dtype) -> Tensor:
    bins = torch.arange(counts.shape[1], device=counts.device)
    magnitudes = ((prefix[:, None] << LAST_BITS) | bins).to(INTEGERS[dtype]).view(dtype).double()
    return tree_sum(torch.where(counts > 0, magnitudes.square() * counts, 0), 1)
