"""The gpu backend: the whole prepared array on the device, indexed and augmented there by torch operations."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from sfw_dist.data.loading.augment import SampleParams, transform
from sfw_dist.data.loading.backend import Batch
from sfw_dist.data.sampler import Ids
from sfw_dist.errors import UserError


class GPUBackend:
    """Makes batches on a device that holds all samples (see :class:`sfw_dist.data.loading.backend.Backend`).

    Only ids and parameters are copied to the device for each batch.

    Args:
        images: uint8 ``(n, H, W, C)``, writable, as torch demands.
        labels: int64 ``(n,)``.
        device: a GPU; tests take the CPU as a reference.

    Raises:
        UserError: the images do not fit on the device.
    """

    threaded = False

    def __init__(self, images: NDArray[np.uint8], labels: Ids, device: torch.device) -> None:
        self._device = device
        try:
            self._images, self._labels = (torch.from_numpy(array).to(device) for array in (images, labels))
        except torch.OutOfMemoryError:
            raise UserError(
                f"data.backend gpu: {images.nbytes / 1e9:.1f} GB do not fit on {device}: write data.backend ram"
            ) from None

    def fetch(self, ids: Ids, params: SampleParams) -> Batch:
        rows = torch.from_numpy(ids).to(self._device, non_blocking=True)
        return transform(self._images, ids, params), self._labels[rows]

    def close(self) -> None:
        del self._images, self._labels
