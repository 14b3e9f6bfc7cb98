"""Data sets: prepared once on disk (:mod:`~sfw_dist.data.prepare`), then read by every rank through a ``Loader``."""

from sfw_dist.data.backend import Batch
from sfw_dist.data.device import Mix, Normalize
from sfw_dist.data.loader import Loader
from sfw_dist.data.opening import DatasetInfo, Split, dataset_info, open_loader, rank_order

__all__ = ["Batch", "DatasetInfo", "Loader", "Mix", "Normalize", "Split", "dataset_info", "open_loader", "rank_order"]
