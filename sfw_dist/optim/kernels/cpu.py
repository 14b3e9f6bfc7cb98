"""The step of all tensors of a rank in one call, on the CPU: fills in what cpu_step.cpp works on."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sfw_dist.optim.kernels.compile import library
from sfw_dist.optim.kernels.interface import DTYPE_CODES, LAYOUT_CODES, RESCALE_CODES, KernelShard

# The fields of `Task` in cpu_step.cpp.
_TASK = np.dtype(
    [
        *((name, np.uint64) for name in ("theta", "gradient", "m", "slot")),
        *((name, np.int64) for name in ("n", "support")),
        *((name, np.float64) for name in ("diameter", "lr", "momentum", "weight_decay")),
        ("radius", np.float32),
        *((name, np.int32) for name in ("kind", "type", "rescale", "first")),
        *((name, np.float32) for name in ("threshold", "drift")),
        *((name, np.int32) for name in ("missed", "sampled")),
        ("row", np.int64),
        *((name, np.int32) for name in ("low", "high", "shift", "range", "bound")),
        ("wanted", np.int64),
    ],
    align=True,
)
_ROW, _BLOCKS, _CANDIDATES, _RANGES, _SAMPLES, _BINS, _WAVE = 8192, 128, 2048, 64, 32, 2048, 320


def available() -> bool:
    """Whether the kernels are compiled, or can be."""
    return library() is not None


def _check_fields(compiled: ctypes.CDLL) -> None:
    """That the compiled code and this module agree on where each field of a task lies."""
    offsets = (ctypes.c_int64 * (len(_TASK.names or ()) + 1))()
    compiled.task_fields(offsets)
    expected = [*(_TASK.fields[name][1] for name in _TASK.names or ()), _TASK.itemsize]  # type: ignore[index]
    assert list(offsets) == expected, (list(offsets), expected)


class CPUKernel:
    """A :class:`~sfw_dist.optim.kernels.interface.Kernel`, with all memory that it works in."""

    def __init__(self, shards: Sequence[KernelShard]) -> None:
        compiled = library()
        assert compiled is not None
        _check_fields(compiled)
        self._library = compiled
        self._shards = shards
        self._own = [i for i, shard in enumerate(shards) if shard.written is not None]
        self._staged: dict[tuple[str, int], Tensor] = {}
        self._staged_now: set[tuple[str, int]] = set()
        """Those of the present call; the others are memory for parameters that are row-major by now."""
        self._computed = self._tasks([(shards[i], shards[i].written) for i in self._own])
        self._updated = self._tasks([(shard, shard.read) for shard in shards])
        self._scratch = _Scratch(shards)

    @staticmethod
    def _tasks(pairs: Sequence[tuple[KernelShard, Tensor | None]]) -> NDArray[Any]:
        tasks = np.zeros(len(pairs), _TASK)
        for task, (shard, slot) in zip(tasks, pairs, strict=True):
            assert slot is not None and slot.data_ptr() % 8 == 0
            task["slot"], task["n"], task["support"] = slot.data_ptr(), shard.codec.n, shard.codec.support
            task["diameter"], task["radius"] = shard.diameter, shard.codec.radius or 0.0
            task["kind"], task["type"] = LAYOUT_CODES[shard.codec.layout], DTYPE_CODES[shard.parameter.dtype]
        return tasks

    @staticmethod
    def takes(gradient: Tensor, parameter: Tensor) -> bool:
        """Whether the compiled code reads the gradient as it is: it has its parameter's type."""
        return gradient.dtype == parameter.dtype

    def compute_vertices(
        self,
        gradients: Sequence[Tensor | None],
        momenta: Sequence[Tensor | None],
        options: Sequence[dict[str, Any]],
    ) -> None:
        """Momentum, vertex and statistics."""
        tasks = self._computed
        tasks["theta"] = [self._address("theta", i, self._shards[i].parameter) for i in self._own]
        tasks["gradient"] = [
            0 if gradient is None else self._address("gradient", i, gradient)
            for i, gradient in zip(self._own, gradients, strict=True)
        ]
        tasks["m"] = [0 if m is None else m.data_ptr() for m in momenta]
        for name in ("lr", "momentum", "weight_decay", "first"):
            tasks[name] = [values[name] for values in options]
        tasks["rescale"] = [RESCALE_CODES[values["rescale"]] for values in options]
        self._call(self._library.compute_vertices, tasks)

    def apply_update(self) -> None:
        """Every shard's parameter after the step."""
        self._staged_now.clear()
        self._updated["theta"] = [self._address("theta", i, shard.parameter) for i, shard in enumerate(self._shards)]
        self._call(self._library.apply_update, self._updated)
        for shard in self._shards if self._staged_now else ():
            key = ("theta", id(shard.parameter))
            if key in self._staged_now:
                shard.parameter.copy_(self._staged[key])

    def _address(self, what: str, index: int, x: Tensor) -> int:
        """Of the shard's first entry: in the tensor, or in a copy where memory is not row-major (channels_last)."""
        shard = self._shards[index]
        if not x.is_contiguous() or x.is_neg():
            # One copy a parameter, shared by all its shards.
            key = (what, id(shard.parameter))
            if key not in self._staged:
                self._staged[key] = torch.empty(x.shape, dtype=x.dtype)
            self._staged_now.add(key)
            x = self._staged[key].copy_(x)
        return x.data_ptr() + shard.start * x.element_size()

    def _call(self, function: Any, tasks: NDArray[Any]) -> None:
        threads = torch.get_num_threads()
        function(
            ctypes.c_void_p(tasks.ctypes.data),
            ctypes.c_int64(len(tasks)),
            ctypes.c_void_p(self._scratch.addresses(threads).ctypes.data),
            ctypes.c_int32(threads),
        )


class _Scratch:
    """Memory of the kernels, as much as the longest wave of rows needs."""

    def __init__(self, shards: Sequence[KernelShard]) -> None:
        rows = [-(-shard.codec.n // _ROW) for shard in shards]
        wave = min(sum(rows), max(_WAVE, *rows, 0)) if rows else 0
        self._arrays: list[NDArray[Any]] = [
            np.zeros(wave * _BLOCKS, np.uint64),
            np.zeros(wave * _CANDIDATES, np.uint64),
            np.zeros(wave * _RANGES, np.int32),
            np.zeros(wave * _SAMPLES, np.int32),
            np.zeros(2 * sum(rows), np.int64),
            np.zeros(3 * wave, np.float64),
        ]
        self._histogram = np.zeros(0, np.int64)
        self._addresses = np.zeros(0, np.uint64)

    def addresses(self, threads: int) -> NDArray[np.uint64]:
        if self._histogram.size < (threads + 1) * _BINS:
            self._histogram = np.zeros((threads + 1) * _BINS, np.int64)
            arrays = (*self._arrays, self._histogram)
            self._addresses = np.array([array.ctypes.data for array in arrays], np.uint64)
        return self._addresses
