"""The step of all tensors of a rank in one call, on the CPU: fills in what step.cpp works on."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sfw_dist.optim.kernels.compile import library
from sfw_dist.optim.kernels.interface import Piece

# As in step.cpp.
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
_KINDS = {"mask": 0, "indices": 1, "all": 2}
_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_RESCALES = {"gradient": 0, "fast_gradient": 1, "diameter": 2, "none": 3}
_ROW, _BLOCKS, _CANDIDATES, _RANGES, _SAMPLES, _BINS, _WAVE = 8192, 128, 2048, 64, 32, 2048, 320


def available() -> bool:
    """Whether the kernels are compiled, or can be."""
    return library() is not None


class CPUKernel:
    """A :class:`~sfw_dist.optim.kernels.interface.Kernel`, with all memory that it works in."""

    def __init__(self, pieces: Sequence[Piece]) -> None:
        compiled = library()
        assert compiled is not None and compiled.task_bytes() == _TASK.itemsize
        self._library = compiled
        self._pieces = pieces
        self._own = [i for i, piece in enumerate(pieces) if piece.written is not None]
        self._staged: dict[tuple[str, int], Tensor] = {}
        self._answers = self._tasks([(pieces[i], pieces[i].written) for i in self._own])
        self._moves = self._tasks([(piece, piece.read) for piece in pieces])
        self._scratch = _Scratch(pieces)

    @staticmethod
    def _tasks(pairs: Sequence[tuple[Piece, Tensor | None]]) -> NDArray[Any]:
        tasks = np.zeros(len(pairs), _TASK)
        for task, (piece, slot) in zip(tasks, pairs, strict=True):
            assert slot is not None and slot.data_ptr() % 8 == 0
            task["slot"], task["n"], task["support"] = slot.data_ptr(), piece.format.n, piece.format.support
            task["diameter"], task["radius"] = piece.diameter, piece.format.radius or 0.0
            task["kind"], task["type"] = _KINDS[piece.format.support_format], _TYPES[piece.parameter.dtype]
        return tasks

    def answer(
        self,
        gradients: Sequence[Tensor | None],
        momenta: Sequence[Tensor | None],
        options: Sequence[dict[str, Any]],
    ) -> None:
        """Momentum, vertex and header; gradients have their parameters' types."""
        tasks = self._answers
        tasks["theta"] = [self._address("theta", i, self._pieces[i].parameter) for i in self._own]
        tasks["gradient"] = [
            0 if gradient is None else self._address("gradient", i, gradient)
            for i, gradient in zip(self._own, gradients, strict=True)
        ]
        tasks["m"] = [0 if m is None else m.data_ptr() for m in momenta]
        for name in ("lr", "momentum", "weight_decay", "first"):
            tasks[name] = [values[name] for values in options]
        tasks["rescale"] = [_RESCALES[values["rescale"]] for values in options]
        self._call(self._library.answer, tasks)

    def move(self) -> None:
        """Every piece's parameter after the step."""
        self._moves["theta"] = [self._address("theta", i, piece.parameter) for i, piece in enumerate(self._pieces)]
        self._call(self._library.move, self._moves)
        for piece in self._pieces if self._staged else ():
            staged = self._staged.get(("theta", id(piece.parameter)))
            if staged is not None:
                piece.parameter.copy_(staged)

    def _address(self, what: str, index: int, x: Tensor) -> int:
        """Of the piece's first entry: in the tensor, or in a copy where memory is not row-major (channels_last)."""
        piece = self._pieces[index]
        if not x.is_contiguous():
            # One copy a parameter, of which all pieces are parts.
            key = (what, id(piece.parameter))
            if key not in self._staged:
                self._staged[key] = torch.empty_like(x, memory_format=torch.contiguous_format)
            x = self._staged[key].copy_(x)
        return x.data_ptr() + piece.start * x.element_size()

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

    def __init__(self, pieces: Sequence[Piece]) -> None:
        rows = [-(-piece.format.n // _ROW) for piece in pieces]
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
