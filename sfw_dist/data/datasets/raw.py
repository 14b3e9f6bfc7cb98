"""What the reader of a data set returns: arrays, or image files that are decoded later."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class ImageFiles(NamedTuple):
    """Images that do not fit in memory: one file for each sample, in the order of the labels."""

    paths: tuple[Path, ...]
    fit: bool = False
    """Scale and crop an image of another size; otherwise it counts as a bad file."""


Images = NDArray[np.uint8] | ImageFiles
"""An array has the shape ``(n, height, width, channels)``."""


class RawArrays(NamedTuple):
    """Images and labels of both parts; labels are int64 ``(n,)``."""

    train_images: Images
    train_labels: NDArray[np.int64]
    test_images: Images
    test_labels: NDArray[np.int64]
    classes: tuple[str, ...] | None = None
    """Names of the classes, when the raw data rather than the registry holds them."""
    files: tuple[Path, ...] = ()
    """The raw files that were read, besides those of ``ImageFiles``."""
    left_out: tuple[str, ...] = ()
    """``path (reason)`` of each file that is no sample."""
    notes: tuple[str, ...] = ()
    """What else people should know of how the raw data was read: one sentence each."""
