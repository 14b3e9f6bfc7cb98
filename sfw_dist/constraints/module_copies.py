"""Copies of modules to call initializers on."""

from __future__ import annotations

import copy
import math
import random
from collections import Counter, OrderedDict, defaultdict, deque
from types import MethodType, SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sfw_dist.distributed.dtensor import full_tensor

_REGISTERED = ("_parameters", "_buffers", "_modules")
_CONTAINERS = (list, tuple, dict, OrderedDict, defaultdict, Counter, set, deque, SimpleNamespace)
_WITH_STATE = (np.ndarray, np.random.Generator, np.random.RandomState, random.Random)


class ModuleCopies:
    """Modules with their children, on the CPU, with parameters, buffers and other tensors of their own.

    They are whole ones where the module's are divided between ranks; ``copy.deepcopy`` refuses such modules. Parameters
    are NaN, so that those that an initializer does not set are seen. Containers, generators and bound methods are
    copied with them; functions and objects of other classes are the module's own.
    """

    def __init__(self) -> None:
        self._made: dict[int, Any] = {}

    def of_module(self, module: nn.Module) -> nn.Module:
        clone: nn.Module = object.__new__(type(module))
        self._made[id(module)] = clone
        # Registered tensors come first: attributes may name them again, and hold others that an initializer writes to.
        own = {key: {k: self._of(v) for k, v in module.__dict__[key].items()} for key in _REGISTERED}
        clone.__dict__.update(own)
        clone.__dict__.update({key: self._of(v) for key, v in module.__dict__.items() if key not in _REGISTERED})
        return clone

    def _of(self, value: Any) -> Any:
        if id(value) in self._made:
            return self._made[id(value)]
        if isinstance(value, nn.Module):
            return self.of_module(value)
        if isinstance(value, nn.Parameter):
            self._made[id(value)] = _not_set(value)
        elif isinstance(value, Tensor):
            self._made[id(value)] = _on_cpu(value)
        elif isinstance(value, torch.Generator):
            self._made[id(value)] = value.clone_state()
        elif isinstance(value, _WITH_STATE):
            self._made[id(value)] = copy.deepcopy(value)
        elif type(value) in _CONTAINERS:
            return self._of_container(value)
        elif isinstance(value, MethodType) and id(value.__self__) in self._made:
            return MethodType(value.__func__, self._made[id(value.__self__)])
        return self._made.get(id(value), value)

    def _of_container(self, value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(self._of(entry) for entry in value)
        made = self._made[id(value)] = copy.copy(value)
        if isinstance(value, SimpleNamespace):
            vars(made).update({key: self._of(entry) for key, entry in vars(value).items()})
            return made
        made.clear()
        if isinstance(value, dict):
            made.update({self._of(key): self._of(entry) for key, entry in value.items()})
        else:
            (made.update if isinstance(value, set) else made.extend)(self._of(entry) for entry in value)
        return made


def _not_set(parameter: Tensor) -> nn.Parameter:
    real = parameter.is_floating_point()
    fill = math.nan if real and parameter.dtype.itemsize > 1 else 0
    return nn.Parameter(torch.full(parameter.shape, fill, dtype=parameter.dtype, device="cpu"), real)


def _on_cpu(x: Tensor) -> Tensor:
    if x.is_meta:
        return torch.zeros(x.shape, dtype=x.dtype, device="cpu")
    return full_tensor(x).detach().cpu().clone()
