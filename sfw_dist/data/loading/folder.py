"""The folder backend, the reference: every image is decoded from its own file each time it is read."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from sfw_dist.data.datasets.raw import ImageFormat
from sfw_dist.data.decode import decode_image
from sfw_dist.data.loading.augment import SampleParams, transform
from sfw_dist.data.loading.backend import Batch
from sfw_dist.data.sampler import Ids


class FolderBackend:
    """Decodes image files as :mod:`sfw_dist.data.prepare` does (see :class:`sfw_dist.data.loading.backend.Backend`).

    Args:
        files: one for each sample.
        labels: int64 ``(n,)``.
        form: of the images.
    """

    threaded = True

    def __init__(self, files: list[Path], labels: Ids, form: ImageFormat) -> None:
        self._files, self._labels, self._form = files, labels, form

    def fetch(self, ids: Ids, params: SampleParams) -> Batch:
        decoded = np.stack([decode_image(self._files[i], self._form) for i in ids])
        images = transform(torch.from_numpy(decoded), np.arange(len(ids)), params)
        return images, torch.from_numpy(self._labels[ids])

    def close(self) -> None:
        """Nothing is held."""
