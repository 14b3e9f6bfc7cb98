"""Transforms of a whole batch on the device: normalisation, mixup, cutmix, label smoothing."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sfw_dist.data.sampler import counter_hash


class Normalize(nn.Module):
    """Normalises images: uint8 ``(B, C, H, W)`` → float32 ``(x / 255 − mean) / std`` per channel, in channels_last.

    The module has no state to save: move it with ``.to(device)`` and call it on each batch.

    Args:
        mean: per channel, in units of [0, 1], as in :class:`sfw_dist.data.loading.DatasetInfo`.
        std: likewise.
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        mean64, std64 = (torch.tensor(value, dtype=torch.float64) for value in (mean, std))
        self.register_buffer("scale", (1 / (255 * std64)).float(), persistent=False)
        self.register_buffer("shift", (-mean64 / std64).float(), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        batch, channels, height, width = images.shape
        # Over whole images at a time: along three channels no vector instruction would find work.
        rows = images.permute(0, 2, 3, 1).reshape(batch, -1)  # (B, H·W·C)
        scale, shift = self.scale.repeat(height * width), self.shift.repeat(height * width)
        # In place: fresh memory costs more than the arithmetic.
        return rows.float().mul_(scale).add_(shift).view(batch, height, width, channels).permute(0, 3, 1, 2)


class MixUpCutMix:
    """Mixup, cutmix and label smoothing of a training batch (Zhang et al., arXiv 1710.09412; Yun et al., 1905.04899).

    An image is mixed with the one at the mirrored place of the rank's batch, which was shuffled: unlike everything
    else about data, that partner depends on the number of ranks. The part λ that an image keeps, and cutmix's box,
    depend on ``(seed, step)`` alone.

    Args:
        classes: number of classes.
        mixup: α of the distribution Beta(α, α) of λ; 0 for none. With ``cutmix`` too, each takes half of the steps.
        cutmix: likewise.
        label_smoothing: part of each label that is spread over all classes, in [0, 1).
        seed: of the run.
    """

    def __init__(self, classes: int, *, mixup: float, cutmix: float, label_smoothing: float, seed: int) -> None:
        self._classes, self._mixup, self._cutmix = classes, mixup, cutmix
        self._smoothing, self._seed = label_smoothing, seed

    def __call__(self, images: Tensor, labels: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """Mix a batch.

        Args:
            images: normalised, ``(B, C, H, W)``.
            labels: int64 ``(B,)``.
            step: the number of the training step.

        Returns:
            The images, and the targets: ``labels`` themselves when everything is off, else float32 ``(B, classes)``.
        """
        if not (self._mixup or self._cutmix or self._smoothing):
            return images, labels
        targets = F.one_hot(labels, self._classes).float()
        if self._smoothing:
            targets = targets * (1 - self._smoothing) + self._smoothing / self._classes
        if not (self._mixup or self._cutmix):
            return images, targets
        generator = np.random.default_rng(int(counter_hash(self._seed, step)[0]))
        cut = self._cutmix > 0 and (self._mixup == 0 or bool(generator.random() < 0.5))
        alpha = self._cutmix if cut else self._mixup
        kept = generator.beta(alpha, alpha)
        if cut:
            height, width = images.shape[-2:]
            top, bottom, left, right = _box(height, width, 1 - kept, generator)
            images = images.clone()
            images[..., top:bottom, left:right] = images.flip(0)[..., top:bottom, left:right]
            kept = 1 - (bottom - top) * (right - left) / (height * width)
        else:
            images = images * kept + images.flip(0) * (1 - kept)
        return images, targets * kept + targets.flip(0) * (1 - kept)


def _box(height: int, width: int, area: float, generator: np.random.Generator) -> tuple[int, int, int, int]:
    """``(top, bottom, left, right)`` of a clipped box with this part of the area, its centre uniform over the image."""
    y, x = int(generator.integers(height)), int(generator.integers(width))
    half_height, half_width = (int(side * area**0.5) // 2 for side in (height, width))
    return (
        max(y - half_height, 0),
        min(y + half_height, height),
        max(x - half_width, 0),
        min(x + half_width, width),
    )
