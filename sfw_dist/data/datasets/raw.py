"""What the reader of a data set returns: arrays, image files that are decoded later, or the items of a Dataset."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray


class ImageFormat(NamedTuple):
    """What every image of a data set is brought to."""

    channels: int
    height: int
    width: int
    fit: bool = False
    """Scale and crop an image of another size; otherwise it counts as a bad file."""
    to_grey: bool = False
    """Take the brightness of a coloured image where one channel is wanted; otherwise it counts as a bad file."""
    jpeg_quality: int = 0
    """Of the JPEG in which the whole image is stored, and which readers bring to the size; 0: its pixels are stored."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """``(channels, height, width)``"""
        return self.channels, self.height, self.width


class ImageFiles(NamedTuple):
    """Images that do not fit in memory: one file for each sample, in the order of the labels."""

    paths: tuple[Path, ...]
    base: Path
    """The folder of the raw data set: a sample is known by its path from there, wherever that folder lies."""


class MapDataset(Protocol):
    """A ``torch.utils.data.Dataset`` with a length."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


class Items(NamedTuple):
    """Samples that a Dataset makes, each an image with its label."""

    dataset: MapDataset
    description: str
    """What messages call the part, such as ``train``."""
    names: tuple[str, ...] | None = None
    """Of the classes that its integer labels number; ``None``: the labels stand for themselves."""


Images = NDArray[np.uint8] | ImageFiles | Items
"""An array has the shape ``(n, height, width, channels)``."""
Labels = NDArray[Any] | Sequence[Any]
"""Integers or texts ``(n,)``."""


class RawPart(NamedTuple):
    """The samples of one part."""

    images: Images
    labels: Labels | None
    """``None`` for `Items`, which have their labels with them."""


class RawData(NamedTuple):
    """Both parts of a data set."""

    train: RawPart
    test: RawPart | None
    """``None`` where nobody has decided what to test on."""
    classes: tuple[str, ...] | None = None
    """Names of the classes, when the raw data rather than the registry holds them."""
    files: tuple[Path, ...] = ()
    """The raw files that were read, besides those of ``ImageFiles``."""
    left_out: tuple[str, ...] = ()
    """``path (reason)`` of each file that is no sample."""
    notes: tuple[str, ...] = ()
    """What else people should know of how the raw data was read: one sentence each."""

    @property
    def parts(self) -> tuple[RawPart, ...]:
        """The parts that there are."""
        return (self.train,) if self.test is None else (self.train, self.test)
