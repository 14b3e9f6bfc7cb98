"""Weights of low rank become two layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import skip_init

from sfw_dist.deploy.layers import CONVOLUTIONS, Layer, inputs, is_layer
from sfw_dist.pruning.low_rank import LowRank


@torch.no_grad()
def factor(model: nn.Module, pruning: LowRank, example: Tensor) -> dict[str, str]:
    """Replace each layer whose weight has a lower rank by an ``nn.Sequential`` of two, in place.

    A convolution becomes one with as many filters as the rank, and a 1×1 convolution.

    Args:
        model: the network, in evaluation mode.
        pruning: its low ranks.
        example: an input: layers that are not called with it, because another module reads their weights, stay.

    Returns:
        The weights that stay products in one layer, by name, with the reason.
    """
    kept = {}
    called = _called_layers(model, example)
    modules = dict(model.named_modules(remove_duplicate=False))
    for name in pruning.changed():
        owner, _, attribute = name.rpartition(".")
        layer, pair = modules[owner], pruning.pair(name)
        assert pair is not None  # of every changed weight
        if not owner or attribute != "weight" or not is_layer(layer):
            kept[name] = f"a {type(layer).__name__} does not become two layers"
        elif layer not in called:
            kept[name] = f"{owner} is not called as a layer"
        else:
            parent, _, last = owner.rpartition(".")
            setattr(modules[parent], last, _two_layers(layer, *pair))
    return kept


def _called_layers(model: nn.Module, example: Tensor) -> set[nn.Module]:
    called: set[nn.Module] = set()
    handles = [module.register_forward_pre_hook(lambda module, _: called.add(module)) for module in model.modules()]
    try:
        model(example)
    finally:
        for handle in handles:
            handle.remove()
    return called


def _two_layers(layer: Layer, left: Tensor, right: Tensor) -> nn.Sequential:
    rank, like = len(right), {"device": layer.weight.device, "dtype": layer.weight.dtype}
    make: Any = next(kind for kind in (nn.Linear, *CONVOLUTIONS) if isinstance(layer, kind))
    own: dict[str, Any] = {}
    pointwise: tuple[int, ...] = ()
    if not isinstance(layer, nn.Linear):
        own = {key: getattr(layer, key) for key in ("kernel_size", "stride", "padding", "dilation", "padding_mode")}
        pointwise = (1,)
    # Drawing weights would move the random state.
    first = skip_init(make, inputs(layer), rank, bias=False, **own, **like)
    second = skip_init(make, rank, layer.weight.shape[0], *pointwise, bias=layer.bias is not None, **like)
    first.weight.copy_(right.reshape(first.weight.shape))
    second.weight.copy_(left.reshape(second.weight.shape))
    for parameter in (first.weight, second.weight):
        parameter.requires_grad_(layer.weight.requires_grad)
    second.bias = layer.bias
    return nn.Sequential(first, second).train(layer.training)
