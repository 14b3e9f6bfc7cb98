"""Networks of a user's own, made by a function that is named ``package.module:function``."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from itertools import chain
from typing import Any

from torch import nn

from sfw_dist.errors import UserError, import_path
from sfw_dist.models.zoos import Request, built


def own_model(request: Request) -> nn.Module:
    """Call the function with ``num_classes``, ``in_channels`` and the other arguments.

    Raises:
        UserError: it cannot be imported, does not take the arguments or their values, or returns no module, or one
            on the meta device.
    """
    build = _import_function(request.name)
    arguments: dict[str, Any] = {"num_classes": request.num_classes, "in_channels": request.in_channels}
    taken = inspect.signature(build).parameters
    for name in request.kwargs:
        if name in (*arguments, "pretrained"):
            raise UserError(f"model.kwargs has {name}, which follows from the data or model.pretrained: leave it out")
    if request.published and "pretrained" not in taken:
        raise UserError(
            f"model.pretrained: {request.name} has no argument pretrained: add it, or give a safetensors file"
        )
    arguments |= {"pretrained": request.published} if "pretrained" in taken else {}
    try:
        inspect.signature(build).bind(**arguments, **request.kwargs)
    except TypeError as error:
        given = ", ".join([*arguments, *request.kwargs])
        raise UserError(
            f"{request.name} cannot be called with {given} ({error}): correct model.kwargs, or the function"
        ) from None
    model = built(request, lambda: build(**arguments, **request.kwargs))
    if not isinstance(model, nn.Module):
        raise UserError(f"model.name: {request.name} returned a {type(model).__name__}: return a torch.nn.Module")
    for name, tensor in chain(model.named_parameters(), model.named_buffers()):
        if tensor.is_meta:  # on which weights are loaded without a word, and without effect
            raise UserError(
                f"model.name: {request.name} returned a network whose {name} is on the meta device, without values: "
                "build it on the CPU"
            )
    return model


def _import_function(path: str) -> Callable[..., object]:
    remedy = "write package.module:function of a function of num_classes and in_channels that can be imported"
    found = import_path(path, "model.name", remedy)
    if not callable(found):
        raise UserError(f"model.name: {path} is no function: {remedy}")
    return found
