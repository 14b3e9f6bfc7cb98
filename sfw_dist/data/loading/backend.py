"""The interface of all backends."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from sfw_dist.data.loading.augment import SampleParams
from sfw_dist.data.sampler import Ids

Batch = tuple[Tensor, Tensor]
"""Images uint8 ``(batch, channels, height, width)`` in channels_last, and labels int64 ``(batch,)``."""


class Backend(Protocol):
    """Fetches samples by id; knows neither ranks nor epochs."""

    threaded: bool
    """Whether worker threads call :meth:`fetch`, several at once, to prefetch; else the calling thread does."""

    def fetch(self, ids: Ids, params: SampleParams) -> Batch:
        """Read and augment samples.

        Args:
            ids: of the samples, ``(batch,)``.
            params: how each is augmented, ``(batch, 8)``; of stored JPEGs ``(batch, 2, 8)``.

        Returns:
            New tensors, which the caller may keep.
        """

    def close(self) -> None:
        """Release everything."""
