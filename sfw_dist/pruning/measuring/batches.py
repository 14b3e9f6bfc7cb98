"""From a loader's batch to the arguments of a model, and to what its outputs are compared with."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from sfw_dist.errors import UserError


@dataclass(frozen=True)
class Batch:
    """A batch on the model's device."""

    arguments: tuple[Any, ...]
    keywords: Mapping[str, Any]
    targets: Any
    """What a metric compares the outputs with; ``None``: the loader gives nothing."""
    size: int
    """How many samples; 0 without targets, if no tensor tells."""

    def call(self, model: nn.Module) -> Any:
        """The model's output; it may change its inputs, for they are copies."""
        return model(*_copied(self.arguments), **_copied(dict(self.keywords)))

    def own_targets(self) -> Any:
        """A copy of the targets, which a metric may change."""
        return _copied(self.targets)


def check_loader(loader: object, name: str) -> None:
    """Raise :class:`UserError` if an argument of this name gives no batches."""
    if not (hasattr(loader, "__iter__") or hasattr(loader, "__getitem__")):
        raise UserError(f"{name} is {loader!r}, which gives no batches: give a DataLoader, or a list of batches")


def input_batches(model: nn.Module, batches: Iterable[Any], device: torch.device) -> Iterator[Batch]:
    """The arguments for ``model`` in each of a loader's batches, without targets.

    Batches without samples are left out: they would count in means over batches.

    Raises:
        UserError: as :func:`model_arguments`.
    """
    for batch in batches:
        arguments, keywords = model_arguments(model, batch, device)
        if (size := _size((arguments, keywords))) != 0:
            yield Batch(arguments, keywords, None, size or 0)


def labelled_batch(model: nn.Module, batch: Any, device: torch.device) -> Batch:
    """The arguments for ``model`` and the targets in a loader's batch.

    Args:
        model: the network.
        batch: as for :func:`model_arguments`. The targets are the second entry of a tuple or list; of a dictionary what
            it names ``labels`` or ``label``, or else the whole of it.
        device: to which tensors are moved.

    Raises:
        UserError: as :func:`model_arguments`, or a batch in which no tensor tells the number of samples.

    Example:
        >>> found = labelled_batch(nn.Linear(4, 2), (torch.ones(3, 4), torch.zeros(3)), torch.device("cpu"))
        >>> found.targets, found.size
        (tensor([0., 0., 0.]), 3)
    """
    arguments, keywords = model_arguments(model, batch, device)
    targets = None
    if isinstance(batch, Mapping):
        targets = next((batch[name] for name in ("labels", "label") if name in batch), batch)
    elif isinstance(batch, tuple | list) and len(batch) > 1:
        targets = batch[1]
    targets = _moved(targets, device)
    sizes = map(_size, (targets, arguments, keywords))
    size = next((size for size in sizes if size is not None), None)
    if size is None:
        raise UserError(f"a batch is a {type(batch).__name__} without a tensor (batch, ...): give (inputs, labels)")
    return Batch(arguments, keywords, targets, size)


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


def without_ddp(model: nn.Module) -> nn.Module:
    """What to call so that DistributedDataParallel sends no buffers and waits for nobody."""
    inner = getattr(model, "_orig_mod", model)
    return inner.module if isinstance(inner, DistributedDataParallel) else model


def device_of(model: nn.Module) -> torch.device:
    """Where the model's first parameter is.

    Raises:
        UserError: it has neither parameters nor buffers.
    """
    first = next(chain(model.parameters(), model.buffers()), None)
    if first is None:
        raise UserError(f"{type(model).__name__} has no parameters: give a model with weights")
    return first.device


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
    return _mapped(value, lambda leaf: leaf.to(device) if hasattr(leaf, "to") else leaf)


def _copied(value: Any) -> Any:
    return _mapped(value, lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf)


def _mapped(value: Any, change: Callable[[Any], Any]) -> Any:
    """A batch with each leaf changed, in whatever lists, tuples and dictionaries they are."""
    if isinstance(value, Mapping):
        return {key: _mapped(entry, change) for key, entry in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_mapped(entry, change) for entry in value))
    if isinstance(value, tuple | list):
        return type(value)(_mapped(entry, change) for entry in value)
    return change(value)


def _size(value: Any) -> int | None:
    """How many samples a tensor has, a list of one entry a sample, or the first tensor in a tuple or a dictionary."""
    if isinstance(value, Tensor):
        return len(value) if value.ndim else None
    if isinstance(value, list):
        return len(value)
    entries = value.values() if isinstance(value, Mapping) else value if isinstance(value, tuple) else ()
    return next((size for size in map(_size, entries) if size is not None), None)
