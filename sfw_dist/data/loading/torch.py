"""The torch and gpu backends: the prepared array, indexed by torch operations where it lies."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from sfw_dist.data.loading.augment import Draws, render
from sfw_dist.data.loading.backend import Batch
from sfw_dist.data.sampler import Ids
from sfw_dist.errors import UserError


class TorchBackend:
    """Batches from ``images`` uint8 ``(n, H, W, C)`` and ``labels`` (see
    :class:`sfw_dist.data.loading.backend.Backend`).

    On the CPU the arrays are used as they are and must be writable, or torch would not take them. On a GPU the whole
    part is copied there, batches are made there, and nothing but ids and draws follows. Raises :class:`UserError` when
    it does not fit.
    """

    def __init__(self, images: NDArray[np.uint8], labels: Ids, device: torch.device) -> None:
        self.threaded = device.type == "cpu"
        self._device = device
        try:
            self._images, self._labels = (torch.from_numpy(array).to(device) for array in (images, labels))
        except torch.OutOfMemoryError:
            raise UserError(
                f"data.backend gpu: {images.nbytes / 1e9:.1f} GB do not fit on {device}: write data.backend ram"
            ) from None

    def fetch(self, ids: Ids, draws: Draws) -> Batch:
        rows = torch.from_numpy(ids).to(self._device, non_blocking=True)
        return render(self._images, ids, draws), self._labels[rows]

    def close(self) -> None:
        del self._images, self._labels
