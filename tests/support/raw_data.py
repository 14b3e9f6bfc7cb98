"""Raw data sets for tests: made-up arrays, IDX files and image files in the layout of the real ones."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sfw_dist.data.datasets.raw import RawData, RawPart
from sfw_dist.data.datasets.registry import DATASETS, Dataset


def tiny_arrays(root: Path) -> RawData:
    """Colour images, not square, so that a swapped axis or channel shows."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (20, 4, 5, 3), dtype=np.uint8)
    labels = np.arange(20) % 2
    return RawData(RawPart(images[:14], labels[:14]), RawPart(images[14:], labels[14:]))


def register(monkeypatch: pytest.MonkeyPatch, read: Callable[[Path], RawData] = tiny_arrays) -> None:
    monkeypatch.setitem(DATASETS, "tiny", Dataset("tiny", ("even", "odd"), (3, 4, 5), "made up", read))


def idx_bytes(array: np.ndarray) -> bytes:
    return bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes() + array.astype(np.uint8).tobytes()


def visible(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir() if not path.name.endswith(".lock"))


WNIDS = ("n03", "n01", "n02")  # wnids.txt is not sorted


def save_image(path: Path, value: int, mode: str = "RGB", size: tuple[int, int] = (64, 64)) -> None:
    """Nearly one colour, with noise so that half the file lacks half of the image."""
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(value).integers(0, 9, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(noise + np.uint8(value)).convert(mode).save(path, quality=95)


def images_of(root: Path) -> Path:
    return root / "raw" / "tiny_imagenet" / "tiny-imagenet-200" / "train" / "n02" / "images"


def damage(root: Path) -> tuple[str, ...]:
    """Make three training files of n02 useless, and a validation file; their names."""
    folder = images_of(root)
    (folder / "n02_0.JPEG").write_bytes(b"no image at all")
    content = (folder / "n02_1.JPEG").read_bytes()
    (folder / "n02_1.JPEG").write_bytes(content[: len(content) // 2])
    (folder / "n02_2.JPEG").unlink()
    save_image(folder.parents[2] / "val" / "images" / "val_0.JPEG", 1, size=(65, 64))
    return "n02_0.JPEG", "n02_1.JPEG", "n02_2.JPEG", "val_0.JPEG"


def flip_middle_byte(path: Path) -> None:
    flip_byte(path, path.stat().st_size // 2)


def flip_byte(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)
