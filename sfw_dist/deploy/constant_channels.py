"""Which channels are constant, whatever the network is given.

A filter of zeros answers with its bias, and what normalisation, activation, pooling or concatenation make of a constant
is a constant again, unless values that vary are added or multiplied to it. So the network runs with each output channel
of a convolution or linear layer replaced by noise, if any of its weights multiplies an input channel that varies. Every
path but those of constants carries noise then; what is the same at all positions of all samples is constant.

The noise has both signs and magnitudes from 0.01 to 10,000, so that no activation hides it: a channel that varies in no
sample of any pass would have to be switched off by all of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sfw_dist.deploy.layers import Layer, channel_dim, groups, inputs, is_layer, pads_zeros, tap_sums

_PASSES, _SAMPLES = 4, 4
_ROUNDING = 1e-12
"""Relative, of float64."""


@dataclass
class Channels:
    """What was seen of a layer.

    Attributes:
        low: of each input channel the smallest value.
        high: of each input channel the largest value.
        live: for each output channel whether it depends on the network's input.
    """

    low: Tensor
    high: Tensor
    live: Tensor

    @property
    def constant(self) -> Tensor:
        """For each input channel whether it is constant."""
        size = torch.maximum(self.low.abs(), self.high.abs())
        return (self.high - self.low <= _ROUNDING * size) & size.isfinite()

    @property
    def value(self) -> Tensor:
        """Of each constant input channel its value."""
        return self.low


@torch.no_grad()
def observe(model: nn.Module, example: Tensor) -> dict[nn.Module, Channels]:
    """What is constant at each convolution and linear layer that runs.

    Args:
        model: in float64 and evaluation mode.
        example: ``(batch, ...)``, an input; noise of its shape is given instead.
    """
    seen: dict[nn.Module, Channels] = {}
    generator = torch.Generator().manual_seed(0)
    handles = [
        module.register_forward_hook(_observer(seen, generator), with_kwargs=True)
        for module in model.modules()
        if is_layer(module)
    ]
    try:
        for _ in range(_PASSES):
            model(_noise(example[:1].expand(_SAMPLES, *example.shape[1:]), generator))
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _observer(seen: dict[nn.Module, Channels], generator: torch.Generator) -> Callable[..., Tensor]:
    def replace(layer: Layer, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
        x: Tensor = args[0] if args else kwargs["input"]
        dim = channel_dim(layer) % x.ndim
        others = [other for other in range(x.ndim) if other != dim]
        low, high = (x.amin(others), x.amax(others)) if others else (x, x)
        before = seen.get(layer)
        if before is not None:
            low, high = torch.minimum(low, before.low), torch.maximum(high, before.high)
        found = Channels(low, high, torch.empty(0))
        found.live = _live(layer, found)
        seen[layer] = found
        live = found.live.view(-1, *[1] * (-1 - channel_dim(layer)))
        return torch.where(live, _noise(output, generator), output)

    return replace


def _live(layer: Layer, found: Channels) -> Tensor:
    """The output channels in which something that varies has a weight."""
    varies = ~found.constant
    if pads_zeros(layer):
        varies |= found.value != 0
    of_group = varies.view(groups(layer), 1, -1)
    weight = layer.weight.detach().flatten(2) if layer.weight.ndim > 2 else layer.weight.detach()[..., None]
    has_weight = (weight != 0).any(-1).view(groups(layer), -1, weight.shape[1])
    return (has_weight & of_group).any(-1).flatten()


def _noise(like: Tensor, generator: torch.Generator) -> Tensor:
    size, sign = (torch.rand(like.shape, generator=generator, dtype=torch.float64) for _ in range(2))
    noise = 10 ** (6 * size - 2) * (1 - 2 * (sign < 0.5).double())
    return noise.to(like)


@torch.no_grad()
def fold(layer: Layer, channels: list[int], values: Tensor) -> None:
    """Add to the bias what constant input channels contribute; where zeros are padded, only zeros may be given.

    Args:
        layer: gets a bias, if it has none and needs one.
        channels: the input channels, each once.
        values: their values.
    """
    whole = layer.weight.new_zeros(inputs(layer))
    whole[channels] = values
    added = (tap_sums(layer) @ whole.view(groups(layer), -1, 1)).flatten()
    if not added.any():
        return
    if layer.bias is None:
        layer.bias = nn.Parameter(torch.zeros_like(added))
    layer.bias += added
