"""Reads the images that were written, a few at a time."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray


class StoredImages:
    """The images of a ``.npy``, read a few at a time: the pages of a memory map would count as memory of this process.

    Args:
        path: of the file, uint8 ``(n, height, width, channels)``.
    """

    def __init__(self, path: Path) -> None:
        images = np.load(path, mmap_mode="r", allow_pickle=False)
        self._path, self._start, self.shape = path, images.offset, images.shape

    def __len__(self) -> int:
        return int(self.shape[0])

    def __getitem__(self, rows: slice) -> NDArray[np.uint8]:
        start, stop, _ = rows.indices(len(self))
        size = int(np.prod(self.shape[1:]))
        images = np.fromfile(self._path, np.uint8, (stop - start) * size, offset=self._start + start * size)
        return images.reshape(-1, *self.shape[1:])
