"""Weights to start from: tensors by name, from a file or another network."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from sfw_dist.errors import UserError

Tell = Callable[[str], object]
"""Takes a line for the user."""


def load_weights_file(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file, as runs and other programs export.

    Raises:
        UserError: it is not there, or no safetensors file.
    """
    if not path.is_file():
        inside = path / "model.safetensors"
        remedy = f"write {inside}" if inside.is_file() else "write the path of a safetensors file, or true"
        raise UserError(f"model.pretrained: {path} is no file: {remedy}")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise UserError(f"model.pretrained: {path} cannot be read ({error}): give a safetensors file") from None


def load_by_name(model: nn.Module, tensors: Mapping[str, Tensor], source: str, num_classes: int, tell: Tell) -> None:
    """Copy tensors into a network, all but a head for another number of classes, which begins anew.

    Args:
        model: receives them.
        tensors: by the names of its parameters and buffers.
        source: where they are from, for messages.
        num_classes: of the network. A tensor of a head has one row for each class.
        tell: is told which tensors begin anew.

    Raises:
        UserError: a tensor that does not fit, has no numbers that can be weights, is missing, or has no place; a
            network with lazy layers. The network may have changed in part.

    Example:
        >>> net = nn.Linear(4, 2)
        >>> load_by_name(net, nn.Linear(4, 5).state_dict(), "another network", 2, print)
        weight (2, 4), bias (2,) begin anew: another network has weight (5, 4), bias (5,)
    """
    own = model.state_dict(keep_vars=True)
    _refuse_lazy(own, source)
    heads = []
    for name, mine in own.items():
        if name in tensors and (here := tuple(mine.shape)) != (there := tuple(tensors[name].shape)):
            if not (here and there and here[1:] == there[1:] and here[0] == num_classes):
                raise UserError(
                    f"{name} is {there} in {source} and {here} in the network: take weights of the same network, for "
                    "images of as many channels"
                )
            heads.append(name)
    fitting = {n: t for n, t in tensors.items() if n not in heads}
    _check_values(own, fitting, source)
    missing, unexpected = model.load_state_dict(fitting, strict=False)
    loaded = {id(own[name]) for name in own.keys() & tensors.keys()}
    missing = [
        name for name in missing if name not in heads and id(own[name]) not in loaded
    ]  # tied ones have two names
    for names, verb in ((missing, "lacks"), (unexpected, "has")):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            other = "" if names is missing else ", which the network has not"
            raise UserError(f"{source} {verb} {names[0]}{more}{other}: take weights of the same network")
    if heads:
        here_, there_ = (", ".join(f"{n} {tuple(of[n].shape)}" for n in heads) for of in (own, tensors))
        tell(f"{here_} begin anew: {source} has {there_}")


def _refuse_lazy(own: Mapping[str, Tensor], source: str) -> None:
    for name, mine in own.items():
        if is_lazy(mine):
            raise UserError(
                f"{name} is not initialised yet, so the weights of {source} cannot be compared with it: run one batch "
                "through the model first, in the function that builds it"
            )


def _check_values(own: Mapping[str, Tensor], tensors: Mapping[str, Tensor], source: str) -> None:
    """Refuse numbers that are no weights, and two values for one tensor that the network holds under two names."""
    places = defaultdict(list)
    for name in (name for name in own if name in tensors):
        mine, theirs = own[name], tensors[name]
        if mine.is_floating_point() and not theirs.is_floating_point():
            raise UserError(f"{name} is {theirs.dtype} in {source} and {mine.dtype} in the network: store real numbers")
        if theirs.to(mine.dtype).isnan().any():
            raise UserError(f"{name} has NaN in {source}: take weights of a training that did not diverge")
        if mine.numel():
            places[mine.data_ptr(), mine.shape, mine.stride()].append(name)
    for first, *others in places.values():
        dtype = own[first].dtype
        for other in others:
            if not torch.equal(tensors[first].to(dtype), tensors[other].to(dtype)):
                raise UserError(
                    f"{first} and {other} are one tensor in the network and differ in {source}: take weights of the "
                    "same network, or leave one of them out"
                )
