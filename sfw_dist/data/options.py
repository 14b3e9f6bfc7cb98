"""How a data set is prepared, as far as its raw data leaves that open."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from sfw_dist.data.datasets.registry import Dataset
from sfw_dist.data.manifest import size_text
from sfw_dist.errors import UserError


@dataclass(frozen=True)
class Options:
    """How a data set is prepared, as far as its raw data leaves that open."""

    size: tuple[int, int] | None = None
    """Height and width to which images are scaled and cropped; ``None``: all have one size."""
    channels: int | None = None
    """1 for grey, 3 for colours; ``None``: as the first training image has."""
    test_fraction: float = 0.0
    """Part of every class that is split off to test on, where there is no test part."""
    mean: tuple[float, ...] | None = None
    """Per channel, in units of [0, 1], instead of that of the training images; likewise ``std``."""
    std: tuple[float, ...] | None = None
    skip_bad: bool = False
    """Leave out samples that cannot be used."""
    store: Literal["raw", "jpeg"] = "raw"
    """Pixels; or whole images as JPEGs, of which the loader takes boxes, for sets too large for pixels."""
    jpeg_quality: int | None = None
    """Of images that are encoded; ``None``: 90. A JPEG that need not shrink is stored as it is."""

    def arguments(self) -> dict[str, str]:
        """The options of the command ``prepare`` that say the same."""
        numbers = {
            "--size": None if self.size is None else size_text(self.size),
            "--channels": self.channels,
            "--test-fraction": self.test_fraction or None,
            "--mean": None if self.mean is None else ",".join(map(repr, self.mean)),
            "--std": None if self.std is None else ",".join(map(repr, self.std)),
            "--store": None if self.store == "raw" else self.store,
            "--jpeg-quality": self.jpeg_quality,
        }
        return {option: str(value) for option, value in numbers.items() if value is not None}


def check_options(dataset: Dataset, options: Options, *, has_ffcv: bool) -> None:
    """Check the options of a preparation.

    Args:
        dataset: that is prepared.
        options: of the user.
        has_ffcv: whether FFCV can be imported.

    Raises:
        UserError: a value out of range, or one that the data set or this machine does not take.
    """
    for side in options.size or ():
        if side < 1:
            raise UserError(f"size must be at least 1, got {side}: write 64")
    if dataset.image_shape is not None and not dataset.any_size:
        _, height, width = dataset.image_shape
        for option, value in (("size", options.size), ("channels", options.channels)):
            if value is not None:
                raise UserError(
                    f"the images of {dataset.name} are {height}×{width}, {option} {value} is refused: leave it out"
                )
    if options.channels not in (None, 1, 3):
        raise UserError(f"channels must be 1 (grey) or 3 (colours), got {options.channels}: write 1 or 3")
    if options.store == "jpeg":
        _check_jpeg_options(dataset, options, has_ffcv)
    elif options.jpeg_quality is not None:
        raise UserError("--jpeg-quality is only for --store jpeg: write both, or leave it out")
    if not 0 <= options.test_fraction < 1:
        raise UserError(f"--test-fraction must be in [0, 1), got {options.test_fraction:g}: write 0.2 for 20 %")
    if options.store not in ("raw", "jpeg"):
        raise UserError(f"store must be raw or jpeg, got {options.store!r}: write raw")
    for mean in options.mean or ():
        if not 0 <= mean <= 1:
            raise UserError(f"--mean must be in [0, 1], got {mean:g}: divide by 255 what refers to 0 to 255")
    for std in options.std or ():
        if not 0 < std < float("inf"):
            raise UserError(f"--std must be positive, got {std:g}: write 1 for a constant channel")


def _check_jpeg_options(dataset: Dataset, options: Options, has_ffcv: bool) -> None:
    if not has_ffcv:
        raise UserError("--store jpeg needs FFCV, which cannot be imported: pip install 'sfw-dist[ffcv]'")
    if options.size is None and (dataset.any_size or dataset.image_shape is None):
        raise UserError("--store jpeg needs the size of the images that the network gets: write --size 224")
    if options.channels == 1 or (dataset.image_shape or (3,))[0] != 3:
        raise UserError(f"--store jpeg stores colours, {dataset.name} has grey images: leave it out")
    if options.jpeg_quality is not None and not 1 <= options.jpeg_quality <= 95:
        raise UserError(f"--jpeg-quality must be in [1, 95], got {options.jpeg_quality}: write 90")
