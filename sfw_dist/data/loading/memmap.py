"""The ram backend: the prepared array memory-mapped, one copy for all ranks of a machine, and a compiled kernel."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from sfw_dist.data.loading.augment import Draws
from sfw_dist.data.loading.augment_numba import render_rows
from sfw_dist.data.loading.backend import Batch
from sfw_dist.data.sampler import Ids


class RamBackend:
    """Batches from ``images`` uint8 ``(n, H, W, C)`` and ``labels`` (see
    :class:`sfw_dist.data.loading.backend.Backend`).
    """

    threaded = True

    def __init__(self, images: NDArray[np.uint8], labels: Ids) -> None:
        self._images, self._labels = images, labels

    def fetch(self, ids: Ids, draws: Draws) -> Batch:
        out = torch.empty(len(ids), *self._images.shape[1:], dtype=torch.uint8)
        render_rows(self._images, ids, draws, out.numpy())
        return out.permute(0, 3, 1, 2), torch.from_numpy(self._labels[ids])

    def close(self) -> None:
        """Nothing to release: the memory map goes with its last reference."""
