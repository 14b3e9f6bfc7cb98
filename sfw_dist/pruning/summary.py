"""Layers, their exact counts and FLOPs after pruning."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import NotRequired, TypedDict

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from sfw_dist.pruning.low_rank import LowRank
from sfw_dist.pruning.one_shot import Pruning
from sfw_dist.pruning.scope import _LAYERS, _layers


class LayerRow(TypedDict):
    """One prunable parameter in `layer_table`."""

    name: str
    shape: list[int]
    parameters: int
    kept: int
    sparsity: float
    rank: NotRequired[int]
    """Of a weight of low rank; ``kept`` then counts its two factors."""


def layer_table(model: nn.Module, pruning: Pruning) -> list[LayerRow]:
    """What is left of each prunable parameter of ``model``, in the order of ``named_parameters``."""
    parameters = dict(model.named_parameters())
    rows = [_row(name, list(parameters[name].shape), *counts) for name, counts in pruning.counts.items()]
    if isinstance(pruning, LowRank):
        return [{**row, "rank": pruning.ranks[row["name"]]} if row["name"] in pruning.ranks else row for row in rows]
    return rows


def dead_layers(pruning: Pruning) -> list[str]:
    """The parameters of which nothing is kept: a weight here cuts the network in two."""
    return [name for name, (_, kept) in pruning.counts.items() if kept == 0]


def count_flops(model: nn.Module, example: Tensor) -> dict[str, int]:
    """Dense forward FLOPs for one sample of every linear and convolution module, by the name of its weight.

    A multiply-add is two FLOPs; biases are not counted. A module called several times counts each time, and one that
    is never called, because its owner reads its weight (as ``nn.MultiheadAttention`` does), counts 0.

    Args:
        model: runs once in evaluation mode without gradients; modes and buffers are afterwards what they were.
        example: (batch, ...), an input on the model's device, of which the first sample is used.
    """
    counter = FlopCounterMode(display=False)
    names = {module: name for name, module in _layers(model, _LAYERS)}
    flops = dict.fromkeys(names.values(), 0)

    def before(module: nn.Module, args: object) -> None:
        flops[names[module]] -= counter.get_total_flops()

    def after(module: nn.Module, args: object, output: object) -> None:
        flops[names[module]] += counter.get_total_flops()

    hooks = [module.register_forward_pre_hook(before) for module in names]
    hooks += [module.register_forward_hook(after) for module in names]
    try:
        with _evaluation_mode(model), torch.no_grad(), counter:
            model(example[:1])
    finally:
        for hook in hooks:
            hook.remove()
    return flops


def kept_flops(flops: Mapping[str, int], pruning: Pruning) -> float:
    """FLOPs that multiply by a kept weight, or by the two factors of one: each layer's count times what is kept of it.

    Of a removed filter these are its own; that the next layer may skip its channel is not counted.
    """
    counts = pruning.counts
    return sum(count * counts[name][1] / counts[name][0] if name in counts else count for name, count in flops.items())


@contextmanager
def _evaluation_mode(model: nn.Module) -> Iterator[None]:
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():  # one by one: a frozen BatchNorm is in evaluation mode all along
            module.training = training


def _row(name: str, shape: list[int], parameters: int, kept: int) -> LayerRow:
    return LayerRow(name=name, shape=shape, parameters=parameters, kept=kept, sparsity=(parameters - kept) / parameters)
