"""Crop, resize, flip and cutout: what is done to a sample, and the readable form of doing it.

An augmentation is drawn first, as a row of eight integers for each sample (:data:`Draws`), and then rendered. The
draws come from a hash of ``(seed, epoch, sample id)``, and rendering is integer arithmetic, so a sample has the same
pixels in every backend, at any number of threads and ranks, and after any restart.

:func:`render` here runs on any device and is the reference of :mod:`sfw_dist.data.loading.augment_numba`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sfw_dist.data.sampler import Ids, counter_hash

Draws = NDArray[np.int64]
"""``(n, 8)``: a row a sample, in the columns named below, in pixels of the stored image."""
TOP, LEFT, HEIGHT, WIDTH = range(4)
"""The box that becomes the image. It may reach outside, where pixels are 0."""
MIRROR = 4
"""1 to mirror left to right, after the box is cut out."""
CUT_TOP, CUT_LEFT, CUT_SIDE = range(5, 8)
"""The square of the result that becomes 0; it may reach outside. Its side is 0 for none."""

# The words that set the draws of one sample apart.
_TOP, _LEFT, _MIRROR, _CUT_TOP, _CUT_LEFT, _BOXES = range(6)
_TRIES = 10
# Rounded, for the last bit of exp differs between processors.
_ASPECT_RATIOS = np.round(np.exp(np.linspace(np.log(3 / 4), np.log(4 / 3), 1025)), 6)


@dataclass(frozen=True)
class Augmentation:
    """What to draw. Without arguments: nothing, samples stay as stored."""

    crop_padding: int = 0
    """Crop at random out of the image with this many pixels of zeros around it."""
    flip: bool = False
    """Mirror half of the samples."""
    cutout: int = 0
    """Side in pixels of a square of zeros, its centre uniform over the image (DeVries and Taylor, arXiv 1708.04552)."""
    random_resized_crop: float = 0.0
    """Least area, as a fraction of the image, of a random box that is scaled to the full size; 0 for none.

    Aspect ratios are 3/4 to 4/3 and ten boxes are tried before the whole image is taken (Szegedy et al.,
    arXiv 1409.4842). Scaling is bilinear. Excludes ``crop_padding``.
    """

    def draws(self, ids: Ids, size: tuple[int, int], *, seed: int, epoch: int) -> Draws:
        """The draws for the samples ``ids``, images of ``size`` (height, width)."""
        height, width = size

        def below(bound: int | NDArray[np.int64], word: int) -> NDArray[np.int64]:
            return _below(bound, counter_hash(seed, epoch, ids, word))

        out = np.zeros((len(ids), 8), np.int64)
        out[:, HEIGHT], out[:, WIDTH] = size
        if self.random_resized_crop:
            out[:, HEIGHT], out[:, WIDTH] = _boxes(self.random_resized_crop, ids, size, seed, epoch)
            out[:, TOP] = below(height - out[:, HEIGHT] + 1, _TOP)
            out[:, LEFT] = below(width - out[:, WIDTH] + 1, _LEFT)
        elif self.crop_padding:
            out[:, TOP] = below(2 * self.crop_padding + 1, _TOP) - self.crop_padding
            out[:, LEFT] = below(2 * self.crop_padding + 1, _LEFT) - self.crop_padding
        if self.flip:
            out[:, MIRROR] = below(2, _MIRROR)
        if self.cutout:
            out[:, CUT_TOP] = below(height, _CUT_TOP) - self.cutout // 2
            out[:, CUT_LEFT] = below(width, _CUT_LEFT) - self.cutout // 2
            out[:, CUT_SIDE] = self.cutout
        return out


def _boxes(least: float, ids: Ids, size: tuple[int, int], seed: int, epoch: int) -> tuple[Ids, Ids]:
    """Heights and widths of the random boxes."""
    height, width = size
    heights, widths = np.full(len(ids), height), np.full(len(ids), width)
    left = np.arange(len(ids))  # those that have no box yet
    for attempt in range(_TRIES):
        word = _BOXES + 2 * attempt
        fraction = _below(1 << 20, counter_hash(seed, epoch, ids[left], word)) / (1 << 20)
        area = (least + (1 - least) * fraction) * height * width
        ratio = _ASPECT_RATIOS[_below(len(_ASPECT_RATIOS), counter_hash(seed, epoch, ids[left], word + 1))]
        h, w = np.rint(np.sqrt(area / ratio)).astype(np.int64), np.rint(np.sqrt(area * ratio)).astype(np.int64)
        fits = (h >= 1) & (h <= height) & (w >= 1) & (w <= width)
        heights[left[fits]], widths[left[fits]] = h[fits], w[fits]
        left = left[~fits]
    return heights, widths


def _below(n: int | NDArray[np.int64], bits: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Uniform integers in [0, n) from 64 random bits each; the bias is below n / 2³²."""
    return ((bits >> np.uint64(32)) * np.asarray(n).astype(np.uint64) >> np.uint64(32)).astype(np.int64)


def render(images: Tensor, ids: Ids, samples: Draws) -> Tensor:
    """The samples ``images[ids]`` under their draws ``samples``, as uint8 ``(B, C, H, W)`` in channels_last.

    ``images`` ``(n, H, W, C)`` may lie on any device; the result is there, and the host does not wait for it.
    """
    height, width, channels = images.shape[1:]
    rows, draws = (torch.from_numpy(array).to(images.device, non_blocking=True) for array in (ids, samples))
    y, x = torch.arange(height, device=images.device), torch.arange(width, device=images.device)  # of the result
    mirrored = torch.where(draws[:, MIRROR, None] == 1, width - 1 - x, x)  # (B, W)
    top, y_low, y_high, y_part = _taps(y.expand(len(rows), -1), draws[:, TOP], draws[:, HEIGHT], height)
    left, x_low, x_high, x_part = _taps(mirrored, draws[:, LEFT], draws[:, WIDTH], width)

    def pixels(along_y: Tensor, along_x: Tensor) -> Tensor:  # (B, H, W, C)
        return images[rows[:, None, None], along_y[:, :, None], along_x[:, None, :]]

    if (samples[:, [HEIGHT, WIDTH]] == (height, width)).all():  # nothing is scaled, both neighbours are the pixel
        out = pixels(y_low, x_low)
    else:
        y_part, x_part = y_part[:, :, None, None], x_part[:, None, :, None]
        above = pixels(y_low, x_low) * (256 - x_part) + pixels(y_low, x_high) * x_part
        below = pixels(y_high, x_low) * (256 - x_part) + pixels(y_high, x_high) * x_part
        out = ((above * (256 - y_part) + below * y_part + (1 << 15)) >> 16).to(torch.uint8)

    inside = top[:, :, None] & left[:, None, :]
    cut_y, cut_x = y - draws[:, CUT_TOP, None], x - draws[:, CUT_LEFT, None]
    side = draws[:, CUT_SIDE, None]
    cut = ((cut_y >= 0) & (cut_y < side))[:, :, None] & ((cut_x >= 0) & (cut_x < side))[:, None, :]
    out = out.masked_fill_(~(inside & ~cut)[..., None], 0)
    assert out.shape == (len(rows), height, width, channels)
    return out.permute(0, 3, 1, 2)


def _taps(position: Tensor, start: Tensor, length: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Where along one axis the pixel at ``position`` ``(B, size)`` of the result comes from.

    Whether that is inside the image, the indices of the two neighbours, and how far it is from the first to the
    second, in 1/256. The centres of pixels lie at ½, as in ``F.interpolate(align_corners=False)``.
    """
    start, length = start[:, None], length[:, None]
    at = ((2 * position + 1) * (length << 16)) // (2 * size) - (1 << 15)  # in 1/65536 pixels from the box's start
    at = at.minimum((length - 1) << 16).clamp(min=0)
    low = at >> 16
    high = torch.minimum(low + 1, length - 1)
    inside = (start + low >= 0) & (start + low < size)
    return inside, (start + low).clamp(0, size - 1), (start + high).clamp(0, size - 1), (at & 0xFFFF) >> 8
