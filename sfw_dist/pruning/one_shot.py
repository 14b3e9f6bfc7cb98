"""One-shot pruning: exact masks, what they leave of each layer, and the FLOPs that remain.

Algorithm 2 of Lu et al., *Learning Pruning-Friendly Networks via Frank-Wolfe*, ICLR 2022, zeroes the given fraction
of smallest-magnitude weights, over all layers together, once, without retraining. Here the count is exact: a
threshold would remove too few where magnitudes tie, and zeros always tie.

A tensor's entries are counted in row-major order of its shape, tensors in the order of ``named_parameters``; of
equal magnitudes the first are kept. So every mask is a subset of the mask of any lower sparsity.

Whole filters, and weights of low rank (:mod:`sfw_dist.pruning.low_rank`), are what Zimmer, Spiegel, Pokutta, arXiv
2205.11921, remove from networks trained in the sets of :mod:`sfw_dist.constraints.matrix`.
"""

from __future__ import annotations

from typing import Literal, get_args, overload

import torch
from torch import Tensor, nn

from sfw_dist.errors import UserError
from sfw_dist.pruning.low_rank import Factors, LowRank
from sfw_dist.pruning.masks import MaskKind, Masks, _removed, magnitude_masks
from sfw_dist.pruning.scope import _LAYERS, Scope, _check_arguments, _layers, _prunable_parameters

Kind = Literal["global", "layerwise", "2:4", "filters", "filters-layerwise", "low_rank"]


Pruning = Masks | LowRank
"""What is left of each prunable parameter."""


@overload
def prune(model: nn.Module, sparsity: float, *, scope: Scope = "weights", kind: MaskKind = "global") -> Masks: ...
@overload
def prune(model: nn.Module, sparsity: float, *, scope: Scope = "weights", kind: Kind) -> Pruning: ...
def prune(model: nn.Module, sparsity: float, *, scope: Scope = "weights", kind: Kind = "global") -> Pruning:
    """Prune ``model`` in place: zero the smallest entries or filters or, with kind "low_rank", lower the ranks.

    Arguments and errors as for `magnitude_masks` and `singular_factors`.
    """
    parameters = dict(model.named_parameters())
    if kind == "low_rank":
        low_rank = truncated(singular_factors(model, scope=scope), sparsity)
        with torch.no_grad():
            for name, weight in low_rank.weights().items():
                parameters[name].copy_(weight)
        return low_rank
    masks = magnitude_masks(model, sparsity, scope=scope, kind=kind)
    with torch.no_grad():
        for name, mask in masks.items():
            parameters[name].masked_fill_(~mask, 0)  # a product with the mask would leave negative zeros
    return masks


def singular_factors(model: nn.Module, *, scope: Scope = "weights") -> Factors:
    """The decompositions that `truncated` cuts at any sparsity: computed once, with one SVD a weight.

    Weights of grouped convolutions, of which each group would be a matrix of its own, stay as they are, and so does
    what has one dimension. ``model`` is not touched.

    Raises:
        UserError: unknown scope; nothing to prune; weights that are not finite.
    """
    _check_arguments(0.0, scope, "low_rank", get_args(Kind))
    parameters = _prunable_parameters(model, scope)
    for name, parameter in parameters.items():
        if not parameter.isfinite().all():
            raise UserError(f"{name} is not finite, so it has no rank: prune a checkpoint from before it diverged")
    return Factors(parameters, [name for name, layer in _layers(model, _LAYERS) if getattr(layer, "groups", 1) > 1])


def truncated(factors: Factors, sparsity: float) -> LowRank:
    """Ranks that save ``sparsity`` of the prunable parameters, or a little more: by how much one step in rank differs.

    Raises:
        UserError: sparsity out of range.
    """
    _check_arguments(sparsity, "all", "low_rank", get_args(Kind))
    return factors.truncated(_removed(sparsity, factors.entries))


def masked_parameters(model: nn.Module, pruning: Pruning) -> dict[str, Tensor]:
    """What `prune` would leave of the parameters that it changes, by name, as new tensors; ``model`` is not touched."""
    if isinstance(pruning, LowRank):
        return pruning.weights()
    parameters = dict(model.named_parameters())
    return {name: torch.where(mask, parameters[name].detach(), 0) for name, mask in pruning.items()}
