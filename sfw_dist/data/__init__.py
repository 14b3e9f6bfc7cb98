"""Data sets: prepared once on disk (:mod:`~sfw_dist.data.prepare`), then read by every rank through a ``Loader``."""

from sfw_dist.data.batch import Normalize
from sfw_dist.data.loader import Batch, DatasetInfo, Loader, Split, dataset_info, open_loader

__all__ = ["Batch", "DatasetInfo", "Loader", "Normalize", "Split", "dataset_info", "open_loader"]
