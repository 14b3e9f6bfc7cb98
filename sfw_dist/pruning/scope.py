"""Which parameters of a model are pruned."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from torch import nn

from sfw_dist.errors import UserError

Scope = Literal["weights", "all"]
"""``weights``: the weight of every linear, convolution and transposed convolution layer; ``all``: every parameter."""

FORWARD_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
"""Layers whose weight is ``(out, in, *kernel)``."""
WEIGHT_LAYERS = (*FORWARD_LAYERS, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
"""Layers whose weight is pruned; that of a transposed convolution is ``(in, out, *kernel)``."""


def prunable_parameters(model: nn.Module, scope: Scope) -> dict[str, nn.Parameter]:
    """The parameters that the scope allows to prune, by name, in the order of ``named_parameters``.

    Args:
        model: the network; a parameter that several modules share appears once, under its first name.
        scope: which parameters.

    Returns:
        The parameters themselves, not copies.

    Raises:
        UserError: the model has no such parameter.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
        >>> list(prunable_parameters(net, "weights"))
        ['0.weight']
        >>> list(prunable_parameters(net, "all"))
        ['0.weight', '0.bias', '1.weight', '1.bias']
    """
    weights = {name for name, _ in layers(model, WEIGHT_LAYERS)}
    parameters = {name: p for name, p in model.named_parameters() if scope == "all" or name in weights}
    if not parameters:
        raise UserError(f"{type(model).__name__} has nothing to prune with scope {scope!r}: it has no such parameter")
    return parameters


def layers(model: nn.Module, types: tuple[type[nn.Module], ...]) -> Iterator[tuple[str, nn.Module]]:
    """The modules of these types, each with the name under which ``named_parameters`` lists its weight.

    A module whose weight is no parameter of its own (a parametrization computes it) is left out.
    """
    names: dict[object, str] = {parameter: name for name, parameter in model.named_parameters()}
    for module in model.modules():
        if isinstance(module, types) and module.weight in names:
            yield names[module.weight], module
