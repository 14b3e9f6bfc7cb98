"""Granularities: what is removed as one piece, and how the pieces are ranked against each other.

Each granularity answers for itself: which rankings and sparsities it takes, what it leaves alone, and how it prunes. To
add one, write a class here, list it in ``GRANULARITIES`` and add its name to `GranularityName`.

Whole filters and weights of low rank are what Zimmer, Spiegel, Pokutta, arXiv 2205.11921, remove from networks trained
in the sets of :mod:`sfw_dist.constraints.matrix`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from sfw_dist.errors import UserError
from sfw_dist.ops.shards import Shards
from sfw_dist.pruning.low_rank import Factors
from sfw_dist.pruning.masks import Masks, filter_masks, global_masks, layerwise_masks, two_of_four_mask
from sfw_dist.pruning.result import Pruning
from sfw_dist.pruning.scope import weights
from sfw_dist.pruning.sparsities import removed_count

GranularityName = Literal["weight", "2:4", "filter", "rank"]
Ranking = Literal["global", "layerwise"]
"""``global``: the pieces of all layers are ranked together; ``layerwise``: those of each layer by themselves."""


@dataclass(frozen=True)
class Prunable:
    """The model that is pruned, and its prunable parameters by name."""

    model: nn.Module
    parameters: Mapping[str, nn.Parameter]

    def forward_weights(self) -> list[str]:
        """The prunable weights of the shape ``(out, in, *kernel)``, each once."""
        names = dict.fromkeys(name for name, _ in weights(self.model, forward=True))
        return [name for name in names if name in self.parameters]


class Granularity(ABC):
    """What is removed as one piece.

    Attributes:
        name: its name in the configuration, on command lines and in ``prune``.
        only_sparsity: the one sparsity that it takes; ``None``: it takes any.
    """

    name: ClassVar[GranularityName]
    only_sparsity: ClassVar[float | None] = None

    def check(self, ranking: Ranking, criterion: str, own_scores: bool = False) -> None:  # noqa: B027
        """Raise :class:`UserError` for a combination without a meaning.

        Args:
            ranking: how pieces are ranked.
            criterion: what scores the entries.
            own_scores: whether the user's scores stand in for the criterion.
        """

    @abstractmethod
    def cutter(
        self, target: Prunable, ranking: Ranking, scores: Callable[[], Mapping[str, Tensor]]
    ) -> Callable[[float], Pruning]:
        """Compute what serves all sparsities, once; the answer prunes to any of them.

        Args:
            target: what is pruned; it does not change.
            ranking: how pieces are ranked.
            scores: gives a score to each entry of each prunable parameter; the largest are kept.
        """


class WeightGranularity(Granularity):
    """Single entries. Of N, ``removed_count(sparsity, N)`` go: of all together, or of each parameter's.

    No DTensor is gathered.
    """

    name = "weight"

    def cutter(
        self, target: Prunable, ranking: Ranking, scores: Callable[[], Mapping[str, Tensor]]
    ) -> Callable[[float], Pruning]:
        entries = scores()
        masks = {"global": global_masks, "layerwise": layerwise_masks}[ranking]
        return lambda sparsity: Masks(masks(entries, sparsity))


class TwoOfFourGranularity(Granularity):
    """Two of every four consecutive input channels, the pattern of sparse tensor cores.

    Each four is ranked by itself, and every layer loses exactly half: both rankings mean the same. Skipped is what has
    no such layout: a number of input channels that is not a multiple of 4, transposed convolutions, ``Conv1D`` of
    transformers, and whatever is no layer's weight. DTensors that are cut along another dimension than the first are
    gathered, one at a time.
    """

    name = "2:4"
    only_sparsity = 0.5

    def cutter(
        self, target: Prunable, ranking: Ranking, scores: Callable[[], Mapping[str, Tensor]]
    ) -> Callable[[float], Pruning]:
        entries = scores()
        fitting = {name for name in target.forward_weights() if entries[name].shape[1] % 4 == 0}
        masks = {
            name: two_of_four_mask(score) if name in fitting else torch.ones_like(score, dtype=torch.bool)
            for name, score in entries.items()
        }
        found = Masks(masks, skipped=tuple(name for name in masks if name not in fitting))
        return lambda _: found


class FilterGranularity(Granularity):
    """Whole output filters of convolutions and rows of linear layers, by their root mean square score.

    The sparsity counts filters; each layer keeps its largest one, even if fewer go then. A row of an attention's
    ``in_proj_weight``, or of timm's ``qkv``, is one entry of one head's query, key or value. Skipped are the last
    layer, whose rows are the network's outputs, transposed convolutions, and ``Conv1D`` of transformers. Bias and
    normalisation of a removed filter stay. DTensors whose filters are cut are gathered, one at a time.
    """

    name = "filter"

    def cutter(
        self, target: Prunable, ranking: Ranking, scores: Callable[[], Mapping[str, Tensor]]
    ) -> Callable[[float], Pruning]:
        names = target.forward_weights()[:-1]
        if not names:
            raise UserError(
                f"{type(target.model).__name__} has no filters to prune: they are of convolutions and linear layers "
                "before the last, whose rows are the outputs; take granularity weight"
            )
        entries = scores()
        groups = {"global": [names], "layerwise": [[name] for name in names]}[ranking]

        def cut(sparsity: float) -> Masks:
            whole = {name: torch.ones_like(score, dtype=torch.bool) for name, score in entries.items()}
            masks = whole | filter_masks(entries, sparsity, groups)
            return Masks(masks, skipped=tuple(name for name in masks if name not in names))

        return cut


class RankGranularity(Granularity):
    """Singular triplets: weights become products of two thin matrices; see :mod:`sfw_dist.pruning.low_rank`.

    The sparsity counts parameters, those of the two matrices in place of the weight's, and is reached or exceeded by
    less than one step in rank. Skipped are weights of grouped convolutions, each group of which would be a matrix of
    its own, and what has one dimension. DTensors are gathered, one at a time, and every rank keeps the factors of all:
    together about as large as the whole model.
    """

    name = "rank"

    def check(self, ranking: Ranking, criterion: str, own_scores: bool = False) -> None:
        if ranking != "global":
            raise UserError(
                f"granularity rank shares the ranks out over all layers, got ranking {ranking}: write ranking global"
            )
        if own_scores or criterion != "magnitude":
            given = "scores" if own_scores else f"criterion {criterion}"
            raise UserError(
                f"granularity rank goes by singular values, got {given}: leave it out, or take granularity weight"
            )

    def cutter(
        self, target: Prunable, ranking: Ranking, scores: Callable[[], Mapping[str, Tensor]]
    ) -> Callable[[float], Pruning]:
        for name, parameter in target.parameters.items():
            if parameter.is_complex():
                raise UserError(f"{name} is {parameter.dtype}, and low rank takes real ones: take granularity weight")
        wrong = Shards(target.parameters).first_with(lambda x: ~x.isfinite())
        if wrong is not None:
            raise UserError(f"{wrong} is not finite, so it has no rank: prune a checkpoint from before it diverged")
        grouped = [name for name, layer in weights(target.model) if getattr(layer, "groups", 1) > 1]
        factors = Factors(target.parameters, grouped)
        return lambda sparsity: factors.at(removed_count(sparsity, factors.entries))


GRANULARITIES: dict[str, Granularity] = {
    granularity.name: granularity
    for granularity in (WeightGranularity(), TwoOfFourGranularity(), FilterGranularity(), RankGranularity())
}
"""The granularities by name."""
