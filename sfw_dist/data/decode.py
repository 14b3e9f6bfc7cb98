"""Decodes image files to one ``.npy``, in chunks that survive an interruption."""

from __future__ import annotations

import hashlib
import os
import zipfile
import zlib
from collections.abc import Iterable
from functools import partial
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from sfw_dist.data.datasets.progress_bar import progress_bar
from sfw_dist.data.datasets.raw import ImageFiles
from sfw_dist.files import make_folder, replacing

CHUNK = 2048
"""Files in a chunk: 25 MB of 64×64 images."""
MOST_ELONGATED = 8
"""Sides of a longer image are cut to this many times the shorter one, around the centre, before it is scaled."""


class Decoded(NamedTuple):
    """The chunks of one part on disk."""

    chunks: tuple[Path, ...]
    shape: tuple[int, int, int, int]
    """Of the whole array, without the bad files."""
    good: tuple[Path, ...]
    """The files whose images the chunks hold."""
    bad: dict[int, str]
    """``path (reason)`` of each file that could not be decoded, by its index."""

    def write(self, file: BinaryIO) -> None:
        """Write one ``.npy``, chunk by chunk: the whole is never in memory."""
        header = {"descr": "|u1", "fortran_order": False, "shape": self.shape}
        np.lib.format.write_array_header_1_0(file, header)
        for path in self.chunks:
            with np.load(path, allow_pickle=False) as chunk:
                file.write(chunk["images"].tobytes())


def decode(files: ImageFiles, side: int, folder: Path, description: str) -> Decoded:
    """Decode image files into chunks on disk.

    A chunk that an earlier call has left is kept, unless it is damaged or one of its files has changed since.

    Args:
        files: to decode, as RGB.
        side: of the square images, in pixels.
        folder: of the chunks; made if it is missing.
        description: of the progress bar.
    """
    make_folder(folder)
    chunks: list[Path] = []
    bad: dict[int, str] = {}
    with ThreadPool(len(os.sched_getaffinity(0))) as pool, progress_bar(description, len(files.paths)) as advance:
        for start in range(0, len(files.paths), CHUNK):
            paths = files.paths[start : start + CHUNK]
            chunk = folder / f"{start:07d}.npz"
            reasons = _finished(chunk, fingerprint := _fingerprint(paths, side, files.fit))
            if reasons is None:
                decoded = pool.map(partial(_try_decode, side=side, fit=files.fit), paths, chunksize=64)
                reasons = _write_chunk(chunk, decoded, fingerprint, side)
            for index, reason in enumerate(reasons):
                if reason:
                    bad[start + index] = f"{paths[index]} ({reason})"
            chunks.append(chunk)
            advance(len(paths))
    good = tuple(path for index, path in enumerate(files.paths) if index not in bad)
    return Decoded(tuple(chunks), (len(good), side, side, 3), good, bad)


def decode_image(path: Path, side: int, fit: bool) -> NDArray[np.uint8]:
    """Decode one image; the value of a grayscale one is repeated in all channels.

    Of 16 bits the upper 8 are kept, as of PNG's 16-bit colours; real numbers in [0, 1] become 0 to 255.

    Args:
        path: of the image file.
        side: of the square image, in pixels.
        fit: scale an image of another size until its shorter side is ``side``, then crop the centre.

    Returns:
        uint8 RGB ``(side, side, 3)``.

    Raises:
        ValueError: another size, without ``fit``; or numbers whose range is not known.
        Exception: the file is damaged. Pillow's decoders raise whatever they like: SyntaxError is PNG's.
    """
    with Image.open(path) as file:
        image = _eight_bits(file).convert("RGB")
    width, height = image.size
    if fit and max(width, height) > MOST_ELONGATED * min(width, height):  # scaled, it might not fit into memory
        most = MOST_ELONGATED * min(width, height)
        left, top = max(0, (width - most) // 2), max(0, (height - most) // 2)
        image = image.crop((left, top, left + min(width, most), top + min(height, most)))
        width, height = image.size
    if fit and image.size != (side, side):
        scale = side / min(width, height)
        width, height = max(side, round(width * scale)), max(side, round(height * scale))
        left, top = (width - side) // 2, (height - side) // 2
        scaled = image.resize((width, height), Image.Resampling.BILINEAR)
        image = scaled.crop((left, top, left + side, top + side))
    if image.size != (side, side):
        raise ValueError(f"{width}×{height} pixels, wanted {side}×{side}")
    return np.asarray(image)


def _eight_bits(image: Image.Image) -> Image.Image:
    """The image with values of 8 bits: Pillow's own conversion clips, and makes 16-bit images white, real ones black.

    Raises:
        ValueError: 32-bit integers above 255, or real numbers outside of [0, 1].
    """
    wide = image.mode.startswith("I;16")
    if not (wide or image.mode in ("I", "F")):
        return image
    values = np.asarray(image)
    low, high = float(values.min()), float(values.max())
    # Pillow opens 16-bit PGM, and before version 10.3 also PNG, as 32 bits.
    if wide or (image.mode == "I" and image.format in ("PNG", "PPM")):
        values = values.astype(np.uint16) >> 8
    elif image.mode == "F" and 0 <= low <= high <= 1:  # false if a value is NaN
        values = np.rint(values * 255)
    elif image.mode == "F" or not 0 <= low <= high <= 255:
        kind, wanted = ("real", "0 to 1") if image.mode == "F" else ("32-bit", "0 to 255")
        raise ValueError(f"{kind} numbers of {low:g} to {high:g}, wanted {wanted}: save it with 8 or 16 bits")
    return Image.fromarray(values.astype(np.uint8))


def _try_decode(path: Path, side: int, fit: bool) -> NDArray[np.uint8] | str:
    """The image, or the reason why it cannot be decoded, in one line."""
    try:
        return decode_image(path, side, fit)
    except FileNotFoundError:
        return "missing"
    except Image.UnidentifiedImageError:
        return "not an image"
    except Exception as error:  # a decoder of damaged bytes may raise anything
        return " ".join(str(error).split()) or type(error).__name__


def _fingerprint(paths: Iterable[Path], side: int, fit: bool) -> str:
    """A hash that changes when a file of the chunk is replaced, or another one is meant."""
    states = [(str(path), *_state(path)) for path in paths]
    return hashlib.sha256(repr((side, fit, states)).encode()).hexdigest()


def _state(path: Path) -> tuple[int, int]:
    try:
        status = path.stat()
    except OSError:
        return -1, -1
    return status.st_size, status.st_mtime_ns


def _write_chunk(path: Path, decoded: list[NDArray[np.uint8] | str], fingerprint: str, side: int) -> list[str]:
    images = [image for image in decoded if not isinstance(image, str)]
    reasons = [image if isinstance(image, str) else "" for image in decoded]
    stacked = np.stack(images) if images else np.empty((0, side, side, 3), np.uint8)
    with replacing(path) as file:
        np.savez(file, images=stacked, reasons=np.array(reasons), fingerprint=np.array(fingerprint))
    return reasons


def _finished(path: Path, fingerprint: str) -> list[str] | None:
    """The reasons stored in a chunk that is complete (zip files hold checksums) and of these files; else ``None``."""
    try:
        # Opened here, because np.load does not close a file that it cannot read.
        with path.open("rb") as file, np.load(file, allow_pickle=False) as chunk:
            reasons: list[str] = chunk["reasons"].tolist()
            whole = len(chunk["images"]) == reasons.count("")
            return reasons if whole and str(chunk["fingerprint"]) == fingerprint else None
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile, zlib.error):
        return None
