"""What convolutions and linear layers are to compaction: their channels, and whether they compute as torch's own do."""

from __future__ import annotations

from typing import TypeGuard

from torch import Tensor, nn

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
Layer = nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.Linear


def is_layer(module: object) -> TypeGuard[Layer]:
    """Whether it is a convolution or linear layer that multiplies by its own weight exactly as torch's layers do.

    A subclass with another forward (weights that are standardised, padding that depends on the size) and a weight that
    a parametrization computes are not.
    """
    for kind in (*CONVOLUTIONS, nn.Linear):
        if isinstance(module, kind):
            same = all(
                getattr(type(module), name, None) is getattr(kind, name, None) for name in ("forward", "_conv_forward")
            )
            return same and module._parameters.get("weight") is not None
    return False


def channel_dim(layer: Layer) -> int:
    """The dimension of channels in its input and output, counted from the end."""
    return -1 if isinstance(layer, nn.Linear) else -1 - len(layer.kernel_size)


def groups(layer: Layer) -> int:
    """Into how many groups its channels are divided."""
    return 1 if isinstance(layer, nn.Linear) else layer.groups


def inputs(layer: Layer) -> int:
    """The number of its input channels."""
    return layer.weight.shape[1] * groups(layer)


def is_depthwise(layer: Layer) -> bool:
    """Whether each output channel reads the input channel of the same number alone."""
    return groups(layer) == inputs(layer) == layer.weight.shape[0] > 1


def pads_zeros(layer: Layer) -> bool:
    """Whether a constant channel counts for less at the borders of its output."""
    if isinstance(layer, nn.Linear) or layer.padding_mode != "zeros" or layer.padding == "valid":
        return False
    if layer.padding == "same":
        return any(width > 1 for width in layer.kernel_size)
    return any(width != 0 for width in layer.padding)


def tap_sums(layer: Layer) -> Tensor:
    """The weight summed over the kernel, ``(groups, outputs of a group, inputs of a group)``.

    It multiplies constant channels, where no zeros are padded.
    """
    weight = layer.weight.detach()
    return weight.flatten(1).view(groups(layer), -1, weight.shape[1], max(weight[0, 0].numel(), 1)).sum(-1)
