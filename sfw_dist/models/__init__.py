"""The networks of the paper, small ones for quick runs, and every torchvision classification model, by name.

All keep PyTorch's default initializers, as the published experiments do: a radius in the ``initialization`` mode
is the expected norm under exactly these.
"""

from __future__ import annotations

import difflib
import importlib
import math
from types import ModuleType
from typing import NamedTuple, Protocol

from torch import nn

from sfw_dist.errors import UserError, needs_extra
from sfw_dist.models.cnn import cnn3, cnn5
from sfw_dist.models.resnet import ResNet18
from sfw_dist.models.vgg import vgg16

__all__ = ["build_model", "model_names"]

TORCHVISION = "torchvision/"


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
    """A freshly initialized classifier, (batch, in_channels, height, width) -> (batch, num_classes) logits.

    ``width`` multiplies the channels of every stage: rounded, at least 1. ``torchvision/<name>`` gives torchvision's
    model of that name, which has 3 input channels and no width.

    Raises:
        UserError: unknown name, a count below 1, a width that is not positive, or ``in_channels`` or ``width`` for a
            torchvision model.
    """
    for argument, count in (("num_classes", num_classes), ("in_channels", in_channels)):
        if count < 1:
            raise UserError(f"{argument} must be at least 1, got {count}: set it to what the data set has")
    if not 0 < width < math.inf:
        raise UserError(f"width must be positive and finite, got {width}: 1.0 is the published network")
    if name.startswith(TORCHVISION):
        return _torchvision_model(name, num_classes=num_classes, in_channels=in_channels, width=width)
    if name not in ARCHITECTURES:
        raise _unknown(name)
    build, channels = ARCHITECTURES[name]
    scaled = [max(1, round(width * channel)) for channel in channels]
    return build(scaled, num_classes=num_classes, in_channels=in_channels)


def model_names() -> list[str]:
    """What `build_model` takes, for help texts; the torchvision models in one entry."""
    return [*ARCHITECTURES, f"{TORCHVISION}<name>"]


def _torchvision_model(name: str, *, num_classes: int, in_channels: int, width: float) -> nn.Module:
    if name.removeprefix(TORCHVISION) not in _torchvision_names():
        raise _unknown(name)
    if in_channels != 3:
        remedy = f"convert the images to RGB or choose one of {', '.join(ARCHITECTURES)}"
        raise UserError(f"{name} takes 3 input channels, got in_channels={in_channels}: {remedy}")
    if width != 1:
        remedy = f"leave it at 1 or choose one of {', '.join(ARCHITECTURES)}"
        raise UserError(f"{name} has a fixed width, got width={width}: {remedy}")
    bare = name.removeprefix(TORCHVISION)
    model: nn.Module = _torchvision().get_model(bare, weights=None, num_classes=num_classes)
    return model


def _torchvision() -> ModuleType:
    """``torchvision.models``, imported on use: that is slow, and our own networks do without."""
    with needs_extra("a model of torchvision", "train"):
        return importlib.import_module("torchvision.models")


def _torchvision_names() -> list[str]:
    names: list[str] = _torchvision().list_models(module=_torchvision())  # this module: no segmentation, no detection
    return names


def _unknown(name: str) -> UserError:
    """The error for a name that nothing answers to, with the names that it may have been meant to be."""
    known = [*ARCHITECTURES, *(TORCHVISION + bare for bare in _torchvision_names())]
    bare_names = {full.removeprefix(TORCHVISION) for full in known}
    closest = difflib.get_close_matches(name.removeprefix(TORCHVISION), bare_names)
    close = [full for bare in closest for full in known if full.removeprefix(TORCHVISION) == bare]
    hint = f" (did you mean {' or '.join(close)}?)" if close else ""
    return UserError(f"unknown model {name!r}{hint}: choose one of {', '.join(model_names())}")
