"""Whole images that are stored as JPEGs: their file, which box of each becomes a sample, and a backend without FFCV."""

from __future__ import annotations

import io
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from sfw_dist.data.loading.augment import HEIGHT, LEFT, TOP, WIDTH, Augmentation, SampleParams
from sfw_dist.data.loading.augment_numba import transform_sample
from sfw_dist.data.loading.backend import Batch
from sfw_dist.data.pixels import middle_box
from sfw_dist.data.sampler import Ids

JPEG_ROW = np.dtype([("address", "<u8"), ("bytes", "<u4"), ("crc", "<u4"), ("height", "<u2"), ("width", "<u2")])
"""A sample's place in the beton, the length and the CRC-32 of its JPEG, and the size of its image."""


class JpegFile:
    """The JPEGs of one part, in a memory map that the processes of a machine share.

    Args:
        path: of the beton.
        table: where each lies, see :data:`~sfw_dist.data.loading.jpeg.JPEG_ROW`.
    """

    def __init__(self, path: Path, table: NDArray[Any]) -> None:
        self.path, self.table = path, table
        self.file: NDArray[np.uint8] = np.memmap(path, np.uint8, "r")

    def fits(self) -> bool:
        """Whether the table is of such a file."""
        starts, sizes, end = self.table["address"], self.table["bytes"], len(self.file)
        inside = (starts < end) & (sizes <= end - np.minimum(starts, end))
        return bool(inside.all() and self.table["height"].all() and self.table["width"].all())

    def content(self, sample: int) -> NDArray[np.uint8]:
        """The bytes of a sample's JPEG.

        Raises:
            ValueError: they are not those that were written. A decoder would make an image of some kind of them.
        """
        row = self.table[sample]
        start = int(row["address"])
        content = self.file[start : start + int(row["bytes"])]
        if zlib.crc32(content.data) != row["crc"]:
            raise ValueError(f"its JPEG in {self.path} is damaged: its CRC-32 is not that of the preparation")
        return content

    def check(self, samples: Ids) -> None:
        """Check the bytes of samples; raises what `content` does."""
        for sample in samples:
            self.content(sample)


class JpegBackend:
    """Decodes JPEGs by Pillow (see :class:`sfw_dist.data.loading.backend.Backend`).

    The pixels differ from those of FFCV, whose decoder rounds more coarsely, by 1 on average and a few at most.

    Args:
        jpegs: the part's file.
        labels: ``(n,)``.
        image_shape: ``(channels, height, width)`` of the batches.
    """

    threaded = True

    def __init__(self, jpegs: JpegFile, labels: Ids, image_shape: tuple[int, int, int]) -> None:
        self._jpegs, self._labels = jpegs, labels
        channels, height, width = image_shape
        self._sample_shape = (height, width, channels)

    def fetch(self, ids: Ids, params: SampleParams) -> Batch:
        out = np.empty((len(ids), *self._sample_shape), np.uint8)
        middle = np.empty(self._sample_shape, np.uint8)
        for sample, (box, augmentation), result in zip(ids, params, out, strict=True):
            with Image.open(io.BytesIO(self._jpegs.content(sample).tobytes())) as file:
                image = np.asarray(file.convert("RGB"))
            transform_sample(image, box, middle)
            transform_sample(middle, augmentation, result)
        return torch.from_numpy(out).permute(0, 3, 1, 2), torch.from_numpy(self._labels[ids])

    def close(self) -> None:
        del self._jpegs


def jpeg_params(
    augmentation: Augmentation,
    table: NDArray[Any],
    ids: Ids,
    size: tuple[int, int],
    *,
    seed: int,
    epoch: int,
) -> SampleParams:
    """Choose the parameters of whole images in one epoch.

    Args:
        augmentation: of which a random box is taken from the whole image, and all else from the box or the middle.
        table: with the size of each stored image.
        ids: of the samples, ``(n,)``.
        size: height and width of the batches.
        seed: of the run.
        epoch: whose parameters are chosen.

    Returns:
        ``(n, 2, 8)``: the box of the stored image, and what is done to it once it has the size of the batches.
    """
    height, width = (table[side][ids].astype(np.int64) for side in ("height", "width"))
    out = np.zeros((len(ids), 2, 8), np.int64)
    if augmentation.random_resized_crop:
        only_box = Augmentation(random_resized_crop=augmentation.random_resized_crop)
        out[:, 0] = only_box.sample_params(ids, (height, width), seed=seed, epoch=epoch)
    else:
        box = middle_box(height, width, *size)
        for column, values in zip((TOP, LEFT, HEIGHT, WIDTH), box, strict=True):
            out[:, 0, column] = values
    rest = replace(augmentation, random_resized_crop=0.0)
    out[:, 1] = rest.sample_params(ids, size, seed=seed, epoch=epoch)
    return out
