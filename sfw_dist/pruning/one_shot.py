"""One-shot pruning: once, to an exact count, without retraining.

Algorithm 2 of Lu et al., *Learning Pruning-Friendly Networks via Frank-Wolfe*, ICLR 2022, sets the given fraction of
smallest-magnitude weights, over all layers together, to zero. Here the count is exact: a threshold would remove too few
where magnitudes tie, and zeros always tie.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, overload

from torch import Tensor, nn

from sfw_dist.pruning.criteria import check_scores, criterion_scores
from sfw_dist.pruning.granularity import GRANULARITIES, GranularityName, Prunable, Ranking
from sfw_dist.pruning.low_rank import LowRank
from sfw_dist.pruning.masks import Masks
from sfw_dist.pruning.options import PruningOptions
from sfw_dist.pruning.result import Pruning
from sfw_dist.pruning.scope import Scope, prunable_parameters

MaskGranularity = Literal["weight", "2:4", "filter"]


class Pruner:
    """Scores or decomposes a model's parameters once, then says what is left of them at any sparsity.

    Args:
        model: the network; it does not change, and must not between the calls. With DTensors among its parameters every
            rank makes one, and calls it, with the same arguments.
        options: how it is pruned; the number of recalibration batches does not matter here.
        scores: as for :func:`prune`.

    Raises:
        UserError: as :func:`prune`.

    Example:
        >>> pruner = Pruner(nn.Linear(8, 4))
        >>> [pruner.at(sparsity).kept for sparsity in (0.0, 0.5, 0.9)]
        [32, 16, 3]
    """

    def __init__(
        self,
        model: nn.Module,
        options: PruningOptions | None = None,
        *,
        scores: Mapping[str, Tensor] | None = None,
    ) -> None:
        self._options = options = PruningOptions() if options is None else options
        parameters = prunable_parameters(model, options.scope)
        granularity = GRANULARITIES[options.granularity]
        granularity.check(options.ranking, options.criterion, own_scores=scores is not None)

        def entry_scores() -> dict[str, Tensor]:
            if scores is not None:
                return check_scores(scores, parameters, model)
            return criterion_scores(options.criterion, parameters)

        self._cut = granularity.cutter(Prunable(model, parameters), options.ranking, entry_scores)

    def at(self, sparsity: float) -> Pruning:
        """What is left at this sparsity. Raises :class:`UserError` for one that is out of range."""
        self._options.check_sparsity(sparsity)
        return self._cut(sparsity)


@overload
def prune(
    model: nn.Module,
    sparsity: float,
    *,
    scope: Scope = "weights",
    granularity: MaskGranularity = "weight",
    ranking: Ranking = "global",
    criterion: str = "magnitude",
    scores: Mapping[str, Tensor] | None = None,
) -> Masks: ...
@overload
def prune(model: nn.Module, sparsity: float, *, scope: Scope = "weights", granularity: Literal["rank"]) -> LowRank: ...
@overload
def prune(
    model: nn.Module,
    sparsity: float,
    *,
    scope: Scope = "weights",
    granularity: GranularityName,
    ranking: Ranking = "global",
    criterion: str = "magnitude",
    scores: Mapping[str, Tensor] | None = None,
) -> Pruning: ...
def prune(
    model: nn.Module,
    sparsity: float,
    *,
    scope: Scope = "weights",
    granularity: GranularityName = "weight",
    ranking: Ranking = "global",
    criterion: str = "magnitude",
    scores: Mapping[str, Tensor] | None = None,
) -> Pruning:
    """Prune ``model`` in place: set the least important pieces to zero or, with granularity "rank", lower the ranks.

    Parameters may be DTensors, of FSDP2's ``fully_shard`` or of hybrid and tensor-parallel meshes. Each rank then
    prunes its shards, and the result is to the bit what one process makes of the whole tensors. Every rank of their
    meshes must call this, with the same arguments.

    Args:
        model: the network; a parameter that several modules share counts once, under its first name. It changes as a
            whole or, where that fails or is interrupted, not at all; meanwhile there is a copy of what has changed.
        sparsity: fraction to remove, in [0, 1). Of N pieces ``sparsity * N`` go, rounded half up, the product being
            that of the decimal number as written (0.29 of 50 is 14.5, so 15).
        scope: "weights": the ``weight`` of every linear, convolution and transposed convolution module that holds it
            as a parameter of its own (not recomputed by a parametrization). "all": every parameter, of BatchNorm and
            biases too, as in the published code.
        granularity: what is removed as one piece: "weight", "2:4" (sparsity 0.5), "filter" or "rank"; the classes in
            :mod:`sfw_dist.pruning.granularity` say what each leaves alone, and what it gathers of DTensors.
        ranking: "global": the pieces of all layers are ranked together. "layerwise": those of each layer by themselves
            (not with "rank"; with "2:4" both mean the same).
        criterion: what scores an entry: "magnitude", or another one of :mod:`sfw_dist.pruning.criteria`.
        scores: your own scores instead of a criterion's, by parameter name: one finite number for each entry of each
            prunable parameter, in a tensor or DTensor; the largest are kept. They must not be negative with "filter",
            and cannot be used with "rank".

    Returns:
        What is left: the masks or, with granularity "rank", the factors.

    Raises:
        UserError: a sparsity out of range, or not 0.5 with "2:4"; an unknown word or a combination without a meaning;
            nothing to prune; NaN weights (with "rank" infinite or complex ones, too); weights that are quantised,
            sparse, flat (FSDP1) or without values (lazy, meta); unfit ``scores``. The model has not changed. All ranks
            raise it.

    Example:
        >>> import torch
        >>> net = nn.Linear(4, 1, bias=False)
        >>> net.weight.data = torch.tensor([[0.5, -2.0, 0.1, 1.0]])
        >>> prune(net, 0.5).sparsity
        0.5
        >>> net.weight.tolist()
        [[0.0, -2.0, 0.0, 1.0]]
        >>> masks = prune(net, 0.75, scores={"weight": torch.tensor([[4.0, 3.0, 2.0, 1.0]])})
        >>> masks["weight"].tolist()
        [[True, False, False, False]]
    """
    options = PruningOptions(scope, granularity, ranking, criterion)
    options.check_sparsity(sparsity)
    pruning = Pruner(model, options, scores=scores).at(sparsity)
    pruning.apply_to(model)
    return pruning
