"""Augmentation on the CPU: :func:`sfw_dist.data.loading.augment.transform` compiled, with the same bits.

The functions release the GIL and start no threads of their own, so any number of threads may call them at once. Numba
keeps the machine code on disk, where it may write, and the next process starts with it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

from sfw_dist.data.loading.augment import CUT_LEFT, CUT_SIDE, CUT_TOP, HEIGHT, LEFT, MIRROR, TOP, WIDTH, SampleParams
from sfw_dist.data.sampler import Ids


def _compiled(function: Callable[..., Any]) -> Any:
    """Compile a function; the machine code is kept where numba finds a folder that it can write to."""
    try:
        return njit(nogil=True, cache=True)(function)
    except RuntimeError:  # package and home are read-only, as in containers: it is compiled in every process
        return njit(nogil=True)(function)


@_compiled
def transform_rows(images: NDArray[np.uint8], rows: Ids, params: SampleParams, out: NDArray[np.uint8]) -> None:
    """Augment the samples ``images[rows]`` and write them to ``out``.

    Args:
        images: ``(n, H, W, C)``, C-contiguous.
        rows: of the samples, ``(B,)``.
        params: how each is augmented, ``(B, 8)``.
        out: ``(B, H, W, C)``, C-contiguous.
    """
    for i in range(len(rows)):
        transform_sample(images[rows[i]], params[i], out[i])


@_compiled
def transform_sample(source: NDArray[np.uint8], params: SampleParams, out: NDArray[np.uint8]) -> None:
    """Augment one sample ``(H, W, C)`` with a row of parameters ``(8,)`` and write it to ``out``, of any size."""
    if params[HEIGHT] == out.shape[0] and params[WIDTH] == out.shape[1]:
        _shift(source, params[TOP], params[LEFT], params[MIRROR] == 1, out)
    else:
        _resize(source, params, out)
    _cut(params[CUT_TOP], params[CUT_LEFT], params[CUT_SIDE], out)


@_compiled
def _shift(source: NDArray[np.uint8], top: int, left: int, mirror: bool, out: NDArray[np.uint8]) -> None:
    """Cut a box as large as ``out``: copy or mirror rows, and fill with zeros what is outside."""
    height, width, channels = out.shape
    # Columns inside the image:
    first, last = min(max(0, -left), width), max(0, min(width, source.shape[1] - left))
    for y in range(height):
        row = out[y].reshape(-1)
        if not 0 <= top + y < source.shape[0]:
            row[:] = 0
            continue
        line = source[top + y].reshape(-1)
        if mirror:
            row[: (width - last) * channels] = 0
            row[(width - first) * channels :] = 0
            if channels == 3:  # unrolled: three times as fast
                for x in range(first, last):
                    to, at = 3 * (width - 1 - x), 3 * (left + x)
                    row[to] = line[at]
                    row[to + 1] = line[at + 1]
                    row[to + 2] = line[at + 2]
            else:
                for x in range(first, last):
                    for c in range(channels):
                        row[(width - 1 - x) * channels + c] = line[(left + x) * channels + c]
        else:
            row[: first * channels] = 0
            row[last * channels :] = 0
            inside, origin = row[first * channels : last * channels], line[(left + first) * channels :]
            for i in range(len(inside)):
                inside[i] = origin[i]


@_compiled
def _resize(source: NDArray[np.uint8], params: SampleParams, out: NDArray[np.uint8]) -> None:
    """Scale a box inside the image bilinearly to the size of ``out``."""
    height, width, channels = out.shape
    lines = np.empty((2, width * channels), np.int32)  # two neighbouring rows of the box, scaled along x
    held = np.full(2, -1)  # which rows they are
    columns = np.empty((width, 3), np.int64)
    for x in range(width):
        position = width - 1 - x if params[MIRROR] == 1 else x
        columns[x, 0], columns[x, 1], columns[x, 2] = _taps(position, params[LEFT], params[WIDTH], width)
    for y in range(height):
        y_low, y_high, y_part = _taps(y, params[TOP], params[HEIGHT], height)
        for row in (y_low, y_high):
            if held[row % 2] != row:
                _scale_row(source[row], columns, lines[row % 2])
                held[row % 2] = row
        above, below, line = lines[y_low % 2], lines[y_high % 2], out[y].reshape(-1)
        for i in range(width * channels):
            line[i] = (above[i] * (256 - y_part) + below[i] * y_part + (1 << 15)) >> 16


@_compiled
def _scale_row(pixels: NDArray[np.uint8], columns: NDArray[np.int64], line: NDArray[np.int32]) -> None:
    channels, values = pixels.shape[1], pixels.reshape(-1)
    for x in range(len(columns)):
        low, high, part = columns[x, 0] * channels, columns[x, 1] * channels, columns[x, 2]
        if channels == 3:  # unrolled: three times as fast
            line[3 * x] = values[low] * (256 - part) + values[high] * part
            line[3 * x + 1] = values[low + 1] * (256 - part) + values[high + 1] * part
            line[3 * x + 2] = values[low + 2] * (256 - part) + values[high + 2] * part
        else:
            for c in range(channels):
                line[x * channels + c] = values[low + c] * (256 - part) + values[high + c] * part


@_compiled
def _taps(position: int, start: int, length: int, size: int) -> tuple[int, int, int]:
    at = ((2 * position + 1) * (length << 16)) // (2 * size) - (1 << 15)
    at = max(0, min(at, (length - 1) << 16))
    low = at >> 16
    return start + low, start + min(low + 1, length - 1), (at & 0xFFFF) >> 8


@_compiled
def _cut(top: int, left: int, side: int, out: NDArray[np.uint8]) -> None:
    height, width, _ = out.shape
    for y in range(max(0, top), min(height, top + side)):
        out[y, max(0, left) : max(0, min(width, left + side))] = 0
