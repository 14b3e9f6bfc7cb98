"""From what a person has for an image to 8-bit pixels ``(height, width, channels)`` of one size."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from sfw_dist.data.datasets.raw import ImageFormat

MOST_ELONGATED = 8
"""Sides of a longer image are cut to this many times what is wanted, around the centre, before it is scaled."""
MARGIN = Fraction(8, 7)
"""Whole images are stored this much larger than batches are: 256 pixels for 224, as in the usual way to evaluate."""
JPEG_HEADER_BYTES = 1 << 16
"""What a JPEG may have besides what its pixels would take."""
GREY_MODES = frozenset(("1", "L", "LA", "La", "I", "F"))
"""Pillow's modes of images with one brightness, besides those of 16 bits."""
_MOST_USUAL_CHANNELS = 4


def is_grey(image: Image.Image) -> bool:
    """Whether an image has one brightness and no colours."""
    return image.mode in GREY_MODES or image.mode.startswith("I;16")


def eight_bits(values: NDArray[Any], *, kind: str = "") -> NDArray[np.uint8]:
    """Values of 8 bits, by their type: numpy's own conversion would take them modulo 256.

    Args:
        values: uint8 and booleans; uint16, of which the upper 8 bits are kept; other integers from 0 to 255; or real
            numbers in [0, 1], which become 0 to 255.
        kind: what messages call the numbers.

    Raises:
        ValueError: integers outside of 0 to 255, or real numbers outside of [0, 1]: their range is not known.

    Example:
        >>> eight_bits(np.array([0.0, 0.5, 1.0])).tolist()
        [0, 128, 255]
    """
    if values.dtype == np.uint8:
        return values
    if values.dtype == np.bool_:
        return values.astype(np.uint8) * np.uint8(255)
    if values.dtype == np.uint16:
        return (values >> 8).astype(np.uint8)
    real = np.issubdtype(values.dtype, np.floating)
    if not real and not np.issubdtype(values.dtype, np.integer):
        raise ValueError(f"values of type {values.dtype}: give integers or real numbers")
    low, high, most = float(values.min()), float(values.max()), 1 if real else 255
    if not 0 <= low <= high <= most:  # true if a value is NaN
        kind = kind or ("real" if real else "integer")
        raise ValueError(
            f"{kind} numbers of {low:g} to {high:g}, wanted 0 to {most}: scale them, and leave normalisation out"
        )
    return np.rint(values * np.float64(255)).astype(np.uint8) if real else values.astype(np.uint8)


def pixels_of_image(image: Image.Image, form: ImageFormat) -> NDArray[np.uint8]:
    """The pixels of a Pillow image in the wanted format; a grey value is repeated in all colours.

    Args:
        image: any mode; transparency is dropped.
        form: the wanted channels (1, 3, or 4 with transparency) and size.

    Raises:
        ValueError: another size or colours, without what the format says to do with them; or numbers whose range is
            not known.
    """
    if is_grey(image) and image.mode not in ("LA", "La"):
        image = _grey(image)
    elif form.channels == 1 and not form.to_grey and not is_grey(image):
        raise ValueError("in colour, wanted grey: give --channels 3, or 1 to take the brightness")
    modes = {1: "L", 3: "RGB", 4: "RGBA"}
    if form.channels not in modes:
        raise ValueError(f"{image.mode} pixels, wanted {form.channels} channels: save it as .npy")
    pixels = np.asarray(image.convert(modes[form.channels]))
    return fitted(pixels.reshape(*pixels.shape[:2], form.channels), form)


def _grey(image: Image.Image) -> Image.Image:
    """A grey image of 8 bits: Pillow's own conversion clips, and makes 16 bits white, real numbers black."""
    wide = image.mode.startswith("I;16")
    if not (wide or image.mode in ("I", "F")):
        return image
    values = np.asarray(image)
    # Pillow opens 16-bit PGM, and before version 10.3 also PNG, as 32 bits.
    if wide or (image.mode == "I" and image.format in ("PNG", "PPM")):
        values = values.astype(np.uint16)
    return Image.fromarray(eight_bits(values, kind="real" if image.mode == "F" else "32-bit"))


def pixels_of_array(values: NDArray[Any], form: ImageFormat) -> NDArray[np.uint8]:
    """The pixels of an array ``(height, width)`` or ``(height, width, channels)`` in the wanted format.

    Raises:
        ValueError: other channels; another size, without ``form.fit``; or values whose range is not known.
    """
    pixels = eight_bits(with_channels(values))
    if pixels.shape[2] != form.channels:
        if pixels.shape[2] != 1 or form.channels != 3:
            raise ValueError(f"{pixels.shape[2]} channels, wanted {form.channels}")
        pixels = np.repeat(pixels, 3, axis=2)
    return fitted(pixels, form)


def with_channels(values: NDArray[Any]) -> NDArray[Any]:
    """An image's array as ``(height, width, channels)``.

    Raises:
        ValueError: it has not two or three axes, or its channels seem to come first.
    """
    if values.ndim == 2 and values.size:
        return values[..., np.newaxis]
    if values.ndim != 3 or not values.size:
        raise ValueError(f"an array of shape {values.shape}, wanted (height, width) or (height, width, channels)")
    if values.shape[0] in (1, 3) and values.shape[2] > _MOST_USUAL_CHANNELS:
        raise ValueError(f"an array of shape {values.shape} seems to have its channels first: put them last")
    return values


def fitted(pixels: NDArray[np.uint8], form: ImageFormat) -> NDArray[np.uint8]:
    """Bring pixels to the wanted size: scaled bilinearly until both sides are covered, then cropped to the centre.

    Those that become a JPEG stay whole, and are scaled down until a side is just :data:`MARGIN` larger than wanted.

    Args:
        pixels: ``(H, W, C)``.
        form: the wanted size.

    Raises:
        ValueError: another size, without ``form.fit``.
    """
    height, width = pixels.shape[:2]
    if (height, width) == (form.height, form.width):
        return pixels
    if not form.fit:
        raise ValueError(f"{height}×{width} pixels, wanted {form.height}×{form.width}")
    high, wide = covering_sides(form.height, form.width) if form.jpeg_quality else (form.height, form.width)
    scale = max(high / height, wide / width)
    pixels = pixels[_not_elongated(height, width, (high, wide), scale)]
    if form.jpeg_quality and scale >= 1:
        return pixels
    height, width = pixels.shape[:2]
    pixels = _resized(pixels, max(high, round(height * scale)), max(wide, round(width * scale)))
    if form.jpeg_quality:
        return pixels
    top, left = (pixels.shape[0] - high) // 2, (pixels.shape[1] - wide) // 2
    return pixels[top : top + high, left : left + wide]


def _not_elongated(height: int, width: int, wanted: tuple[int, int], scale: float) -> tuple[slice, slice]:
    """The middle of a longer image: scaled, it might not fit into memory."""
    most_high, most_wide = (max(1, round(MOST_ELONGATED * side / scale)) for side in wanted)
    top, left = max(0, (height - most_high) // 2), max(0, (width - most_wide) // 2)
    return slice(top, top + most_high), slice(left, left + most_wide)


def covering_sides(height: int, width: int) -> tuple[int, int]:
    """Least height and width to which an image is scaled down that becomes a JPEG, of batches of this size.

    Example:
        >>> covering_sides(224, 224)
        (256, 256)
    """
    numerator, denominator = MARGIN.as_integer_ratio()
    return -(-height * numerator // denominator), -(-width * numerator // denominator)


def largest_jpeg(image_shape: tuple[int, int, int]) -> int:
    """Most bytes of a stored JPEG, of which batches of this shape are made: no more than its pixels would take."""
    return MOST_ELONGATED * covering_bytes(image_shape) + JPEG_HEADER_BYTES


def covering_bytes(image_shape: tuple[int, int, int]) -> int:
    """Bytes of the pixels of a stored image that is no longer than wide."""
    high, wide = covering_sides(*image_shape[1:])
    return 3 * high * wide


def stays_whole(height: int, width: int, form: ImageFormat) -> bool:
    """Whether an image that becomes a JPEG is neither scaled nor cut."""
    high, wide = covering_sides(form.height, form.width)
    scale = max(high / height, wide / width)
    rows, columns = _not_elongated(height, width, (high, wide), scale)
    return scale >= 1 and rows.start == columns.start == 0


def middle_box(height: Any, width: Any, wanted_height: int, wanted_width: int) -> tuple[Any, Any, Any, Any]:
    """The box of an image that evaluation sees: its middle in the wanted size, or as much of it as there is.

    Args:
        height: of the image, or of several ``(n,)``; likewise ``width``.
        wanted_height: of the batches; likewise ``wanted_width``.

    Returns:
        Top, left, height and width of the box, which has the sides' ratio of the batches.

    Example:
        >>> [int(number) for number in middle_box(256, 300, 224, 224)]
        [16, 38, 224, 224]
        >>> [int(number) for number in middle_box(100, 150, 224, 224)]
        [0, 25, 100, 100]
    """
    covers = (height >= wanted_height) & (width >= wanted_width)
    high = np.minimum(height, np.maximum(1, width * wanted_height // wanted_width))
    wide = np.minimum(width, np.maximum(1, height * wanted_width // wanted_height))
    high, wide = np.where(covers, wanted_height, high), np.where(covers, wanted_width, wide)
    return (height - high) // 2, (width - wide) // 2, high, wide


def _resized(pixels: NDArray[np.uint8], height: int, width: int) -> NDArray[np.uint8]:
    """Scale each channel; Pillow scales colours at once only where there are three or four."""

    def scaled(plane: NDArray[np.uint8]) -> NDArray[np.uint8]:
        image = Image.fromarray(np.ascontiguousarray(plane))
        return np.asarray(image.resize((width, height), Image.Resampling.BILINEAR))

    if pixels.shape[2] == 3:
        return scaled(pixels)
    return np.stack([scaled(pixels[..., channel]) for channel in range(pixels.shape[2])], axis=-1)
