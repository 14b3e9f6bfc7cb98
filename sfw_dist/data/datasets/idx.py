"""The IDX format of MNIST: a magic number, big-endian sizes, then unsigned bytes."""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sfw_dist.errors import UserError


def read_idx(path: Path, dimensions: int) -> NDArray[np.uint8]:
    """Read an array of unsigned bytes.

    Args:
        path: of the file; one that ends in ``.gz`` is unzipped.
        dimensions: number of axes that the array must have.

    Raises:
        UserError: the file is no such array, or is truncated or damaged.
    """
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        return parse_idx(content, dimensions)
    except (OSError, EOFError, zlib.error, ValueError) as error:
        raise UserError(
            f"{path} is truncated or damaged ({error}): replace it, or delete it to fetch it again"
        ) from None


def parse_idx(content: bytes, dimensions: int) -> NDArray[np.uint8]:
    """Parse the bytes of an IDX file.

    Args:
        content: of the file, unzipped.
        dimensions: number of axes that the array must have.

    Raises:
        ValueError: wrong magic number or length.

    Example:
        >>> parse_idx(bytes([0, 0, 8, 1, 0, 0, 0, 3, 7, 8, 9]), dimensions=1).tolist()
        [7, 8, 9]
    """
    magic = bytes([0, 0, 0x08, dimensions])  # 0x08: unsigned bytes
    if content[:4] != magic:
        raise ValueError(f"magic number {content[:4].hex()}, wanted {magic.hex()}")
    header = 4 + 4 * dimensions
    if len(content) < header:
        raise ValueError(f"{len(content)} bytes, the header has {header}")
    shape = [int(size) for size in np.frombuffer(content, ">u4", dimensions, offset=4)]
    wanted = header + int(np.prod(shape, dtype=object))
    if len(content) != wanted:
        raise ValueError(f"{len(content)} bytes, wanted {wanted} for shape {tuple(shape)}")
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape)
