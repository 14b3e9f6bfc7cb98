"""Networks and strategies for the tests of pruning."""

from __future__ import annotations

from collections.abc import Mapping
from decimal import ROUND_HALF_UP, Decimal
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from sfw_dist.pruning import PAPER_SPARSITIES, Masks, Pruner, PruningOptions

sparsities = st.one_of(st.floats(0, 0.999), st.sampled_from(PAPER_SPARSITIES))


def compute_masks(
    model: nn.Module, sparsity: float, *, scores: Mapping[str, Tensor] | None = None, **words: Any
) -> Masks:
    """The masks of a pruning, without applying them."""
    masks = Pruner(model, PruningOptions(**words), scores=scores).at(sparsity)
    assert isinstance(masks, Masks)
    return masks


def magnitudes(model: nn.Module) -> dict[str, Tensor]:
    """Of every parameter, by name."""
    return {name: parameter.detach().abs() for name, parameter in model.named_parameters()}


def removed_count(sparsity: float, n: int) -> int:
    """The definition, independent of the code under test."""
    return int((Decimal(str(sparsity)) * n).quantize(Decimal(1), ROUND_HALF_UP))


def small_net() -> nn.Sequential:
    """Two convolutions and a linear layer; for inputs ``(n, 3, 5, 5)``."""
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 16, 3), nn.Flatten(), nn.Linear(16, 10))


def four_layers() -> nn.Sequential:
    """Layers of 8, 16 and 12 filters, then the last one; for inputs ``(n, 3, 5, 5)``."""
    convolutions = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 16, 3, bias=False), nn.Flatten()]
    return nn.Sequential(*convolutions, nn.Linear(16, 12), nn.Linear(12, 10))


def linears(tensors: list[Tensor]) -> nn.Module:
    """A model of linear layers with these matrices, no biases."""
    layers = [nn.Linear(t.shape[1], t.shape[0], bias=False) for t in tensors]
    for layer, tensor in zip(layers, tensors, strict=True):
        layer.weight = nn.Parameter(tensor.clone())
    return nn.ModuleList(layers)


@st.composite
def tied_matrices(draw: st.DrawFn) -> list[Tensor]:
    """One to three matrices over seven values of four magnitudes: mostly ties, many zeros."""
    shapes = draw(st.lists(st.tuples(st.integers(1, 7), st.integers(1, 7)), min_size=1, max_size=3))
    seed = draw(st.integers(0, 2**32 - 1))
    generator = torch.Generator().manual_seed(seed)
    dtype = draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))
    return [torch.randint(-3, 4, shape, generator=generator).clamp(-3, 3).to(dtype) / 2 for shape in shapes]


@st.composite
def tied_networks(draw: st.DrawFn) -> nn.Module:
    """Up to three linear layers of few different rows, and the last."""
    heights = draw(st.lists(st.integers(1, 5), min_size=1, max_size=3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    layers = [nn.Linear(3 + i, height, bias=False) for i, height in enumerate([*heights, 2])]
    for layer in layers:
        values = torch.randint(0, 4, (layer.out_features, 1), generator=generator).float()
        layer.weight = nn.Parameter(values.expand(layer.weight.shape).clone())
    return nn.ModuleList(layers)


def flat(masks: Mapping[str, Tensor]) -> Tensor:
    """All masks as one vector."""
    return torch.cat([mask.flatten() for mask in masks.values()])


def filters_of(mask: Tensor) -> list[bool]:
    """Whether each filter stays; it must stay or go as a whole."""
    kept = mask.flatten(1)
    assert (kept.all(1) == kept.any(1)).all(), "a part of a filter is removed"
    return [bool(stays) for stays in kept.all(1)]
