"""Magnitude masks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from decimal import ROUND_HALF_UP, Decimal
from functools import partial
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from sfw_dist.errors import UserError
from sfw_dist.ops.topk import select
from sfw_dist.pruning.filters import kept_filters
from sfw_dist.pruning.scope import _FORWARD_LAYERS, Scope, _check_arguments, _layers, _prunable_parameters

MaskKind = Literal["global", "layerwise", "2:4", "filters", "filters-layerwise"]


@dataclass(frozen=True, eq=False)
class Masks(Mapping[str, Tensor]):
    """One bool tensor per prunable parameter, by name: its shape, on its device, True where the entry is kept.

    ``skipped`` names the parameters that a pattern (2:4, filters) does not fit; their masks keep everything.
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
    def kept(self) -> int:
        """Entries kept, over all prunable parameters."""
        return sum(_count(mask) for mask in self.values())

    @property
    def total(self) -> int:
        """Entries of all prunable parameters."""
        return sum(mask.numel() for mask in self.values())

    @property
    def sparsity(self) -> float:
        """The fraction of prunable entries that is removed."""
        return (self.total - self.kept) / self.total

    @property
    def counts(self) -> dict[str, tuple[int, int]]:
        """Entries, and those kept, of each parameter."""
        return {name: (mask.numel(), _count(mask)) for name, mask in self.items()}


def magnitude_masks(model: nn.Module, sparsity: float, *, scope: Scope = "weights", kind: MaskKind = "global") -> Masks:
    """The masks that keep the entries or filters of largest magnitude; ``model`` is not touched.

    Args:
        model: a parameter that several modules share counts once, under its first name.
        sparsity: fraction to remove, in [0, 1). Of N entries exactly ``sparsity * N`` go, rounded half up, the
            product being that of the decimal number as written (0.29 of 50 is 14.5, so 15).
        scope: "weights": the ``weight`` of every linear, convolution and transposed convolution module that holds it
            as a parameter of its own (not recomputed by a parametrization). "all": every parameter, of BatchNorm and
            biases too, as in the published code.
        kind: "global": N counts all prunable entries together. "layerwise": each parameter's by themselves.
            "2:4": of every 4 consecutive input channels the 2 largest stay, the pattern of sparse tensor cores; see
            `Masks.skipped` for what has no such layout: a number of input channels that is not a multiple of 4,
            transposed convolutions, and whatever is no layer's weight.
            "filters": the output filters of convolutions and rows of linear layers of smallest root mean square entry
            go, over all layers together. ``sparsity`` and N count filters; each layer keeps its largest one, even if
            fewer go then. Not of the last layer, whose rows are the network's outputs, nor of transposed
            convolutions. Bias and normalisation of a removed filter stay.
            "filters-layerwise": the same with N for each layer by itself.

    Raises:
        UserError: sparsity out of range, or not 0.5 with "2:4"; unknown scope or kind; nothing to prune; NaN weights.
    """
    _check_arguments(sparsity, scope, kind, get_args(MaskKind))
    parameters = _prunable_parameters(model, scope)
    for name, parameter in parameters.items():
        if parameter.isnan().any():
            raise UserError(f"{name} holds NaN, which has no magnitude: prune a checkpoint from before it diverged")
    if kind.startswith("filters"):
        return _filter_masks(model, parameters, sparsity, layerwise=kind == "filters-layerwise")
    if kind == "global":
        return Masks(_global_masks(parameters, sparsity))
    if kind == "layerwise":
        return Masks({name: _keep_largest(p, sparsity) for name, p in parameters.items()})
    fitting = {name for name, _ in _layers(model, _FORWARD_LAYERS) if parameters[name].shape[1] % 4 == 0}
    masks = {
        name: _two_of_four(p) if name in fitting else torch.ones_like(p, dtype=torch.bool)
        for name, p in parameters.items()
    }
    return Masks(masks, skipped=tuple(name for name in masks if name not in fitting))


def _global_masks(parameters: Mapping[str, Tensor], sparsity: float) -> dict[str, Tensor]:
    # Parameters of different types meet in their common type, which holds the values of each exactly.
    flat = torch.cat([p.flatten() for p in parameters.values()])
    pieces = torch.split(_keep_largest(flat, sparsity), [p.numel() for p in parameters.values()])
    # Cloned: a view would make every saved mask carry the masks of the whole model.
    return {name: piece.view(p.shape).clone() for (name, p), piece in zip(parameters.items(), pieces, strict=True)}


def _keep_largest(x: Tensor, sparsity: float) -> Tensor:
    """Bool mask of ``x``'s shape with exactly ``round_half_up(sparsity * x.numel())`` entries False."""
    mask = torch.zeros(x.numel(), dtype=torch.bool, device=x.device)
    mask[select(x, x.numel() - _removed(sparsity, x.numel()))] = True
    return mask.view(x.shape)


def _removed(sparsity: float, n: int) -> int:
    """``round_half_up(sparsity * n)``, the product taken in decimal."""
    return int((Decimal(str(sparsity)) * n).to_integral_value(ROUND_HALF_UP))


def _filter_masks(model: nn.Module, parameters: Mapping[str, Tensor], sparsity: float, *, layerwise: bool) -> Masks:
    layers = list(dict.fromkeys(name for name, _ in _layers(model, _FORWARD_LAYERS)))
    weights = {name: parameters[name] for name in layers[:-1]}
    if not weights:
        raise UserError(
            f"{type(model).__name__} has no filters to prune: they are of convolutions and linear layers before the "
            "last, whose rows are the outputs; take kind global"
        )
    masks = {name: torch.ones_like(p, dtype=torch.bool) for name, p in parameters.items()}
    for name, kept in kept_filters(weights, partial(_removed, sparsity), layerwise=layerwise).items():
        masks[name] &= kept.view(-1, *[1] * (masks[name].ndim - 1))
    return Masks(masks, skipped=tuple(name for name in masks if name not in weights))


def _two_of_four(weight: Tensor) -> Tensor:
    """Mask of the 2 largest of every 4 consecutive input channels; ``weight`` is (out, in, *kernel).

    Sparse tensor cores skip zeros along the dimension they sum over, whose fastest index is the input channel when
    images are channels_last: (out, *kernel, in).
    """
    magnitude = weight.abs().movedim(1, -1)
    fours = magnitude.reshape(-1, 4)
    largest = fours.sort(dim=1, descending=True, stable=True).indices[:, :2]
    mask = torch.zeros_like(fours, dtype=torch.bool).scatter_(1, largest, True)
    return mask.view(magnitude.shape).movedim(-1, 1).contiguous()


def _count(mask: Tensor) -> int:
    return int(mask.count_nonzero())
