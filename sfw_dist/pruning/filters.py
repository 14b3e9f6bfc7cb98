"""Which whole filters stay: of a weight's first dimension, those of largest root mean square entry.

Filters of different layers have different sizes, so that norms would favour wide ones; the root mean square entry
compares as the magnitudes of single weights do. Within a layer the order is that of the norms.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from sfw_dist.ops.pairwise_sum import tree_sum
from sfw_dist.ops.topk import select


def kept_filters(
    weights: Mapping[str, Tensor], removed: Callable[[int], int], *, layerwise: bool = False
) -> dict[str, Tensor]:
    """By weight, bool ``(out,)``: whether each filter stays.

    Args:
        weights: ``(out, ...)``, at least one, without NaN.
        removed: how many of so many filters go: of all together or, with ``layerwise``, of each weight's. A weight's
            first largest filter stays even so. Of equal filters the first stay.
    """
    sizes = {name: _sizes(weight) for name, weight in weights.items()}
    if layerwise:
        return {name: _keep_largest(of_weight, removed(len(of_weight))) for name, of_weight in sizes.items()}
    together = torch.cat(list(sizes.values()))
    kept = _keep_largest(together, removed(len(together))).split([len(of_weight) for of_weight in sizes.values()])
    return dict(zip(sizes, kept, strict=True))


def _sizes(weight: Tensor) -> Tensor:
    """Root mean squares, float64 ``(out,)``; infinite for the first of the largest, which stays."""
    squares = weight.double().square().flatten(1)
    sizes = (tree_sum(squares, 1) / squares.shape[1]).sqrt()
    return sizes.index_fill(0, select(sizes, 1), torch.inf)


def _keep_largest(sizes: Tensor, removed: int) -> Tensor:
    mask = torch.zeros(len(sizes), dtype=torch.bool, device=sizes.device)
    mask[select(sizes, max(len(sizes) - removed, int(sizes.isinf().sum())))] = True
    return mask
