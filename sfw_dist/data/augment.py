"""Random crop and flip of a batch, the same whatever the backend, the number of threads or the world size."""

from __future__ import annotations

import numpy as np
from torch import Tensor, from_numpy

from sfw_dist.data.order import Ids, counter_hash


def crop_flip(images: Tensor, ids: Ids, *, seed: int, epoch: int, padding: int, flip: bool) -> Tensor:
    """Shift each image by up to ``padding`` pixels (zeros move in) and, if ``flip``, mirror half of them left to right.

    ``images``: uint8 ``(B, C, H, W)`` on the CPU, fastest in channels_last; the result is new and in channels_last.
    The draws of an image depend on ``(seed, epoch, its id)`` alone. ``padding=0, flip=False`` is the identity.

    One slice a sample: a vectorised gather reads an index of 8 bytes a pixel and measures slower.
    """
    batch, _, height, width = images.shape
    top, left = (_below(2 * padding + 1, counter_hash(seed, epoch, ids, axis)) for axis in (0, 1))
    mirrored = _below(1 + flip, counter_hash(seed, epoch, ids, 2)).astype(bool)

    source = images.permute(0, 2, 3, 1).numpy()  # (B, H, W, C)
    margin = (padding, padding)
    padded = np.pad(source, ((0, 0), margin, margin, (0, 0)))
    out = np.empty_like(source, order="C")
    for i in range(batch):
        window = padded[i, top[i] : top[i] + height, left[i] : left[i] + width]
        out[i] = window[:, ::-1] if mirrored[i] else window
    return from_numpy(out).permute(0, 3, 1, 2)


def _below(n: int, bits: np.ndarray) -> np.ndarray:
    """Uniform integers in [0, n) from 64 random bits each; the bias is below n / 2³²."""
    return ((bits >> np.uint64(32)) * np.uint64(n) >> np.uint64(32)).astype(np.int64)
