"""Masks: which entries of each parameter are kept, chosen by scores.

Entries of a tensor are counted in row-major order of its shape, tensors in the order of ``named_parameters``; of equal
scores the first are kept. So every mask is a subset of the mask of any lower sparsity.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from sfw_dist.distributed.dtensor import Block, entries_as, full_tensor, has_whole_rows, to_local, wrapped_as
from sfw_dist.errors import UserError
from sfw_dist.ops.pairwise_sum import tree_sum
from sfw_dist.ops.shards import Shards
from sfw_dist.ops.topk import select
from sfw_dist.pruning.result import Pruning
from sfw_dist.pruning.sharded_masks import keep_largest
from sfw_dist.pruning.sparsities import removed_count


@dataclass(frozen=True, eq=False)
class Masks(Pruning, Mapping[str, Tensor]):
    """One bool tensor for each prunable parameter, by name: of its shape, on its device, True where an entry is kept.

    The mask of a DTensor is one of the same placements. Counts are those of whole tensors; where masks are DTensors
    they are taken when this is made, which is collective, and reading them is not.

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
    _kept: Mapping[str, int] | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        if any(isinstance(mask, DTensor) for mask in self.tensors.values()):
            shards = Shards(self.tensors)
            kept = shards.each(lambda name: shards.local[name].count_nonzero()[None])
            object.__setattr__(self, "_kept", {name: int(count) for name, count in kept.items()})

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)

    @property
    def counts(self) -> dict[str, tuple[int, int]]:
        """For each parameter its number of entries, and how many of them are kept."""
        kept = {name: int(mask.count_nonzero()) for name, mask in self.items()} if self._kept is None else self._kept
        return {name: (mask.numel(), kept[name]) for name, mask in self.items()}

    @property
    def ranks(self) -> dict[str, int]:
        """Empty: masks do not describe a rank."""
        return {}

    def changed(self) -> Iterable[str]:
        """All prunable parameters but those skipped."""
        return [name for name in self.tensors if name not in self.skipped]

    def shape(self, name: str) -> torch.Size:
        """Of a prunable parameter."""
        return self[name].shape

    def pruned(self, name: str, parameter: Tensor) -> Tensor:
        """The parameter with zeros where the mask is False."""
        # A product with the mask would leave negative zeros.
        kept = torch.where(entries_as(self[name], parameter), to_local(parameter), 0)
        return wrapped_as(kept, parameter)


def global_masks(scores: Mapping[str, Tensor], sparsity: float) -> dict[str, Tensor]:
    """Keep the entries of largest score over all tensors together.

    Args:
        scores: by name, any shapes, finite or infinite, without NaN. With DTensors among them this is collective; no
            tensor is gathered, and the masks are those of the whole tensors, to the bit.
        sparsity: fraction to remove, in [0, 1).

    Returns:
        Bool masks by name, ``removed_count(sparsity, N)`` entries of all N being False. They lie as the scores do.
    """
    total = sum(score.numel() for score in scores.values())
    if _apart(scores):
        return keep_largest(scores, [list(scores)], [total - removed_count(sparsity, total)])
    # Scores of different types are compared in their common type, which holds the values of each exactly.
    flat = torch.cat([score.flatten() for score in scores.values()])
    parts = _keep_largest(flat, sparsity).split([score.numel() for score in scores.values()])
    # Cloned: a view would make every saved mask carry the masks of the whole model.
    return {name: part.view(score.shape).clone() for (name, score), part in zip(scores.items(), parts, strict=True)}


def layerwise_masks(scores: Mapping[str, Tensor], sparsity: float) -> dict[str, Tensor]:
    """Keep the entries of largest score of each tensor; arguments and answer as for :func:`global_masks`."""
    if any(isinstance(score, DTensor) for score in scores.values()):
        kept = [score.numel() - removed_count(sparsity, score.numel()) for score in scores.values()]
        return keep_largest(scores, [[name] for name in scores], kept)
    return {name: _keep_largest(score, sparsity) for name, score in scores.items()}


def two_of_four_mask(scores: Tensor) -> Tensor:
    """Keep the 2 largest of every 4 consecutive input channels.

    Sparse tensor cores skip zeros along the dimension that they sum over, whose fastest index is the input channel when
    images are channels_last: (out, *kernel, in).

    Args:
        scores: ``(out, in, *kernel)``, ``in`` a multiple of 4. A DTensor that is cut along another dimension than
            ``out`` is gathered, which is collective and takes its memory on every rank.

    Returns:
        A bool mask of that shape, which lies as the scores do.
    """
    if isinstance(scores, DTensor):
        if has_whole_rows(scores):
            return wrapped_as(_two_of_four(scores.to_local()), scores)
        return wrapped_as(entries_as(_two_of_four(scores.full_tensor()), scores).clone(), scores)
    return _two_of_four(scores)


def filter_masks(scores: Mapping[str, Tensor], sparsity: float, groups: Iterable[Sequence[str]]) -> dict[str, Tensor]:
    """Keep whole filters, those whose entries have the largest root mean square score.

    Filters of different layers have different sizes, so that norms would favour wide ones; root mean squares compare as
    the scores of single entries do. Within a layer their order is that of the norms.

    Args:
        scores: by name, ``(out, ...)``, not negative, without NaN. With DTensors among them this is collective; those
            whose filters are cut are gathered, one at a time, because a sum's rounding depends on the order.
        sparsity: fraction of the filters to remove, in [0, 1). Each tensor keeps its first largest filter all the same.
        groups: the names of the tensors whose filters are ranked together, group by group.

    Returns:
        Bool masks by name, of the scores' shapes; they lie as the scores do.
    """
    masks: dict[str, Tensor] = {}
    groups = list(groups)
    found = _filter_sizes({name: scores[name] for names in groups for name in names})
    for names in groups:
        sizes = [found[name] for name in names]
        kept = _keep_filters(torch.cat([x.to(sizes[0].device) for x in sizes]), sparsity)
        for name, filters in zip(names, kept.split([len(of_tensor) for of_tensor in sizes]), strict=True):
            score = scores[name]
            whole = filters.to(score.device).view(-1, *[1] * (score.ndim - 1)).expand(score.shape)
            masks[name] = wrapped_as(entries_as(whole, score).clone(), score)
    return masks


def _apart(scores: Mapping[str, Tensor]) -> bool:
    """Whether the scores cannot be put into one tensor: some are divided, or they lie on several devices."""
    devices = {score.device for score in scores.values()}
    return len(devices) > 1 or any(isinstance(score, DTensor) for score in scores.values())


def _two_of_four(scores: Tensor) -> Tensor:
    channels_last = scores.movedim(1, -1)
    fours = channels_last.reshape(-1, 4)
    largest = fours.sort(dim=1, descending=True, stable=True).indices[:, :2]
    mask = torch.zeros_like(fours, dtype=torch.bool).scatter_(1, largest, True)
    return mask.view(channels_last.shape).movedim(-1, 1).contiguous()


def _filter_sizes(scores: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Root mean squares up to a common factor, float64 ``(out,)``; infinite for each first of the largest, which stays.

    Every rank has those of whole tensors.
    """
    shards = Shards(scores)
    negative = shards.first_with(lambda x: x < 0)
    if negative is not None:
        raise UserError(
            f"scores[{negative!r}] has negative entries, and filters are ranked by root mean squares: give numbers of "
            "at least 0"
        )
    tops = shards.each(lambda name: _largest_entry(shards.local[name]), dist.ReduceOp.MAX)
    largest = max((float(top) for top in tops.values()), default=0.0)
    # A power of two changes no bit of a comparison, and keeps squares from overflowing or vanishing.
    exponent = math.frexp(largest)[1] if math.isfinite(largest) else 0
    cut = [name for name, score in scores.items() if isinstance(score, DTensor) and not has_whole_rows(score)]
    gathered = {name: _row_means(full_tensor(scores[name].detach()), exponent) for name in cut}
    rows = Shards({name: score for name, score in scores.items() if name not in gathered})
    means = gathered | rows.each(lambda name: _own_row_means(scores[name].detach(), exponent))
    # The roots of all rows at once, as one process takes them: vectorised, a root's last bit may depend on its place.
    sizes = {name: means[name].sqrt() for name in scores}
    return {name: size.index_fill(0, select(size, 1), torch.inf) for name, size in sizes.items()}


def _largest_entry(scores: Tensor) -> Tensor:
    """In float64, ``(1,)``; 0 where there is none."""
    return scores.double().amax()[None] if scores.numel() else scores.new_zeros(1, dtype=torch.float64)


def _row_means(scores: Tensor, exponent: int) -> Tensor:
    """The mean of the squares over 4^exponent of each row, float64 ``(out,)``."""
    squares = (scores.double() * 2.0**-exponent).square().flatten(1)
    return tree_sum(squares, 1) / squares.shape[1]


def _own_row_means(scores: Tensor, exponent: int) -> Tensor:
    """As :func:`_row_means`, with zeros in the rows that other ranks hold."""
    if not isinstance(scores, DTensor):
        return _row_means(scores, exponent)
    block, local = Block.of(scores), scores.to_local()
    means = torch.zeros(len(scores), dtype=torch.float64, device=local.device)
    means[block.offsets[0] : block.offsets[0] + block.sizes[0]] = _row_means(local, exponent)
    return means


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
