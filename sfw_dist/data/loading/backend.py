"""What all backends have in common."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from sfw_dist.data.loading.augment import Draws
from sfw_dist.data.sampler import Ids

Batch = tuple[Tensor, Tensor]
"""Images uint8 ``(batch, channels, height, width)`` in channels_last, and labels int64 ``(batch,)``."""


class Backend(Protocol):
    """Fetches samples by id; knows neither ranks nor epochs."""

    threaded: bool
    """Whether threads call :meth:`fetch` ahead of its turn, several at once; else the calling thread does."""

    def fetch(self, ids: Ids, draws: Draws) -> Batch:
        """The samples ``ids``, augmented as drawn. The tensors are new: the caller may keep them."""

    def close(self) -> None:
        """Release everything."""
