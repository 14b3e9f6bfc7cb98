"""What happens to a batch on the device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class Normalize(nn.Module):
    """uint8 ``(B, C, H, W)`` → float32 ``(x / 255 − mean) / std`` per channel, in the memory format of ``x``.

    ``mean`` and ``std`` are in units of [0, 1], as in :class:`sfw_dist.data.DatasetInfo`. The module has no state to
    save: move it with ``.to(device)`` and call it on each batch.
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        mean64, std64 = (torch.tensor(value, dtype=torch.float64).view(-1, 1, 1) for value in (mean, std))
        self.register_buffer("scale", (1 / (255 * std64)).float(), persistent=False)
        self.register_buffer("shift", (-mean64 / std64).float(), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        return images * self.scale + self.shift
