"""From a loader's batch to the arguments of a model."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from sfw_dist.errors import UserError


def model_arguments(model: nn.Module, batch: Any, device: torch.device) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments with which ``model`` is called for a batch.

    Args:
        model: the network, which may be compiled, or wrapped for several GPUs or ranks.
        batch: a tensor, or a tuple or list that begins with the inputs. Inputs in a dictionary become keyword arguments
            by their names, as Hugging Face's models expect; what ``model.forward`` has no name for, is left out.
        device: to which tensors are moved.

    Raises:
        UserError: a batch without entries, or a dictionary of which the model takes nothing.

    Example:
        >>> class Net(nn.Module):
        ...     def forward(self, pixels): ...
        >>> cpu = torch.device("cpu")
        >>> model_arguments(Net(), {"pixels": torch.ones(1), "labels": torch.zeros(1)}, cpu)
        ((), {'pixels': tensor([1.])})
        >>> model_arguments(Net(), [torch.ones(1), torch.zeros(1)], cpu)
        ((tensor([1.]),), {})
    """
    if isinstance(batch, tuple | list):
        if not batch:
            raise UserError(f"a batch is an empty {type(batch).__name__}: give tensors, or (inputs, labels)")
        batch = batch[0]
    if not isinstance(batch, Mapping):
        return (_moved(batch, device),), {}
    parameters = inspect.signature(_unwrapped(model).forward).parameters
    takes_all = any(parameter.kind == parameter.VAR_KEYWORD for parameter in parameters.values())
    named = {name for name, parameter in parameters.items() if parameter.kind != parameter.POSITIONAL_ONLY}
    taken = {name: value for name, value in batch.items() if takes_all or name in named}
    if not taken:
        keys, takes = ", ".join(map(str, batch)) or "none", ", ".join(parameters) or "nothing"
        raise UserError(
            f"a batch has the keys {keys}, and forward takes {takes}: name them alike, or give (inputs, labels)"
        )
    return (), {name: _moved(value, device) for name, value in taken.items()}


def _unwrapped(model: nn.Module) -> nn.Module:
    """The network itself, which has its own forward's signature."""
    while True:
        if hasattr(model, "_orig_mod"):  # torch.compile's
            model = model._orig_mod  # type: ignore[assignment]
        elif isinstance(model, DataParallel | DistributedDataParallel):
            model = model.module
        else:
            return model


def _moved(value: Any, device: torch.device) -> Any:
    """A batch's tensors on the device, in whatever lists, tuples and dictionaries they are."""
    if isinstance(value, Mapping):
        return {key: _moved(entry, device) for key, entry in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_moved(entry, device) for entry in value))
    if isinstance(value, tuple | list):
        return type(value)(_moved(entry, device) for entry in value)
    return value.to(device) if hasattr(value, "to") else value
