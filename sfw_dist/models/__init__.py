"""The networks of the paper, small ones for quick runs, those of torchvision and timm, and your own, by name.

Our own keep PyTorch's default initializers, as the published experiments do: a radius in the ``initialization`` mode
is the expected norm under exactly these.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from torch import nn

from sfw_dist.errors import UserError
from sfw_dist.models.cnn import cnn3, cnn5
from sfw_dist.models.own import own_model
from sfw_dist.models.pretrained import Tell, load_by_name, load_weights_file
from sfw_dist.models.resnet import ResNet18
from sfw_dist.models.vgg import vgg16
from sfw_dist.models.zoos import TIMM, TORCHVISION, Request, timm_model, torchvision_model, torchvision_names

__all__ = ["build_model", "model_names"]


class Builder(Protocol):
    """Builds a network from the channels of its stages."""

    def __call__(self, channels: list[int], *, num_classes: int, in_channels: int) -> nn.Module: ...


class Architecture(NamedTuple):
    build: Builder
    channels: tuple[int, ...]  # at width 1


ARCHITECTURES = {
    "resnet18": Architecture(ResNet18, (64, 128, 256, 512)),
    "vgg16": Architecture(vgg16, (64, 128, 256, 512, 512)),
    "cnn": Architecture(cnn3, (64, 128, 128)),
    "cnn5": Architecture(cnn5, (32, 64, 64, 128, 128)),
}


def build_model(
    name: str,
    *,
    num_classes: int,
    in_channels: int = 3,
    width: float = 1.0,
    kwargs: Mapping[str, Any] | None = None,
    pretrained: bool | str = False,
    tell: Tell = lambda line: None,
) -> nn.Module:
    """Build a classifier.

    Args:
        name: one of :func:`model_names`: a network of sfw_dist; ``torchvision/NAME``; ``timm/NAME``; or
            ``package.module:function``, which is called with ``num_classes`` and ``in_channels`` and returns a module.
        num_classes: number of logits.
        in_channels: channels of the images. For other than 3, the first convolution of torchvision's networks is
            replaced, with torch's initial weights.
        width: factor on the channels of every stage, rounded, at least 1; for the networks of sfw_dist only.
        kwargs: other arguments of the network; those of sfw_dist take none.
        pretrained: ``False``: new weights. ``True``: those that torchvision or timm publish, downloaded at the first
            use; your own function must take an argument ``pretrained``. Or the path of a safetensors file, with tensors
            by name. A head for another number of classes keeps its new weights.
        tell: takes a line for the user, on tensors that begin anew.

    Returns:
        A network from images ``(batch, in_channels, height, width)`` to logits ``(batch, num_classes)``.

    Raises:
        UserError: unknown name, a count below 1, a width that is not positive, arguments that the network does not
            take, or pretrained weights that there are not or do not fit.

    Example:
        >>> import torch
        >>> model = build_model("cnn", num_classes=10, in_channels=1, width=0.25)
        >>> model(torch.zeros(2, 1, 8, 8)).shape
        torch.Size([2, 10])
    """
    for argument, count in (("num_classes", num_classes), ("in_channels", in_channels)):
        if count < 1:
            raise UserError(f"{argument} must be at least 1, got {count}: set it to what the data set has")
    if not 0 < width < math.inf:
        raise UserError(f"width must be positive and finite, got {width}: 1.0 is the published network")
    for key in kwargs or {}:
        if not isinstance(key, str):
            raise UserError(f"model.kwargs has the key {key!r}: write the names of the network's arguments")
    request = Request(name, num_classes, in_channels, kwargs or {}, pretrained is True, tell)
    model = _ours(request, width) if name in ARCHITECTURES else _of_others(request, width)
    if isinstance(pretrained, str):
        load_by_name(model, load_weights_file(Path(pretrained)), pretrained, num_classes, tell)
    return model


def _ours(request: Request, width: float) -> nn.Module:
    name, num_classes, in_channels, kwargs, published, _ = request
    if kwargs:
        raise UserError(
            f"{name} takes no model.kwargs, got {', '.join(kwargs)}: leave them out (model.width scales it)"
        )
    if published:
        raise UserError(f"{name} has no published weights: give the model.safetensors of another run")
    build, channels = ARCHITECTURES[name]
    scaled = [max(1, round(width * channel)) for channel in channels]
    return build(scaled, num_classes=num_classes, in_channels=in_channels)


def _of_others(request: Request, width: float) -> nn.Module:
    name = request.name
    if ":" in name:
        build = own_model
    elif name.startswith(TIMM):
        build = timm_model
    elif name.startswith(TORCHVISION) and name.removeprefix(TORCHVISION) in torchvision_names():
        build = torchvision_model
    else:
        raise _unknown(name)
    if width != 1:
        remedy = f"leave it at 1 or choose one of {', '.join(ARCHITECTURES)}"
        raise UserError(f"{name} has a fixed width, got width={width}: {remedy}")
    return build(request)


def model_names() -> list[str]:
    """Return what :func:`build_model` takes, for help texts; other packages' models in one entry each."""
    return [*ARCHITECTURES, f"{TORCHVISION}<name>", f"{TIMM}<name>", "package.module:function"]


def _unknown(name: str) -> UserError:
    """The error for an unknown name, with the known names that are most like it."""
    known = [*ARCHITECTURES, *(TORCHVISION + bare for bare in torchvision_names())]
    bare_names = {full.removeprefix(TORCHVISION) for full in known}
    closest = difflib.get_close_matches(name.removeprefix(TORCHVISION), bare_names)
    close = [full for bare in closest for full in known if full.removeprefix(TORCHVISION) == bare]
    hint = f" (did you mean {' or '.join(close)}?)" if close else ""
    return UserError(f"unknown model {name!r}{hint}: choose one of {', '.join(model_names())}")
