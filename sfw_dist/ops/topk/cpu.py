"""Selection on CPU: numpy's vectorised quickselect finds the K-th magnitude, then one scan takes what reaches it.

A K-th magnitude by ``torch.topk`` of 5 % of 2.36 M entries takes 33-40 ms on two cores, ``numpy.partition`` 2.1 ms.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

# Magnitudes are compared as integers: the bit patterns of |x| are ordered as |x| is, numpy partitions integers faster
# than floats (2.1 against 3.3 ms for 2.36 M), and bf16 has no numpy type at all.
_BITS = {
    torch.float64: torch.int64,
    torch.float32: torch.int32,
    torch.float16: torch.int16,
    torch.bfloat16: torch.int16,
}


def select(x: Tensor, k: int) -> Tensor:
    """See :func:`sfw_dist.ops.topk.select`."""
    n = x.numel()
    if k == n or k == 0:
        return torch.arange(k)
    keys = x.detach().abs().contiguous().flatten().view(_BITS[x.dtype]).numpy()
    kth = np.partition(keys, n - k)[n - k]
    chosen = np.flatnonzero(keys >= kth)
    if chosen.size > k:  # more entries tie at the K-th magnitude than are wanted: drop the last of them
        ties = np.flatnonzero(keys[chosen] == kth)
        chosen = np.delete(chosen, ties[k - chosen.size :])
    return torch.from_numpy(chosen)
