"""From arrays and images to pixels of 8 bits and one size."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from sfw_dist.data.datasets.raw import ImageFormat
from sfw_dist.data.pixels import eight_bits, fitted, pixels_of_array, pixels_of_image


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.array([0, 255], np.uint8), [0, 255]),
        (np.array([False, True]), [0, 255]),
        (np.array([0, 256, 65535], np.uint16), [0, 1, 255]),
        (np.array([0, 255], np.int64), [0, 255]),
        (np.array([0, 0.5, 1], np.float32), [0, 128, 255]),
        (np.array([0, 256]), "0 to 255"),
        (np.array([-1, 3]), "-1 to 3"),
        (np.array([0, 1.5]), "wanted 0 to 1"),
        (np.array([0, np.nan]), "wanted 0 to 1"),
        (np.array(["a"]), "integers or real numbers"),
    ],
)
def test_values_become_8_bits_by_their_type(values: np.ndarray, expected: list[int] | str) -> None:
    """Fails when values are taken modulo 256, or normalised images are trained on as noise."""
    if isinstance(expected, str):
        with pytest.raises(ValueError, match=expected):
            eight_bits(values)
    else:
        assert eight_bits(values).tolist() == expected


@pytest.mark.parametrize("size", [(6, 6), (4, 9), (12, 5)])
def test_an_image_of_any_channels_is_scaled_as_pillow_scales_its_planes(size: tuple[int, int]) -> None:
    """Fails when five channels are scaled otherwise than three, the crop is not central, or sides are swapped."""
    height, width = size
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 5), dtype=np.uint8)
    found = fitted(pixels, ImageFormat(5, height, width, fit=True))
    assert found.shape == (height, width, 5)
    scale = max(height / 20, width / 30)
    high, wide = max(height, round(20 * scale)), max(width, round(30 * scale))
    top, left = (high - height) // 2, (wide - width) // 2
    for c in range(5):
        plane = np.asarray(Image.fromarray(pixels[..., c]).resize((wide, high), Image.Resampling.BILINEAR))
        np.testing.assert_array_equal(found[..., c], plane[top : top + height, left : left + width])
    np.testing.assert_array_equal(found[..., :3], fitted(pixels[..., :3].copy(), ImageFormat(3, height, width, True)))


def test_colours_are_not_made_grey_without_being_asked() -> None:
    """Fails when one grey image in front makes all coloured ones grey."""
    image = Image.new("RGB", (2, 2), (255, 0, 0))
    with pytest.raises(ValueError, match="in colour, wanted grey"):
        pixels_of_image(image, ImageFormat(1, 2, 2))
    assert pixels_of_image(image, ImageFormat(1, 2, 2, to_grey=True))[0, 0].tolist() == [76]  # ITU-R 601
    assert pixels_of_image(Image.new("L", (2, 2), 9), ImageFormat(3, 2, 2))[0, 0].tolist() == [9, 9, 9]


@pytest.mark.parametrize(
    ("shape", "told"),
    [((3, 8, 8), "channels first"), ((2, 2, 2, 2), "an array of shape"), ((8, 8, 4), "4 channels, wanted 3")],
)
def test_arrays_of_other_axes_are_refused(shape: tuple[int, ...], told: str) -> None:
    """Fails when channels first are taken for rows."""
    with pytest.raises(ValueError, match=told):
        pixels_of_array(np.zeros(shape, np.uint8), ImageFormat(3, 8, 8))
