"""Weights of low rank become two layers."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sfw_dist.deploy.layers import Layer, is_layer
from sfw_dist.pruning.low_rank import LowRank


@torch.no_grad()
def factor(model: nn.Module, pruning: LowRank) -> dict[str, str]:
    """Replace each layer whose weight has a lower rank by an ``nn.Sequential`` of two, in place.

    A convolution becomes one with as many filters as the rank, and a 1×1 convolution.

    Returns:
        The weights that stay products in one layer, by name, with the reason.
    """
    kept = {}
    modules = dict(model.named_modules(remove_duplicate=False))
    for name in pruning.changed():
        owner, _, attribute = name.rpartition(".")
        layer, pair = modules[owner], pruning.pair(name)
        assert pair is not None  # of every changed weight
        if not owner or attribute != "weight" or not is_layer(layer):
            kept[name] = f"a {type(layer).__name__} cannot be replaced by two layers"
            continue
        parent, _, last = owner.rpartition(".")
        setattr(modules[parent], last, _two_layers(layer, *pair))
    return kept


def _two_layers(layer: Layer, left: Tensor, right: Tensor) -> nn.Sequential:
    rank, like = len(right), {"device": layer.weight.device, "dtype": layer.weight.dtype}
    first: Layer
    second: Layer
    if isinstance(layer, nn.Linear):
        first = nn.Linear(layer.in_features, rank, bias=False, **like)
        second = nn.Linear(rank, layer.out_features, bias=layer.bias is not None, **like)
    else:
        kind = type(layer)
        options = {key: getattr(layer, key) for key in ("stride", "padding", "dilation", "padding_mode")}
        first = kind(layer.in_channels, rank, layer.kernel_size, bias=False, **options, **like)
        second = kind(rank, layer.out_channels, 1, bias=layer.bias is not None, **like)
    first.weight.copy_(right.reshape(first.weight.shape))
    second.weight.copy_(left.reshape(second.weight.shape))
    for parameter in (first.weight, second.weight):
        parameter.requires_grad_(layer.weight.requires_grad)
    if layer.bias is not None:
        second.bias = layer.bias
    return nn.Sequential(first, second).train(layer.training)
