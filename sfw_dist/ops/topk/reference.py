"""The definition: a stable sort. O(n log n), any device, no host synchronisation."""

from __future__ import annotations

import torch
from torch import Tensor


def select(x: Tensor, k: int) -> Tensor:
    """See :func:`sfw_dist.ops.topk.select`."""
    order = torch.sort(x.detach().abs().flatten(), descending=True, stable=True).indices
    return order[:k].sort().values
