"""Reads the samples of one part, by several threads or processes: image files, or the items of a Dataset."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

from sfw_dist.data.datasets.raw import ImageFiles, ImageFormat, Items
from sfw_dist.data.jpeg import Jpeg, encoded, kept_jpeg
from sfw_dist.data.pixels import is_grey, pixels_of_array, pixels_of_image, with_channels
from sfw_dist.data.sampler import identity
from sfw_dist.errors import UserError

IMAGE_KEYS = ("image", "img", "pixel_values", "x")
"""What an item that is a dictionary calls its image, the first that is there; `LABEL_KEYS` likewise."""
LABEL_KEYS = ("label", "labels", "fine_label", "target", "y")


class Sample(NamedTuple):
    """One sample that was read."""

    pixels: NDArray[np.uint8] | Jpeg | str
    """``(height, width, channels)``, or a JPEG where the format asks for one; a text says why there are none."""
    label: Any = None
    """Of an item: an integer or a text."""
    identity: int = 0
    """Of an item: what its pixels are known by."""


Chunk = list[Sample]


def read_chunks(images: ImageFiles | Items, form: ImageFormat, chunks: Sequence[range]) -> Iterator[Chunk]:
    """Read samples, chunk by chunk, in order.

    Args:
        images: of one part.
        form: of the images.
        chunks: which samples make up each chunk.

    Yields:
        The samples of each chunk.
    """
    workers = len(os.sched_getaffinity(0))
    if isinstance(images, ImageFiles):
        with ThreadPool(workers) as pool:
            for chunk in chunks:
                paths = [images.paths[i] for i in chunk]
                few = max(1, min(64, len(paths) // (4 * workers)))
                decoded = pool.map(partial(_try_decode, form=form), paths, chunksize=few)
                yield [Sample(pixels) for pixels in decoded]
        return
    # A chunk is an item of the loader. Forked, because items of a script's own classes cannot be pickled.
    several = workers if len(chunks) > 1 else 0
    loader = DataLoader(
        _ItemChunks(images, form, chunks),
        batch_size=None,
        collate_fn=lambda chunk: chunk,  # not to tensors
        num_workers=several,
        multiprocessing_context="fork" if several else None,
    )
    try:
        yield from loader
    except RuntimeError as error:  # a process was killed, for want of memory say
        raise UserError(f"{images.description} cannot be read by several processes ({_reason(error)})") from error


class _ItemChunks(torch.utils.data.Dataset[Chunk]):
    def __init__(self, items: Items, form: ImageFormat, chunks: Sequence[range]) -> None:
        self._items, self._form, self._chunks = items, form, chunks

    def __len__(self) -> int:
        return len(self._chunks)

    def __getitem__(self, number: int) -> Chunk:
        return [read_item(self._items, i, self._form) for i in self._chunks[number]]


def read_item(items: Items, index: int, form: ImageFormat | None) -> Sample:
    """Read one item of a Dataset.

    Args:
        items: of one part.
        index: of the item.
        form: of the image; ``None`` leaves it as it is.

    Returns:
        The sample, or the reason why it cannot be used.
    """
    try:
        image, label = _image_and_label(items.dataset[index])
        pixels = _pixels(image, form or format_of(image))
        stored = encoded(pixels, form) if form and form.jpeg_quality else pixels
        stored = stored.copy() if isinstance(stored, np.ndarray) else stored  # some fill one buffer again and again
        return Sample(stored, _named_label(label, items.names), identity(pixels.tobytes()))
    except Exception as error:  # it is the user's code
        return Sample(_reason(error))


def _image_and_label(item: Any) -> tuple[Any, Any]:
    """Raises ``ValueError`` for an item that does not say what is the image and what the label."""
    if isinstance(item, Mapping):
        keys = [next((key for key in names if key in item), None) for names in (IMAGE_KEYS, LABEL_KEYS)]
        if None in keys:
            wanted = f"{', '.join(IMAGE_KEYS)} and {', '.join(LABEL_KEYS)}"
            raise ValueError(f"a dictionary with {', '.join(map(str, item))}: name them as one of {wanted}")
        return item[keys[0]], item[keys[1]]
    if isinstance(item, tuple | list) and len(item) == 2:
        return item[0], item[1]
    raise ValueError(f"a {type(item).__name__}: return a pair (image, label), or a dictionary with 'image' and 'label'")


def _plain_label(label: Any) -> int | str:
    """Raises ``ValueError`` unless it is one integer or text."""
    if isinstance(label, Tensor | np.ndarray | np.generic):
        if label.ndim:
            raise ValueError(f"its label has the shape {tuple(label.shape)}: give one class for each image")
        label = label.item()
    if isinstance(label, str) or (isinstance(label, int) and not isinstance(label, bool)):
        return label
    raise ValueError(f"its label is {label!r}: give an integer or a text")


def _named_label(label: Any, names: tuple[str, ...] | None) -> int | str:
    plain = _plain_label(label)
    if names is None or isinstance(plain, str):
        return plain
    if not 0 <= plain < len(names):
        raise ValueError(f"its label is {plain}, of {len(names)} classes: mend it")
    return names[plain]


def format_of(image: Any) -> ImageFormat:
    """The format that an image has by itself."""
    if isinstance(image, Image.Image):
        width, height = image.size
        return ImageFormat(1 if is_grey(image) else 3, height, width)
    height, width, channels = with_channels(_array(image)).shape
    return ImageFormat(channels, height, width)


def _pixels(image: Any, form: ImageFormat) -> NDArray[np.uint8]:
    if isinstance(image, Image.Image):
        return pixels_of_image(image, form)
    return pixels_of_array(_array(image), form)


def _array(image: Any) -> NDArray[Any]:
    """An image's values, with the channels last: torch has them first."""
    if isinstance(image, Tensor):
        image = image.detach().cpu()
        return (image.permute(1, 2, 0) if image.ndim == 3 else image).numpy()
    array = np.asarray(image)
    if array.dtype == object:
        raise ValueError(f"a {type(image).__name__} for an image: give a Pillow image, an array or a tensor")
    return array


# --- Image files ------------------------------------------------------------------------------------------------------


def decode_image(path: Path, form: ImageFormat) -> NDArray[np.uint8]:
    """Decode one image file, or ``.npy`` with an array ``(height, width)`` or ``(height, width, channels)``.

    Of 16 bits the upper 8 are kept, as of PNG's 16-bit colours; real numbers in [0, 1] become 0 to 255.

    Args:
        path: of the image file.
        form: of the image.

    Returns:
        uint8 ``(height, width, channels)``.

    Raises:
        ValueError: another size or colours, or numbers whose range is not known.
        Exception: the file is damaged. Pillow's decoders raise whatever they like: SyntaxError is PNG's.
    """
    if path.suffix == ".npy":
        return pixels_of_array(np.load(path, allow_pickle=False), form)
    with Image.open(path) as file:
        return pixels_of_image(file, form)


def file_format(path: Path) -> ImageFormat | None:
    """The format that the image of a file has by itself; ``None`` if it cannot be read."""
    try:
        if path.suffix == ".npy":
            return format_of(np.load(path, mmap_mode="r", allow_pickle=False))
        with Image.open(path) as file:
            return format_of(file)
    except Exception:  # as decode_image
        return None


def _try_decode(path: Path, form: ImageFormat) -> NDArray[np.uint8] | Jpeg | str:
    """The image, or the reason why it cannot be decoded, in one line."""
    try:
        if form.jpeg_quality:
            return kept_jpeg(path, form) or encoded(decode_image(path, form), form)
        return decode_image(path, form)
    except FileNotFoundError:
        return "missing"
    except Image.UnidentifiedImageError:
        return "not an image"
    except Exception as error:  # a decoder of damaged bytes may raise anything
        return _reason(error)


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if text and isinstance(error, ValueError | OSError) else f"{type(error).__name__}: {text}".rstrip(": ")
