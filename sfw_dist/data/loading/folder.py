"""The folder backend, the reference: every image is decoded from its own file each time it is wanted."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from sfw_dist.data.decode import decode_image
from sfw_dist.data.loading.augment import Draws, render
from sfw_dist.data.loading.backend import Batch
from sfw_dist.data.sampler import Ids


class FolderBackend:
    """Batches from ``files``, one a sample, decoded as :mod:`sfw_dist.data.prepare` does.

    ``fit`` scales and crops images of another size than ``side`` (see :class:`sfw_dist.data.loading.backend.Backend`).
    """

    threaded = True

    def __init__(self, files: list[Path], labels: Ids, side: int, *, fit: bool) -> None:
        self._files, self._labels, self._side, self._fit = files, labels, side, fit

    def fetch(self, ids: Ids, draws: Draws) -> Batch:
        decoded = np.stack([decode_image(self._files[i], self._side, self._fit) for i in ids])
        images = render(torch.from_numpy(decoded), np.arange(len(ids)), draws)
        return images, torch.from_numpy(self._labels[ids])

    def close(self) -> None:
        """Nothing is held."""
