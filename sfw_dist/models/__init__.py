"""The networks of the paper, small ones for quick runs, those of torchvision and timm, and your own, by name.

Our own keep PyTorch's default initializers, as the published experiments do: a radius in the ``initialization`` mode
is the expected norm under exactly these.
"""

from __future__ import annotations

import difflib
import importlib
import math
from collections.abc import Callable
from types import ModuleType
from typing import NamedTuple, Protocol

from torch import nn

from sfw_dist.errors import UserError, import_path, needs_extra
from sfw_dist.models.cnn import cnn3, cnn5
from sfw_dist.models.resnet import ResNet18
from sfw_dist.models.vgg import vgg16

__all__ = ["build_model", "model_names"]

TORCHVISION = "torchvision/"
TIMM = "timm/"


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


def build_model(name: str, *, num_classes: int, in_channels: int = 3, width: float = 1.0) -> nn.Module:
    """Build a classifier with new weights.

    Args:
        name: one of :func:`model_names`: a network of sfw_dist; ``torchvision/NAME``; ``timm/NAME``; or
            ``package.module:function``, which is called with ``num_classes`` and ``in_channels`` and returns a module.
        num_classes: number of logits.
        in_channels: channels of the images; torchvision's models take 3.
        width: factor on the channels of every stage, rounded, at least 1; for the networks of sfw_dist only.

    Returns:
        A network from images ``(batch, in_channels, height, width)`` to logits ``(batch, num_classes)``.

    Raises:
        UserError: unknown name, a count below 1, a width that is not positive, or ``in_channels`` or ``width`` for a
            model that does not take it.

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
    if name in ARCHITECTURES:
        build, channels = ARCHITECTURES[name]
        scaled = [max(1, round(width * channel)) for channel in channels]
        return build(scaled, num_classes=num_classes, in_channels=in_channels)
    if ":" in name:
        build_own = _import_function(name)
        _refuse_width(name, width)
        return _checked_module(name, build_own(num_classes=num_classes, in_channels=in_channels))
    if name.startswith(TIMM):
        return _timm_model(name, num_classes=num_classes, in_channels=in_channels, width=width)
    if name.startswith(TORCHVISION):
        return _torchvision_model(name, num_classes=num_classes, in_channels=in_channels, width=width)
    raise _unknown(name)


def model_names() -> list[str]:
    """Return what :func:`build_model` takes, for help texts; other packages' models in one entry each."""
    return [*ARCHITECTURES, f"{TORCHVISION}<name>", f"{TIMM}<name>", "package.module:function"]


def _refuse_width(name: str, width: float) -> None:
    if width != 1:
        remedy = f"leave it at 1 or choose one of {', '.join(ARCHITECTURES)}"
        raise UserError(f"{name} has a fixed width, got width={width}: {remedy}")


def _import_function(path: str) -> Callable[..., object]:
    remedy = "write package.module:function of a function of num_classes and in_channels that can be imported"
    found = import_path(path, "model.name", remedy)
    if not callable(found):
        raise UserError(f"model.name: {path} is no function: {remedy}")
    return found


def _checked_module(name: str, built: object) -> nn.Module:
    if not isinstance(built, nn.Module):
        raise UserError(f"model.name: {name} returned a {type(built).__name__}: return a torch.nn.Module")
    return built


def _timm_model(name: str, *, num_classes: int, in_channels: int, width: float) -> nn.Module:
    with needs_extra("a model of timm", "examples"):
        timm = importlib.import_module("timm")
    bare = name.removeprefix(TIMM)
    if not timm.is_model(bare):
        near = difflib.get_close_matches(bare, timm.list_models(), n=1)
        hint = f"did you mean {TIMM}{near[0]}?" if near else "timm.list_models() has the names"
        raise UserError(f"unknown model {name!r}: {hint}")
    _refuse_width(name, width)
    model: nn.Module = timm.create_model(bare, pretrained=False, num_classes=num_classes, in_chans=in_channels)
    return model


def _torchvision_model(name: str, *, num_classes: int, in_channels: int, width: float) -> nn.Module:
    bare = name.removeprefix(TORCHVISION)
    if bare not in _torchvision_names():
        raise _unknown(name)
    if in_channels != 3:
        remedy = f"convert the images to RGB or choose one of {', '.join(ARCHITECTURES)}"
        raise UserError(f"{name} takes 3 input channels, got in_channels={in_channels}: {remedy}")
    _refuse_width(name, width)
    model: nn.Module = _torchvision().get_model(bare, weights=None, num_classes=num_classes)
    return model


def _torchvision() -> ModuleType:
    """``torchvision.models``, imported on use: the import is slow, and other networks do not need it."""
    with needs_extra("a model of torchvision", "train"):
        return importlib.import_module("torchvision.models")


def _torchvision_names() -> list[str]:
    names: list[str] = _torchvision().list_models(module=_torchvision())  # this module: no segmentation, no detection
    return names


def _unknown(name: str) -> UserError:
    """The error for an unknown name, with the known names that are most like it."""
    known = [*ARCHITECTURES, *(TORCHVISION + bare for bare in _torchvision_names())]
    bare_names = {full.removeprefix(TORCHVISION) for full in known}
    closest = difflib.get_close_matches(name.removeprefix(TORCHVISION), bare_names)
    close = [full for bare in closest for full in known if full.removeprefix(TORCHVISION) == bare]
    hint = f" (did you mean {' or '.join(close)}?)" if close else ""
    return UserError(f"unknown model {name!r}{hint}: choose one of {', '.join(model_names())}")
