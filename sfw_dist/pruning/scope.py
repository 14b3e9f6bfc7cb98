"""Which parameters of a model are pruned."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from itertools import chain
from typing import Literal

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.parameter import is_lazy

from sfw_dist.distributed.dtensor import reshard
from sfw_dist.errors import UserError, named

Scope = Literal["weights", "all"]
"""``weights``: those of linear, convolution, transposed convolution and attention layers; ``all``: every parameter."""

_FORWARD_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.MultiheadAttention)
_TRANSPOSED_LAYERS = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_ATTENTION_WEIGHTS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
"""Of ``nn.MultiheadAttention``; its output projection is a linear layer of its own."""

LAZY = "is not initialised yet: run one batch through the model first"

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
"""Types whose entries can be ranked."""


def prunable_parameters(model: nn.Module, scope: Scope) -> dict[str, nn.Parameter]:
    """The parameters that the scope allows to prune, by name, in the order of ``named_parameters``.

    Args:
        model: the network; a parameter that several modules share appears once, under its first name. Of FSDP2, its
            parameters become shards again, if a forward pass has left them whole. Of "weights", layers that compute
            theirs from other tensors are warned of.
        scope: which parameters.

    Returns:
        The parameters themselves, not copies.

    Raises:
        UserError: the model has no such parameter, or one that cannot be pruned: without values, of integers (as
            quantised weights are) or 8-bit floats, sparse, a tensor type of another library, or flattened.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
        >>> list(prunable_parameters(net, "weights"))
        ['0.weight']
        >>> list(prunable_parameters(net, "all"))
        ['0.weight', '0.bias', '1.weight', '1.bias']
    """
    reshard(model)
    if scope == "weights" and (computed := _computed_weights(model)):
        warnings.warn(
            f"not pruned, because {named(computed)} compute their weight from other tensors: remove "
            "that first (in torch.nn.utils: parametrize.remove_parametrizations, remove_weight_norm, prune.remove)",
            stacklevel=3,
        )
    owners = dict(weights(model))
    parameters = {name: p for name, p in model.named_parameters() if scope == "all" or name in owners}
    for name, parameter in model.named_parameters():
        # Of a flat parameter no layer's weight is known, so it is told whatever the scope.
        fault = _fault(parameter, owners.get(name)) if name in parameters or _is_flat(parameter) else None
        if fault is not None:
            raise UserError(f"{name} {fault}")
    if not sum(parameter.numel() for parameter in parameters.values()):
        raise UserError(f"{type(model).__name__} has nothing to prune with scope {scope!r}: it has no such parameter")
    return parameters


def check_initialised(model: nn.Module) -> None:
    """Raise :class:`UserError` for a model with a lazy layer that no batch has reached yet."""
    for name, tensor in chain(model.named_parameters(), model.named_buffers()):
        if is_lazy(tensor):
            raise UserError(f"{name} {LAZY}")


def weights(model: nn.Module, *, forward: bool = False) -> Iterator[tuple[str, nn.Module]]:
    """The weights of the layers that are pruned, each by the name under which ``named_parameters`` lists it.

    A weight that is no parameter of its layer's own (a parametrization computes it) is left out.

    Args:
        model: the network.
        forward: only weights of the shape ``(out, in, *kernel)``. Those of transposed convolutions, and of the layer
            ``Conv1D`` of GPT-2 in transformers, are ``(in, out, *kernel)``.

    Yields:
        Name and layer, in the order of ``model.modules()``.
    """
    names: dict[object, str] = {parameter: name for name, parameter in model.named_parameters()}
    for module in model.modules():
        is_forward = isinstance(module, _FORWARD_LAYERS)
        if is_forward or (not forward and _is_transposed(module)):
            # Not module.weight: reading that of a parametrization computes it, and spectral_norm's changes its buffers.
            own = dict(module.named_parameters(recurse=False))
            attributes = _ATTENTION_WEIGHTS if isinstance(module, nn.MultiheadAttention) else ("weight",)
            yield from ((names[own[key]], module) for key in attributes if key in own)


def _computed_weights(model: nn.Module) -> list[str]:
    """The layers that compute their weight, as under ``weight_norm`` or ``torch.nn.utils.prune``, by name."""
    with_own = {layer for _, layer in weights(model)}
    return [
        name or type(layer).__name__
        for name, layer in model.named_modules()
        if (isinstance(layer, _FORWARD_LAYERS) or _is_transposed(layer)) and layer not in with_own
    ]


def _is_transposed(module: nn.Module) -> bool:
    # By its name: transformers is not imported here. `nf` is its number of outputs.
    return isinstance(module, _TRANSPOSED_LAYERS) or (type(module).__name__ == "Conv1D" and hasattr(module, "nf"))


def _fault(parameter: nn.Parameter, layer: nn.Module | None) -> str | None:
    """What forbids to prune a parameter, with the remedy; ``layer`` is the one whose weight it is."""
    if is_lazy(parameter):
        return LAZY
    if parameter.is_meta:
        return "is on the meta device, without values: load the weights first"
    if isinstance(parameter, DTensor):
        return _dtensor_fault(parameter)
    if hasattr(parameter, "__tensor_flatten__") or parameter.layout != torch.strided:
        kind = type(parameter).__name__ if parameter.layout == torch.strided else str(parameter.layout)
        return f"is a {kind}, whose entries cannot be set one by one: prune the model before it is converted"
    if parameter.dtype not in FLOATS and not parameter.is_complex():
        return (
            f"is {parameter.dtype}, as quantised or packed weights are: prune the model before it is quantised, or "
            "give the part of it that is not"
        )
    expected = 2 + len(getattr(layer, "kernel_size", ()))
    if (layer is not None and parameter.ndim != expected) or _is_flat(parameter):
        return (
            f"has shape {tuple(parameter.shape)}: a framework keeps it flat (FSDP1, ZeRO 3); prune inside its context "
            "of whole parameters, or take fully_shard"
        )
    return None


def _is_flat(parameter: nn.Parameter) -> bool:
    """Whether it holds several parameters, as FSDP1's do."""
    return getattr(parameter, "_is_flat_param", False)


def _dtensor_fault(parameter: DTensor) -> str | None:
    placements = f"a DTensor with placements {parameter.placements}"
    if any(placement.is_partial() for placement in parameter.placements):
        return f"is {placements}: redistribute it to shards or replicas first"
    if parameter.device_mesh.get_coordinate() is None:
        return f"is {placements} on a mesh without this rank: call this on the ranks of {parameter.device_mesh} alone"
    if parameter.numel() >= 2**31:
        return f"is {placements} and {parameter.numel()} entries, more than int32 can count: split it into several"
    if parameter.dtype not in FLOATS and not parameter.is_complex():
        return f"is {placements} of {parameter.dtype}: prune the model before it is quantised"
    return None
