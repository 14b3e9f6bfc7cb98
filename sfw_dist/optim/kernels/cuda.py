"""The step on a GPU: all tensors in five launches for the owner's part and two for the move, without the host.

The kernels and what they cost stand in :mod:`sfw_dist.optim.kernels.triton_kernels`, what they compute in
:mod:`sfw_dist.optim.update`. Only a process that steps on a GPU imports this module, for it imports Triton.
"""

from __future__ import annotations

import itertools
import struct
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sfw_dist.optim.kernels import triton_kernels as kernels
from sfw_dist.optim.kernels import triton_layout as layout
from sfw_dist.optim.kernels.interface import DTYPE_CODES, LAYOUT_CODES, RESCALE_CODES, KernelShard

# Entries of a row and warps of its program, 16 entries a thread.
_ROW = 4096
_WARPS = 8
_READABLE = (torch.float32, torch.bfloat16, torch.float16)
"""Types of parameters and gradients that the kernels read."""


class CUDAKernel:
    """The step of one or more shards, all on one GPU; a :class:`~sfw_dist.optim.kernels.interface.Kernel`.

    Nothing waits for the GPU. The calls may be captured in a CUDA graph after they ran once. Its replays read and write
    the memory that was given then, and need this object to live; a learning rate that is to change between them is a
    tensor on the GPU, float32 or float64.

    Args:
        shards: their sums are added in an order that is the same in every step, but is not that of a CPU.
        row: entries that a program handles, a power of two from 32 on; tests take few.
    """

    def __init__(self, shards: Sequence[KernelShard], row: int = _ROW) -> None:
        for shard in shards:
            _check(shard)
        self._shards = list(shards)
        self._own = [i for i, shard in enumerate(shards) if shard.written is not None]
        self._device = shards[0].parameter.device
        self._row = row
        rows = [-(-shard.codec.n // row) for shard in shards]
        first_rows = itertools.accumulate(rows, initial=0)
        self._fixed = self._tensor([_columns(*of) for of in zip(shards, first_rows, rows, strict=False)], torch.int64)

        def programs(chosen: Sequence[bool]) -> Tensor:
            """int32 ``(programs, 2)``: shard, and row of it."""
            table = [(i, j) for i, count in enumerate(rows) if chosen[i] for j in range(count)]
            return self._tensor(table, torch.int32).view(len(table), 2)

        hows = [shard.codec.layout for shard in shards]
        own = [shard.written is not None for shard in shards]
        self._owned_rows = programs(own)
        self._sparse_rows = programs([mine and how != "all" for mine, how in zip(own, hows, strict=True)])
        self._mask_rows = programs([how == "mask" for how in hows])
        self._rows = programs([True] * len(shards))

        self._state = self._zeros(len(shards), layout.STATE.value, dtype=torch.int32)
        self._histogram = self._zeros(len(shards), kernels.HIGH_BINS.value, dtype=torch.int32)
        self._counts = self._zeros(sum(rows), 2, dtype=torch.int32)
        self._sums = self._zeros(sum(rows), 3, dtype=torch.float64)
        self._steps = _Table(len(shards), layout.STEP.value, self._device)
        self._parameters = _Table(len(shards), 1, self._device)
        self._staged: dict[tuple[str, Tensor, torch.dtype], Tensor] = {}

    @staticmethod
    def takes(gradient: Tensor, parameter: Tensor) -> bool:
        """Whether the kernels read the gradient as it is, whatever its parameter's type."""
        return gradient.dtype in _READABLE

    def compute_vertices(
        self,
        gradients: Sequence[Tensor | None],
        momenta: Sequence[Tensor | None],
        options: Sequence[dict[str, Any]],
    ) -> None:
        """Momentum, vertex and statistics."""
        table = [(0,) * layout.STEP.value] * len(self._shards)
        for i, gradient, m, values in zip(self._own, gradients, momenta, options, strict=True):
            if gradient is not None and m is not None:
                table[i] = self._step(self._shards[i], gradient, m, values)
        steps, state, histogram, counts = self._steps.send(table), self._state, self._histogram, self._counts
        self._launch(kernels.momentum_kernel, self._owned_rows, steps, state, histogram)
        for shift in (kernels.LOW_BITS.value, 0):
            self._launch(kernels.histogram_kernel, self._sparse_rows, steps, state, histogram, SHIFT=shift)
        self._launch(kernels.count_kernel, self._sparse_rows, steps, state, counts)
        self._launch(kernels.encode_kernel, self._sparse_rows, steps, state, counts, self._sums)

    def apply_update(self) -> None:
        """Every shard's parameter after the step."""
        rows = {p: self._row_major("theta", p, p) for p in dict.fromkeys(shard.parameter for shard in self._shards)}
        parameters = self._parameters.send([(_address(shard, rows[shard.parameter]),) for shard in self._shards])
        self._launch(kernels.count_mask_kernel, self._mask_rows, self._state, self._counts)
        self._launch(kernels.update_kernel, self._rows, parameters, self._counts)
        for parameter, moved in rows.items():
            if moved is not parameter:
                parameter.copy_(moved)

    def _step(self, shard: KernelShard, gradient: Tensor, m: Tensor, options: dict[str, Any]) -> tuple[int, ...]:
        """A row of the table of steps, in the order of :mod:`sfw_dist.optim.kernels.triton_layout`."""
        g = self._row_major("gradient", shard.parameter, gradient)
        theta = self._row_major("theta", shard.parameter, shard.parameter)
        lr = options["lr"]
        # One on the GPU must not be read here: it would wait.
        there = isinstance(lr, Tensor) and lr.device == self._device
        return (
            _address(shard, g),
            DTYPE_CODES[g.dtype],
            _address(shard, theta),
            m.data_ptr(),
            0 if there else _bits(lr),
            lr.data_ptr() if there else 0,
            DTYPE_CODES[lr.dtype] if there else 0,
            _bits(options["momentum"]),
            _bits(options["weight_decay"]),
            RESCALE_CODES[options["rescale"]],
            int(options["first"]),
        )

    def _row_major(self, what: str, parameter: Tensor, x: Tensor) -> Tensor:
        """The parameter or its gradient or, where the kernels cannot read it (channels_last), a copy of it."""
        if x.is_contiguous() and not x.is_neg():
            return x
        key = (what, parameter, x.dtype)
        if key not in self._staged:
            self._staged[key] = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        return self._staged[key].copy_(x)

    def _launch(self, kernel: Any, rows: Tensor, *arguments: Tensor, **constants: int) -> None:
        if len(rows) == 0:
            return
        with torch.cuda.device_of(rows):  # else Triton launches on whatever device is the current one
            launch = kernel[(len(rows),)]
            launch(rows, self._fixed, *arguments, ROW=self._row, **constants, num_warps=_WARPS, enable_fp_fusion=False)

    def _tensor(self, rows: list[Any], dtype: torch.dtype) -> Tensor:
        return torch.tensor(rows, dtype=dtype, device=self._device)

    def _zeros(self, *shape: int, dtype: torch.dtype) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=self._device)


class _Table:
    """int64 ``(rows, columns)`` on the device, sent there without waiting and only when it changed."""

    def __init__(self, rows: int, columns: int, device: torch.device) -> None:
        self._there = torch.zeros(rows, columns, dtype=torch.int64, device=device)
        self._sent: list[tuple[int, ...]] | None = None
        self._for_a_graph = self._memory_for_a_graph()
        self._of_graphs: list[tuple[Tensor, Tensor]] = []

    def send(self, rows: list[tuple[int, ...]]) -> Tensor:
        """The table on the device, when the current stream gets there."""
        on_a_gpu = self._there.device.type == "cuda"
        if on_a_gpu and torch.cuda.is_current_stream_capturing():
            return self._send_in_a_graph(rows)
        if self._for_a_graph is None:
            self._for_a_graph = self._memory_for_a_graph()
        if rows != self._sent:
            # New host memory each time: the copy from the last may be still to come. Torch reuses it when it is done.
            self._there.copy_(torch.tensor(rows, dtype=torch.int64, pin_memory=on_a_gpu), non_blocking=True)
            self._sent = rows
        return self._there

    def _send_in_a_graph(self, rows: list[tuple[int, ...]]) -> Tensor:
        """Each replay copies again, to a table that no other step writes, from memory that stays as it is now."""
        if self._for_a_graph is None:
            raise RuntimeError("SFW takes one step in a CUDA graph, and one without between two captures")
        host, there = self._for_a_graph
        self._of_graphs.append(self._for_a_graph)
        self._for_a_graph = None
        host.copy_(torch.tensor(rows, dtype=torch.int64))
        return there.copy_(host, non_blocking=True)

    def _memory_for_a_graph(self) -> tuple[Tensor, Tensor] | None:
        """Pinned and on the device, made beforehand: a capture is no time to allocate."""
        if self._there.device.type != "cuda":
            return None
        return torch.zeros_like(self._there, device="cpu").pin_memory(), torch.zeros_like(self._there)


def _check(shard: KernelShard) -> None:
    assert shard.parameter.dtype in _READABLE and shard.codec.dtype == torch.float32, shard.parameter.dtype
    for slot in (shard.read, shard.written):
        if slot is not None:
            assert slot.dtype == torch.uint8 and slot.shape == (shard.codec.nbytes,), slot.shape
            assert slot.data_ptr() % 8 == 0 and slot.device == shard.parameter.device, slot.device
    if shard.codec.layout != "all":
        assert shard.codec.radius is not None and shard.codec.support > 0, shard.codec


def _columns(shard: KernelShard, first_row: int, rows: int) -> tuple[int, ...]:
    """A row of the table of shards, in the order of :mod:`sfw_dist.optim.kernels.triton_layout`."""
    return (
        DTYPE_CODES[shard.parameter.dtype],
        0 if shard.written is None else shard.written.data_ptr(),
        shard.read.data_ptr(),
        shard.codec.n,
        shard.codec.support,
        LAYOUT_CODES[shard.codec.layout],
        first_row,
        rows,
        _bits(shard.codec.radius or 0.0),
        _bits(shard.diameter),
    )


def _address(shard: KernelShard, x: Tensor) -> int:
    """Of the shard's first entry."""
    return x.data_ptr() + shard.start * x.element_size()


def _bits(x: float) -> int:
    """A float64 as the int64 of the same bits."""
    return int(struct.unpack("<q", struct.pack("<d", x))[0])
