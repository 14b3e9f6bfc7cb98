"""JPEGs that stand for whole images: how large they are stored, and how they are made."""

from __future__ import annotations

import io
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from sfw_dist.data.datasets.raw import ImageFormat
from sfw_dist.data.pixels import JPEG_HEADER_BYTES, middle_box, stays_whole

QUALITY = 90
"""Of what is encoded, by default; FFCV's default, too."""


class Jpeg(NamedTuple):
    """A whole image as a JPEG file."""

    content: bytes
    height: int
    width: int
    values: NDArray[np.int64]
    """How often each value occurs in each channel of its middle, as evaluation sees it: ``(3, 256)``."""


def kept_jpeg(path: Path, form: ImageFormat) -> Jpeg | None:
    """The file of an image as it is, if it can be stored so: a JPEG in RGB that need not shrink.

    Args:
        path: of the image file.
        form: of the images.

    Raises:
        Exception: Pillow does not know the file.
    """
    if path.suffix == ".npy":
        return None
    with Image.open(path) as file:
        width, height = file.size
        plain = file.format == "JPEG" and file.mode == "RGB"
    fits = (height, width) == (form.height, form.width) or form.fit
    if not (plain and fits and stays_whole(height, width, form)):
        return None
    content = path.read_bytes()
    return _decoded(content, height, width, form) if len(content) <= 3 * height * width + JPEG_HEADER_BYTES else None


def encoded(pixels: NDArray[np.uint8], form: ImageFormat) -> Jpeg:
    """Encode an image.

    Args:
        pixels: ``(height, width, 3)``.
        form: of the images, with the quality.

    Raises:
        ValueError: FFCV refuses what Pillow has written.
    """
    file = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(file, "JPEG", quality=form.jpeg_quality)
    jpeg = _decoded(file.getvalue(), pixels.shape[0], pixels.shape[1], form)
    if jpeg is None:
        raise ValueError("FFCV cannot decode the JPEG that Pillow made of it")
    return jpeg


def _decoded(content: bytes, height: int, width: int, form: ImageFormat) -> Jpeg | None:
    """Decode as the loader will; ``None`` if its decoder complains, of data that ends too early, say."""
    from sfw_dist.data.loading.ffcv import decode_jpeg

    pixels = decode_jpeg(content, height, width)
    if pixels is None:
        return None
    top, left, high, wide = (int(number) for number in middle_box(height, width, form.height, form.width))
    image = Image.fromarray(np.ascontiguousarray(pixels[top : top + high, left : left + wide]))
    image = image.resize((form.width, form.height), Image.Resampling.BILINEAR)  # a copy where nothing is scaled
    return Jpeg(content, height, width, np.array(image.histogram(), np.int64).reshape(3, 256))
