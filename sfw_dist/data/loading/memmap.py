"""The ram backend: one memory map of the prepared array for all ranks of a machine, read by a compiled kernel."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from sfw_dist.data.loading.augment import SampleParams
from sfw_dist.data.loading.augment_numba import transform_rows
from sfw_dist.data.loading.backend import Batch
from sfw_dist.data.sampler import Ids


class MemmapBackend:
    """Reads batches from memory-mapped arrays (see :class:`sfw_dist.data.loading.backend.Backend`).

    Args:
        images: uint8 ``(n, H, W, C)``.
        labels: int64 ``(n,)``.
    """

    threaded = True

    def __init__(self, images: NDArray[np.uint8], labels: Ids) -> None:
        self._images, self._labels = images, labels

    def fetch(self, ids: Ids, params: SampleParams) -> Batch:
        out = torch.empty(len(ids), *self._images.shape[1:], dtype=torch.uint8)
        transform_rows(self._images, ids, params, out.numpy())
        return out.permute(0, 3, 1, 2), torch.from_numpy(self._labels[ids])

    def close(self) -> None:
        """Nothing to release: the memory map goes with its last reference."""
