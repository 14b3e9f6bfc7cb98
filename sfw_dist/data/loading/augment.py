"""Crop, resize, flip and cutout of single samples.

An augmentation first chooses parameters, a row of eight integers for each sample (:data:`SampleParams`), with which
the sample is then transformed. The parameters come from a hash of ``(seed, epoch, sample id)``, and the transform is
integer arithmetic, so a sample has the same pixels in every backend, at any number of threads and ranks, and after any
restart.

"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sfw_dist.data.sampler import Ids, counter_hash

SampleParams = NDArray[np.int64]
"""``(n, 8)``: one row for each sample, in the columns named below, in pixels of the stored image."""
Sizes = tuple[int | Ids, int | Ids]
"""Heights and widths of images: the same for all, or ``(n,)`` each."""
TOP, LEFT, HEIGHT, WIDTH = range(4)
"""The box that becomes the new image. It may reach outside, where pixels are 0."""
MIRROR = 4
"""1 to mirror left to right, after the box is cut out."""
CUT_TOP, CUT_LEFT, CUT_SIDE = range(5, 8)
"""The square of the new image that becomes 0; it may reach outside. Its side is 0 for none."""

# The last word of the hash: it makes the parameters of one sample independent of each other.
_TOP, _LEFT, _MIRROR, _CUT_TOP, _CUT_LEFT, _BOXES = range(6)
_TRIES = 10
# Rounded, for the last bit of exp differs between processors.
_ASPECT_RATIOS = np.round(np.exp(np.linspace(np.log(3 / 4), np.log(4 / 3), 1025)), 6)


@dataclass(frozen=True)
class Augmentation:
    """The random augmentation of training samples. Without arguments samples stay as stored.

    Args:
        crop_padding: crop at random from the image with this many pixels of zeros around it.
        flip: mirror half of the samples.
        cutout: side in pixels of a square of zeros, its centre uniform over the image (DeVries and Taylor, arXiv
            1708.04552).
        random_resized_crop: least area, as a fraction of the image, of a random box that is scaled bilinearly to the
            full size; 0 for none. Aspect ratios are 3/4 to 4/3, and ten boxes are tried before the largest one is
            taken (Szegedy et al., arXiv 1409.4842). Excludes ``crop_padding``.
    """

    crop_padding: int = 0
    flip: bool = False
    cutout: int = 0
    random_resized_crop: float = 0.0

    def sample_params(self, ids: Ids, size: Sizes, *, seed: int, epoch: int) -> SampleParams:
        """Choose the parameters of samples in one epoch.

        Args:
            ids: of the samples, ``(n,)``.
            size: height and width of the images.
            seed: of the run.
            epoch: whose parameters are chosen.

        Returns:
            ``(n, 8)``.
        """
        height, width = size

        def below(bound: int | Ids, word: int) -> Ids:
            return _below(bound, counter_hash(seed, epoch, ids, word))

        out = np.zeros((len(ids), 8), np.int64)
        out[:, HEIGHT], out[:, WIDTH] = height, width
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


def _boxes(least: float, ids: Ids, size: Sizes, seed: int, epoch: int) -> tuple[Ids, Ids]:
    """Heights and widths of the random boxes, ``(n,)`` each."""
    height, width = (np.broadcast_to(side, len(ids)).astype(np.int64) for side in size)
    narrowest, widest = _ASPECT_RATIOS[[0, -1]]
    heights = np.minimum(height, np.rint(width / narrowest)).astype(np.int64)
    widths = np.minimum(width, np.rint(height * widest)).astype(np.int64)
    left = np.arange(len(ids))  # samples that have no box yet
    for attempt in range(_TRIES):
        word = _BOXES + 2 * attempt
        fraction = _below(1 << 20, counter_hash(seed, epoch, ids[left], word)) / (1 << 20)
        area = (least + (1 - least) * fraction) * height[left] * width[left]
        ratio = _ASPECT_RATIOS[_below(len(_ASPECT_RATIOS), counter_hash(seed, epoch, ids[left], word + 1))]
        h, w = np.rint(np.sqrt(area / ratio)).astype(np.int64), np.rint(np.sqrt(area * ratio)).astype(np.int64)
        fits = (h >= 1) & (h <= height[left]) & (w >= 1) & (w <= width[left])
        heights[left[fits]], widths[left[fits]] = h[fits], w[fits]
        left = left[~fits]
    return heights, widths


def _below(n: int | Ids, bits: NDArray[np.uint64]) -> Ids:
    """Uniform integers in [0, n) from 64 random bits each; the bias is below n / 2³²."""
    return ((bits >> np.uint64(32)) * np.asarray(n).astype(np.uint64) >> np.uint64(32)).astype(np.int64)


def transform(images: Tensor, ids: Ids, params: SampleParams, size: tuple[int, int] | None = None) -> Tensor:
    """Augment the samples ``images[ids]``; the readable form of :mod:`sfw_dist.data.loading.augment_numba`.

    Args:
        images: uint8 ``(n, H, W, C)`` on any device.
        ids: of the samples, ``(B,)``.
        params: how each is augmented, ``(B, 8)``.
        size: height and width of the result; by default those of ``images``.

    Returns:
        uint8 ``(B, C, *size)`` in channels_last on the same device; the host does not wait for it.

    Example:
        >>> images = torch.arange(6, dtype=torch.uint8).view(1, 2, 3, 1)  # one image of 2 x 3 pixels
        >>> mirrored = np.array([[0, 0, 2, 3, 1, 0, 0, 0]])  # the whole box, mirrored, without cutout
        >>> transform(images, np.array([0]), mirrored)[0, 0].tolist()
        [[2, 1, 0], [5, 4, 3]]
    """
    stored_height, stored_width, channels = images.shape[1:]
    height, width = size or (stored_height, stored_width)
    rows, on_device = (torch.from_numpy(array).to(images.device, non_blocking=True) for array in (ids, params))
    y, x = torch.arange(height, device=images.device), torch.arange(width, device=images.device)  # of the result
    mirrored = torch.where(on_device[:, MIRROR, None] == 1, width - 1 - x, x)  # (B, W)
    top, y_low, y_high, y_part = _taps(
        y.expand(len(rows), -1), on_device[:, TOP], on_device[:, HEIGHT], height, stored_height
    )
    left, x_low, x_high, x_part = _taps(mirrored, on_device[:, LEFT], on_device[:, WIDTH], width, stored_width)

    def pixels(along_y: Tensor, along_x: Tensor) -> Tensor:  # (B, H, W, C)
        return images[rows[:, None, None], along_y[:, :, None], along_x[:, None, :]]

    if (params[:, [HEIGHT, WIDTH]] == (height, width)).all():  # nothing is scaled, both neighbours are the pixel
        out = pixels(y_low, x_low)
    else:
        y_part, x_part = y_part[:, :, None, None], x_part[:, None, :, None]
        above = pixels(y_low, x_low) * (256 - x_part) + pixels(y_low, x_high) * x_part
        below = pixels(y_high, x_low) * (256 - x_part) + pixels(y_high, x_high) * x_part
        out = ((above * (256 - y_part) + below * y_part + (1 << 15)) >> 16).to(torch.uint8)

    inside = top[:, :, None] & left[:, None, :]
    cut_y, cut_x = y - on_device[:, CUT_TOP, None], x - on_device[:, CUT_LEFT, None]
    side = on_device[:, CUT_SIDE, None]
    cut = ((cut_y >= 0) & (cut_y < side))[:, :, None] & ((cut_x >= 0) & (cut_x < side))[:, None, :]
    out = out.masked_fill_(~(inside & ~cut)[..., None], 0)
    assert out.shape == (len(rows), height, width, channels)
    return out.permute(0, 3, 1, 2)


def _taps(
    position: Tensor, start: Tensor, length: Tensor, size: int, stored: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Where the new pixels at ``position`` ``(B, size)`` come from along one axis of ``stored`` pixels.

    The centres of pixels lie at ½, as in ``F.interpolate(align_corners=False)``.

    Returns:
        Whether the source is inside the image, the indices of its two neighbours, and the distance from the first to
        the second in 1/256; all ``(B, size)``.
    """
    start, length = start[:, None], length[:, None]
    at = ((2 * position + 1) * (length << 16)) // (2 * size) - (1 << 15)  # in 1/65536 pixels from the box's start
    at = at.minimum((length - 1) << 16).clamp(min=0)
    low = at >> 16
    high = torch.minimum(low + 1, length - 1)
    inside = (start + low >= 0) & (start + low < stored)
    return inside, (start + low).clamp(0, stored - 1), (start + high).clamp(0, stored - 1), (at & 0xFFFF) >> 8
