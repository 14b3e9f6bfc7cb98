"""Data sets: prepared once on disk (:mod:`~sfw_dist.data.prepare`), then read by every rank through a ``Loader``."""

from sfw_dist.data.loading.backend import Batch
from sfw_dist.data.loading.batch_transforms import Mix, Normalize
from sfw_dist.data.loading.build_loader import DatasetInfo, Split, dataset_info, open_loader, rank_order
from sfw_dist.data.loading.loader import Loader

__all__ = ["Batch", "DatasetInfo", "Loader", "Mix", "Normalize", "Split", "dataset_info", "open_loader", "rank_order"]
