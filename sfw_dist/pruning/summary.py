"""What a pruning leaves: layers with their exact counts, and FLOPs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NotRequired, TypedDict

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from sfw_dist.distributed.dtensor import reshard
from sfw_dist.pruning.modes import evaluation_mode
from sfw_dist.pruning.result import Pruning
from sfw_dist.pruning.scope import WEIGHT_LAYERS, layers


class LayerRow(TypedDict):
    """One prunable parameter in :func:`layer_table`."""

    name: str
    shape: list[int]
    parameters: int
    kept: int
    sparsity: float
    rank: NotRequired[int]
    """Of a weight of low rank; ``kept`` then counts its two factors."""


def layer_table(model: nn.Module, pruning: Pruning) -> list[LayerRow]:
    """What is left of each prunable parameter of ``model``, in the order of ``named_parameters``.

    Example:
        >>> from sfw_dist.pruning import prune
        >>> net = nn.Linear(4, 2)
        >>> layer_table(net, prune(net, 0.75))
        [{'name': 'weight', 'shape': [2, 4], 'parameters': 8, 'kept': 2, 'sparsity': 0.75}]
    """
    parameters = dict(model.named_parameters())
    rows = []
    for name, (entries, kept) in pruning.counts.items():
        shape, sparsity = list(parameters[name].shape), (entries - kept) / entries
        row = LayerRow(name=name, shape=shape, parameters=entries, kept=kept, sparsity=sparsity)
        if name in pruning.ranks:
            row["rank"] = pruning.ranks[name]
        rows.append(row)
    return rows


def dead_layers(pruning: Pruning) -> list[str]:
    """The parameters of which nothing is kept: a weight here cuts the network in two."""
    return [name for name, (_, kept) in pruning.counts.items() if kept == 0]


def count_flops(model: nn.Module, example: Tensor) -> dict[str, int]:
    """Count the dense forward FLOPs of one sample in every linear and convolution module.

    A multiply-add is two FLOPs; biases are not counted. A module that is called several times counts each time, and one
    that is never called, because its owner reads its weight (as ``nn.MultiheadAttention`` does), counts 0.

    Args:
        model: runs once in evaluation mode without gradients; modes and buffers are afterwards what they were. With
            FSDP2 (``fully_shard``) every rank must call this.
        example: ``(batch, ...)``, an input on the model's device; its first sample is used.

    Returns:
        FLOPs by the name of the module's weight.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(8, 10))
        >>> count_flops(net, torch.zeros(1, 1, 4, 4))
        {'0.weight': 144, '2.weight': 160}
    """
    counter = FlopCounterMode(display=False)
    names = {module: name for name, module in layers(model, WEIGHT_LAYERS)}
    flops = dict.fromkeys(names.values(), 0)

    def before(module: nn.Module, args: object) -> None:
        flops[names[module]] -= counter.get_total_flops()

    def after(module: nn.Module, args: object, output: object) -> None:
        flops[names[module]] += counter.get_total_flops()

    hooks = [module.register_forward_pre_hook(before) for module in names]
    hooks += [module.register_forward_hook(after) for module in names]
    try:
        with evaluation_mode(model), torch.no_grad(), counter:
            model(example[:1])
    finally:
        for hook in hooks:
            hook.remove()
        reshard(model)
    return flops


def kept_flops(flops: Mapping[str, int], pruning: Pruning) -> float:
    """FLOPs that multiply by a kept weight, or by one of its two factors.

    Args:
        flops: of :func:`count_flops`.
        pruning: what is left. A removed filter saves its own FLOPs; that the next layer may skip its channel is not
            counted.

    Returns:
        The sum over the layers, each one's FLOPs times the fraction of it that is kept.

    Example:
        >>> from sfw_dist.pruning import prune
        >>> net = nn.Linear(4, 2)
        >>> flops = count_flops(net, torch.zeros(1, 4))
        >>> kept_flops(flops, prune(net, 0.75))
        4.0
    """
    counts = pruning.counts
    return sum(count * counts[name][1] / counts[name][0] if name in counts else count for name, count in flops.items())
