"""A set of whole images as JPEGs, for the tests that prepare it and those that read it."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from sfw_dist.data.options import Options

OPTIONS = Options(size=(32, 32), store="jpeg")

SIZES = {"as is": (30, 40), "large": (90, 70), "flat": (36, 600), "small": (20, 25)}


def picture(seed: int, height: int, width: int) -> Image.Image:
    """Blots of colour: what JPEG keeps well."""
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def save_photos(folder: Path) -> None:
    """Write 24 training and 8 test images of four sizes in two classes; some are no JPEGs in RGB."""
    for number in range(32):
        name, size = list(SIZES.items())[number % 4]
        image = picture(number, *size)
        path = folder / ("train" if number < 24 else "val") / f"class{number // 4 % 2}" / f"{number:02d} {name}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        if number == 4:
            image.save(path.with_suffix(".png"))
        else:
            image.convert({5: "L", 6: "CMYK"}.get(number, "RGB")).save(path, quality=95)


class Stored(NamedTuple):
    files: list[str]
    table: NDArray[Any]
    beton: bytes

    def content(self, number: int) -> bytes:
        row = self.table[number]
        return self.beton[row["address"] : row["address"] + row["bytes"]]

    def pixels(self, number: int) -> NDArray[np.uint8]:
        return np.asarray(Image.open(io.BytesIO(self.content(number))))


def stored(root: Path, name: str = "flowers", part: str = "train") -> Stored:
    folder = root / name
    files = (folder / f"{part}_files.json").read_text().splitlines()[1:-1]
    return Stored(files, np.load(folder / f"{part}_jpegs.npy"), (folder / f"{part}.beton").read_bytes())
