"""What a data set will take on the disk, told before its images are read."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from sfw_dist.data.datasets.raw import ImageFiles, ImageFormat, Items
from sfw_dist.data.decode import read_chunks
from sfw_dist.data.jpeg import Jpeg
from sfw_dist.data.pixels import covering_bytes
from sfw_dist.errors import UserError

LEAST = 100_000_000
"""Less is not worth a line."""
SAMPLES = 32
"""Images of a part that are encoded to estimate what all take."""


def tell_disk_cost(
    name: str, folder: Path, parts: Sequence[ImageFiles | Items], form: ImageFormat, *, betons: bool
) -> None:
    """Print on stderr what will be written, if it is much, and what is free.

    Args:
        name: of the data set.
        folder: to which it is written; what an earlier call has left there counts as free.
        parts: the images; nothing is printed without any.
        form: of the images.
        betons: whether pixels are written twice, the second time for FFCV.

    Raises:
        UserError: it does not fit.
    """
    total = sum(_length(part) for part in parts)
    if not total:
        return
    free = shutil.disk_usage(folder).free + sum(512 * path.stat().st_blocks for path in folder.iterdir())
    if form.jpeg_quality:
        wanted, what = sum(_jpeg_bytes(part, form) for part in parts), "as JPEGs, estimated from a few"
        remedy = "free some space, or choose another root"
    else:
        wanted = total * form.channels * form.height * form.width * (2 if betons else 1)
        what = "as pixels, half of it for FFCV" if betons else "as pixels"
        remedy = "write --store jpeg, which takes a fraction, free some space, or choose another root"
    text = f"{name}: {total:,} images for {form.width}×{form.height} pixels take {_size(wanted)} {what}"
    if wanted > free:
        raise UserError(f"{text}, and {_size(free)} are free in {folder.parent}: {remedy}")
    if wanted >= LEAST:
        print(f"{text}; {_size(free)} are free", file=sys.stderr)


def _length(part: ImageFiles | Items) -> int:
    return len(part.paths if isinstance(part, ImageFiles) else part.dataset)


def _jpeg_bytes(part: ImageFiles | Items, form: ImageFormat) -> int:
    """An estimate, from images that lie evenly in the part."""
    total = _length(part)
    some = sorted({number * total // SAMPLES for number in range(SAMPLES)}) if total else []
    sizes = [
        len(sample.pixels.content)
        for chunk in read_chunks(part, form, [range(number, number + 1) for number in some])
        for sample in chunk
        if isinstance(sample.pixels, Jpeg)
    ]
    return total * (sum(sizes) // len(sizes) if sizes else covering_bytes(form.shape) // 8)


def _size(count: int) -> str:
    for unit, size in (("TB", 10**12), ("GB", 10**9), ("MB", 10**6)):
        if count >= size:
            return f"{count / size:,.1f} {unit}"
    return f"{count / 1000:,.1f} kB"
