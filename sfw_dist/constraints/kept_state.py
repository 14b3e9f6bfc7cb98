"""Keeps a model, and the random generators, as they are while initializers are called on copies of its modules.

An initializer may reach the model itself whatever was copied: by a closure, a global variable or an object of a class
of its own. So writes of torch are refused before they happen, on all tensors of the model, and whatever torch does not
see is put back.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cache
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from sfw_dist.distributed.dtensor import to_local

_SEED = 0
_CONTAINERS = (dict, list, set, deque)
_NOT_OPENED = (nn.Module, type, ModuleType, FunctionType, BuiltinFunctionType, MethodType)


@contextmanager
def kept_random_states() -> Iterator[None]:
    """Inside, torch's, NumPy's and Python's global generators may be drawn from; afterwards they are as before."""
    python, legacy = random.getstate(), np.random.get_state()
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(legacy)


def seed_generators() -> None:
    """Give the global generators one state, the same on every rank."""
    torch.default_generator.manual_seed(_SEED)
    if torch.cuda.is_initialized():  # before, a seed would wait there for the first use
        torch.cuda.manual_seed_all(_SEED)
    random.seed(_SEED)
    np.random.seed(_SEED)


class KeptState:
    """What modules hold: their attributes, the containers in them, and their tensors.

    Objects of other classes are looked into where an attribute or a container holds them. What these hold in turn, what
    belongs to classes or to Python modules, and tensors that no module holds are not kept.
    """

    def __init__(self, modules: Iterable[nn.Module], entries: bool = False) -> None:
        """
        Args:
            modules: those whose state is kept.
            entries: keep copies of the tensors' entries too, where they lie in the CPU's memory: NumPy may write there,
                unseen by torch.
        """
        self._containers: dict[int, tuple[Any, Any]] = {}
        self._tensors: dict[int, tuple[Tensor, Tensor]] = {}
        self._arrays: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        for module in modules:
            self._look_into(vars(module), open_objects=True)
        self._entries: list[tuple[Tensor, Tensor]] = []
        if entries:
            self._entries = [(now, now.clone()) for x, _ in self._tensors.values() for now in _bytes(x)]

    def memory(self) -> set[int]:
        """Where the tensors' storages begin."""
        return set().union(*(_memory(x) for x, _ in self._tensors.values()))

    def restore(self) -> bool:
        """Put everything back; returns whether entries of a tensor had changed."""
        for container, before in self._containers.values():
            if not _same(container, before):
                container.clear()
                (container.extend if isinstance(container, list | deque) else container.update)(before)
        for array, values in self._arrays.values():
            array[...] = values
        for x, memory in self._tensors.values():
            if _memory(x) != _memory(memory):
                x.data = memory
        changed = [(now, before) for now, before in self._entries if not torch.equal(now, before)]
        for now, before in changed:
            now.copy_(before)
        return bool(changed)

    def _look_into(self, container: Any, open_objects: bool) -> None:
        if id(container) in self._containers:
            return
        if not isinstance(container, tuple):
            self._containers[id(container)] = container, container.copy()
        for value in [*container, *container.values()] if isinstance(container, dict) else container:
            if isinstance(value, Tensor):
                if id(value) not in self._tensors:
                    self._tensors[id(value)] = value, value.data
            elif isinstance(value, np.ndarray):
                if value.flags.writeable:
                    self._arrays[id(value)] = value, value.copy()
            elif isinstance(value, (*_CONTAINERS, tuple)):
                self._look_into(value, open_objects)
            elif open_objects and not isinstance(value, _NOT_OPENED):
                attributes = getattr(value, "__dict__", None)
                if isinstance(attributes, dict):
                    self._look_into(attributes, open_objects=False)


class RefusedWrites(TorchDispatchMode):
    """Inside, torch raises ``RuntimeError`` before it writes to memory that is not to be written to."""

    def __init__(self, memory: set[int]) -> None:
        """``memory``: where the storages begin."""
        super().__init__()
        self.refused = False
        """Whether there was such a write, which the caller may have caught."""
        self._memory = memory

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        for place, name in _written(func):
            value = args[place] if place < len(args) else kwargs.get(name)
            for x in value if isinstance(value, list | tuple) else (value,):
                if isinstance(x, Tensor) and not self._memory.isdisjoint(_memory(x)):
                    self.refused = True
                    raise RuntimeError("it writes to the model itself")
        return func(*args, **kwargs)


@cache
def _written(operation: Any) -> tuple[tuple[int, str], ...]:
    """The arguments that an operation writes to, by place and name."""
    schema = getattr(operation, "_schema", None)
    arguments = enumerate(schema.arguments if schema is not None else ())
    return tuple((place, a.name) for place, a in arguments if a.alias_info is not None and a.alias_info.is_write)


def _parts(x: Tensor) -> list[Tensor]:
    """The tensors with memory that make up one: a DTensor's local one, those that a subclass wraps, or itself."""
    local = to_local(x)
    if hasattr(local, "__tensor_flatten__"):
        return [part for name in local.__tensor_flatten__()[0] for part in _parts(getattr(local, name))]
    return [local]


def _memory(x: Tensor) -> set[int]:
    """Where the storages begin that a tensor lies in."""
    found = set()
    for part in _parts(x):
        with suppress(RuntimeError):  # sparse layouts have no storage, others none yet
            found.add(part.untyped_storage().data_ptr())
    return found - {0}


def _bytes(x: Tensor) -> Iterator[Tensor]:
    """What a tensor spans of the CPU's memory, as bytes there, which a comparison of NaNs needs."""
    for part in _parts(x):
        if part.device.type == "cpu" and part.layout == torch.strided and not part.is_nested and part.numel():
            length = 1 + sum((size - 1) * stride for size, stride in zip(part.shape, part.stride(), strict=True))
            size, start = length * part.element_size(), part.storage_offset() * part.element_size()
            yield torch.empty(0, dtype=torch.uint8).set_(part.untyped_storage(), start, (size,), (1,))


def _same(container: Any, before: Any) -> bool:
    """Whether it holds the same objects; equal ones may be tensors that have no truth value."""
    if isinstance(container, set):
        return container.symmetric_difference(before) == set()
    if len(container) != len(before):
        return False
    if isinstance(container, dict):
        pairs = zip(container.items(), before.items(), strict=True)
        return all(k is other and v is value for (k, v), (other, value) in pairs)
    return all(a is b for a, b in zip(container, before, strict=True))
