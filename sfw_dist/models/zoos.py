"""Networks of torchvision and timm, with new weights or their published ones."""

from __future__ import annotations

import difflib
import importlib
import inspect
import os
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple, TypeVar

import torch
from torch import nn

from sfw_dist.errors import UserError, needs_extra
from sfw_dist.files import file_lock, make_folder
from sfw_dist.models.pretrained import Tell, load_by_name

TORCHVISION = "torchvision/"
TIMM = "timm/"

T = TypeVar("T")

_WITH_AUXILIARY_HEADS = ("googlenet", "inception_v3")
"""Of torchvision."""


class Request(NamedTuple):
    """The network that is asked for."""

    name: str
    num_classes: int
    in_channels: int
    kwargs: Mapping[str, Any]
    published: bool
    """Whether it begins with the published weights."""
    tell: Tell


def timm_model(request: Request) -> nn.Module:
    """Build a network of timm, whose own loader fits published weights to the channels and classes.

    Raises:
        UserError: unknown name, arguments that the network does not take, or no published weights.
    """
    with needs_extra("a model of timm", "train"):
        timm = importlib.import_module("timm")
    bare = request.name.removeprefix(TIMM)
    if not timm.is_model(bare):
        near = difflib.get_close_matches(bare, timm.list_models(), n=1)
        hint = f"did you mean {TIMM}{near[0]}?" if near else "timm.list_models() has the names"
        raise UserError(f"unknown model {request.name!r}: {hint}")
    _refuse_reserved(request, "in_chans", "pretrained")
    sizes = {"num_classes": request.num_classes, "in_chans": request.in_channels}
    model: nn.Module = built(
        request, lambda: timm.create_model(bare, pretrained=request.published, **sizes, **request.kwargs)
    )
    if request.published:
        _tell_what_timm_replaced(model.pretrained_cfg, request)  # type: ignore[arg-type]
    return model


def torchvision_model(request: Request) -> nn.Module:
    """Build a classifier of torchvision, without auxiliary heads unless they are asked for.

    Raises:
        UserError: arguments that the network does not take, or no published weights.
    """
    models, bare = _torchvision(), request.name.removeprefix(TORCHVISION)
    _refuse_reserved(request, "weights", "progress")
    _refuse_swallowed(request, models.get_model_builder(bare))
    kwargs = dict(request.kwargs)
    with_heads = bare in _WITH_AUXILIARY_HEADS
    if with_heads:
        kwargs = {"aux_logits": False, "init_weights": True} | kwargs
    model: nn.Module = built(
        request, lambda: models.get_model(bare, weights=None, num_classes=request.num_classes, **kwargs)
    )
    if request.in_channels != 3:
        _replace_first_convolution(model, request.in_channels)
    if request.published:
        if with_heads and "transform_input" not in kwargs:
            raise UserError(
                f"the weights of {request.name} are for images that the network scales itself: write model.kwargs "
                "{transform_input: true}"
            )
        kwargs.pop("init_weights", None)
        weights = getattr(models.get_model_weights(bare), "DEFAULT", None)
        if weights is None:
            raise UserError(f"{request.name} has no published weights: leave model.pretrained out")
        with _one_downloads():
            published = built(request, lambda: models.get_model(bare, weights=weights, **kwargs))
        load_by_name(model, published.state_dict(), request.name, request.num_classes, request.tell)
    return model


def torchvision_names() -> list[str]:
    """The classifiers of torchvision."""
    names: list[str] = _torchvision().list_models(module=_torchvision())  # this module: no segmentation, no detection
    return names


def _torchvision() -> ModuleType:
    """``torchvision.models``, imported on use: the import is slow, and other networks do not need it."""
    with needs_extra("a model of torchvision", "train"):
        return importlib.import_module("torchvision.models")


def built(request: Request, build: Callable[[], T]) -> T:
    """The network; what other people's code says of its arguments or weights becomes one line."""
    try:
        return build()
    except UserError:
        raise
    except Exception as error:
        if not request.kwargs and not request.published:
            raise
        given = f" with model.kwargs {dict(request.kwargs)}" if request.kwargs else ""
        start = " from its published weights" if request.published else ""
        remedy = "correct that argument" if request.kwargs else "give a safetensors file, or leave model.pretrained out"
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"{request.name} cannot be built{given}{start} ({type(error).__name__}: {reason}): {remedy}"
        ) from error


def _refuse_reserved(request: Request, *names: str) -> None:
    for name in ("num_classes", *names):
        if name in request.kwargs:
            raise UserError(f"model.kwargs has {name}, which follows from the data or model.pretrained: leave it out")


def _refuse_swallowed(request: Request, builder: Callable[..., object]) -> None:
    """Refuse an argument that nothing in the network's module takes: some networks ignore what they do not know."""
    module = inspect.getmodule(builder)
    parts = [part for part in vars(module).values() if getattr(part, "__module__", "") == builder.__module__]
    known = {name for part in parts if callable(part) for name in inspect.signature(part).parameters}
    for name in request.kwargs:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]}?" if near else "leave it out"
            raise UserError(f"{request.name} takes no argument {name} (model.kwargs): {hint}")


def _replace_first_convolution(model: nn.Module, in_channels: int) -> None:
    """Put one for other channels in its place, with torch's initial weights."""
    name, old = next((name, m) for name, m in model.named_modules() if isinstance(m, nn.Conv2d))
    sizes: dict[str, Any] = {key: getattr(old, key) for key in ("kernel_size", "stride", "padding", "dilation")}
    model.set_submodule(name, nn.Conv2d(in_channels, old.out_channels, bias=old.bias is not None, **sizes))


def _tell_what_timm_replaced(published: Mapping[str, Any], request: Request) -> None:
    if published["num_classes"] != request.num_classes:
        request.tell(
            f"{published['classifier']} begins anew: it has {request.num_classes} classes here, "
            f"{published['num_classes']} in the weights of {request.name}"
        )
    channels = published.get("input_size", (3,))[0]
    if channels != request.in_channels:
        request.tell(
            f"{published['first_conv']} takes {request.in_channels} channels here, {channels} in the weights of "
            f"{request.name}: timm has summed or repeated its weights"
        )


def _one_downloads() -> AbstractContextManager[None]:
    """Keep other ranks waiting while one downloads; a folder that cannot be written has its files already."""
    folder = Path(torch.hub.get_dir())
    if folder.exists() and not os.access(folder, os.W_OK):
        return nullcontext()
    make_folder(folder)
    return file_lock(folder / ".sfw-dist.lock")
