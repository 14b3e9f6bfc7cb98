"""The fallback backend: memory-mapped arrays, indexed in the calling thread."""

from __future__ import annotations

from collections.abc import Generator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sfw_dist.data.order import Ids


class TorchBackend:
    """Batches from arrays ``(n, H, W, C)`` and ``(n,)`` (see :class:`sfw_dist.data.loader.Backend`)."""

    def __init__(self, images: NDArray[np.uint8], labels: Ids, *, batch_size: int) -> None:
        self._images, self._labels, self._batch_size = images, labels, batch_size

    def batches(self, ids: Ids) -> Generator[tuple[Tensor, Tensor], None, None]:
        for start in range(0, len(ids), self._batch_size):
            batch = ids[start : start + self._batch_size]
            yield torch.from_numpy(self._images[batch]).permute(0, 3, 1, 2), torch.from_numpy(self._labels[batch])

    def close(self) -> None:
        """Nothing to release: the memory map goes with its last reference."""
