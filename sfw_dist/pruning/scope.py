"""Which parameters are pruned."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, get_args

from torch import Tensor, nn

from sfw_dist.errors import UserError

Scope = Literal["weights", "all"]


_FORWARD_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


_LAYERS = (*_FORWARD_LAYERS, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def _check_arguments(sparsity: float, scope: str, kind: str, kinds: tuple[str, ...]) -> None:
    if not 0 <= sparsity < 1:
        remedy = "it is the fraction to remove"
        if 1 < sparsity < 100:
            remedy = f"write {sparsity / 100:g} for {sparsity:g} %"
        elif sparsity == 1:
            remedy = "1 would leave nothing"
        raise UserError(f"sparsity must be in [0, 1), got {sparsity}: {remedy}")
    for argument, value, valid in (("scope", scope, get_args(Scope)), ("kind", kind, kinds)):
        if value not in valid:
            raise UserError(f"unknown {argument} {value!r}: choose one of {', '.join(valid)}")
    if kind == "2:4" and sparsity != 0.5:
        raise UserError(f"kind 2:4 removes exactly half, got sparsity {sparsity}: set it to 0.5 or use another kind")


def _prunable_parameters(model: nn.Module, scope: Scope) -> dict[str, Tensor]:
    """Detached, in the order of ``named_parameters``."""
    weights = {name for name, _ in _layers(model, _LAYERS)}
    parameters = {
        name: parameter.detach() for name, parameter in model.named_parameters() if scope == "all" or name in weights
    }
    if not parameters:
        raise UserError(f"{type(model).__name__} has nothing to prune with scope {scope!r}: it has no such parameter")
    return parameters


def _layers(model: nn.Module, types: tuple[type[nn.Module], ...]) -> Iterator[tuple[str, nn.Module]]:
    """Modules of the given types, with the name under which ``named_parameters`` lists their weight."""
    names: dict[object, str] = {parameter: name for name, parameter in model.named_parameters()}
    for module in model.modules():
        if isinstance(module, types) and module.weight in names:
            yield names[module.weight], module
