"""Masks: which entries of each parameter are kept, chosen by scores.

Entries of a tensor are counted in row-major order of its shape, tensors in the order of ``named_parameters``; of equal
scores the first are kept. So every mask is a subset of the mask of any lower sparsity.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sfw_dist.errors import UserError
from sfw_dist.ops.pairwise_sum import tree_sum
from sfw_dist.ops.topk import select
from sfw_dist.pruning.result import Pruning
from sfw_dist.pruning.sparsities import removed_count


@dataclass(frozen=True, eq=False)
class Masks(Pruning, Mapping[str, Tensor]):
    """One bool tensor for each prunable parameter, by name: of its shape, on its device, True where an entry is kept.

    Attributes:
        tensors: the masks.
        skipped: the parameters that the granularity (2:4, filter) does not fit; their masks keep everything.

    Example:
        >>> masks = Masks({"weight": torch.tensor([True, False, False, True])})
        >>> masks.kept, masks.total, masks.sparsity
        (2, 4, 0.5)
    """

    tensors: Mapping[str, Tensor]
    skipped: tuple[str, ...] = ()

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)

    @property
    def counts(self) -> dict[str, tuple[int, int]]:
        """For each parameter its number of entries, and how many of them are kept."""
        return {name: (mask.numel(), int(mask.count_nonzero())) for name, mask in self.items()}

    @property
    def ranks(self) -> dict[str, int]:
        """Empty: masks do not describe a rank."""
        return {}

    def changed(self) -> Iterable[str]:
        """All prunable parameters."""
        return self.tensors

    def pruned(self, name: str, parameter: Tensor) -> Tensor:
        """The parameter with zeros where the mask is False."""
        return torch.where(self[name], parameter, 0)  # a product with the mask would leave negative zeros


def global_masks(scores: Mapping[str, Tensor], sparsity: float) -> dict[str, Tensor]:
    """Keep the entries of largest score over all tensors together.

    Args:
        scores: by name, any shapes, finite or infinite, without NaN.
        sparsity: fraction to remove, in [0, 1).

    Returns:
        Bool masks by name, ``removed_count(sparsity, N)`` entries of all N being False.
    """
    # Scores of different types are compared in their common type, which holds the values of each exactly.
    flat = torch.cat([score.flatten() for score in scores.values()])
    parts = _keep_largest(flat, sparsity).split([score.numel() for score in scores.values()])
    # Cloned: a view would make every saved mask carry the masks of the whole model.
    return {name: part.view(score.shape).clone() for (name, score), part in zip(scores.items(), parts, strict=True)}


def layerwise_masks(scores: Mapping[str, Tensor], sparsity: float) -> dict[str, Tensor]:
    """Keep the entries of largest score of each tensor; arguments and answer as for :func:`global_masks`."""
    return {name: _keep_largest(score, sparsity) for name, score in scores.items()}


def two_of_four_mask(scores: Tensor) -> Tensor:
    """Keep the 2 largest of every 4 consecutive input channels.

    Sparse tensor cores skip zeros along the dimension that they sum over, whose fastest index is the input channel when
    images are channels_last: (out, *kernel, in).

    Args:
        scores: ``(out, in, *kernel)``, ``in`` a multiple of 4.

    Returns:
        A bool mask of that shape.
    """
    channels_last = scores.movedim(1, -1)
    fours = channels_last.reshape(-1, 4)
    largest = fours.sort(dim=1, descending=True, stable=True).indices[:, :2]
    mask = torch.zeros_like(fours, dtype=torch.bool).scatter_(1, largest, True)
    return mask.view(channels_last.shape).movedim(-1, 1).contiguous()


def filter_masks(scores: Mapping[str, Tensor], sparsity: float, groups: Iterable[Sequence[str]]) -> dict[str, Tensor]:
    """Keep whole filters, those whose entries have the largest root mean square score.

    Filters of different layers have different sizes, so that norms would favour wide ones; root mean squares compare as
    the scores of single entries do. Within a layer their order is that of the norms.

    Args:
        scores: by name, ``(out, ...)``, not negative, without NaN.
        sparsity: fraction of the filters to remove, in [0, 1). Each tensor keeps its first largest filter all the same.
        groups: the names of the tensors whose filters are ranked together, group by group.

    Returns:
        Bool masks by name, of the scores' shapes.
    """
    masks: dict[str, Tensor] = {}
    largest = max((float(x.max()) for x in scores.values()), default=0.0)
    # A power of two changes no bit of a comparison, and keeps squares from overflowing or vanishing.
    exponent = math.frexp(largest)[1] if math.isfinite(largest) else 0
    for names in groups:
        sizes = [_filter_sizes(name, scores[name], exponent) for name in names]
        kept = _keep_filters(torch.cat(sizes), sparsity).split([len(of_tensor) for of_tensor in sizes])
        for name, filters in zip(names, kept, strict=True):
            shape = scores[name].shape
            masks[name] = filters.view(-1, *[1] * (len(shape) - 1)).expand(shape).clone()
    return masks


def _filter_sizes(name: str, scores: Tensor, exponent: int) -> Tensor:
    """Root mean squares over 2^exponent, float64 ``(out,)``; infinite for the first of the largest, which stays."""
    if (scores < 0).any():
        raise UserError(
            f"scores[{name!r}] has negative entries, and filters are ranked by root mean squares: give numbers of at "
            "least 0"
        )
    squares = (scores.double() * 2.0**-exponent).square().flatten(1)
    sizes = (tree_sum(squares, 1) / squares.shape[1]).sqrt()
    return sizes.index_fill(0, select(sizes, 1), torch.inf)


def _keep_filters(sizes: Tensor, sparsity: float) -> Tensor:
    mask = torch.zeros(len(sizes), dtype=torch.bool, device=sizes.device)
    kept = len(sizes) - removed_count(sparsity, len(sizes))
    mask[select(sizes, max(kept, int(sizes.isinf().sum())))] = True
    return mask


def _keep_largest(scores: Tensor, sparsity: float) -> Tensor:
    """A bool mask of the scores' shape, exactly ``removed_count(sparsity, N)`` entries of which are False."""
    n = scores.numel()
    mask = torch.zeros(n, dtype=torch.bool, device=scores.device)
    mask[_largest(scores, n - removed_count(sparsity, n))] = True
    return mask.view(scores.shape)


def _largest(scores: Tensor, k: int) -> Tensor:
    """Flat indices of the ``k`` largest; of equal ones the first."""
    if (scores < 0).any():  # `select` compares absolute values
        return scores.flatten().sort(descending=True, stable=True).indices[:k]
    return select(scores, k)
