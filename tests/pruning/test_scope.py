"""Which parameters each scope prunes."""

from __future__ import annotations

import torch
from torch import nn

from sfw_dist.pruning import (
    count_flops,
    prune,
)
from tests.support.pruning import compute_masks


def test_weights_are_found_by_module_type() -> None:
    """Filters by name drop a convolution called "bnet" or prune a BatchNorm called "conv"."""
    model = nn.ModuleDict(
        {
            "bnet": nn.Conv1d(2, 2, 3),
            "conv": nn.BatchNorm1d(2),
            "up": nn.ConvTranspose2d(2, 2, 3),
            "deep": nn.Sequential(nn.Conv3d(1, 1, 2), nn.LayerNorm(4)),
            "embedding": nn.Embedding(5, 4),
            "head": nn.Linear(4, 4),
        }
    )
    assert list(compute_masks(model, 0.5)) == ["bnet.weight", "up.weight", "deep.0.weight", "head.weight"]
    assert list(compute_masks(model, 0.5, scope="all")) == [name for name, _ in model.named_parameters()]


def test_a_single_layer_is_a_model() -> None:
    """The root module has the empty name: "" + ".weight" is no parameter."""
    layer = nn.Linear(4, 2)
    assert prune(layer, 0.5).kept == 4
    assert int(layer.weight.count_nonzero()) == 4
    assert count_flops(layer, torch.rand(3, 4)) == {"weight": 2 * 4 * 2}


def test_a_shared_weight_counts_once() -> None:
    """Counted twice, a tied embedding takes twice its share, and its two masks could differ."""
    embedding, head = nn.Embedding(6, 4), nn.Linear(4, 6, bias=False)
    head.weight = embedding.weight
    masks = compute_masks(nn.Sequential(embedding, head), 0.25)
    assert list(masks) == ["0.weight"]
    assert (masks.total, masks.kept) == (24, 18)
