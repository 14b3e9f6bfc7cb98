"""Batches from a prepared data set: what training and evaluation import."""

from sfw_dist.data.loading.backend import Batch
from sfw_dist.data.loading.batch_transforms import MixUpCutMix, Normalize
from sfw_dist.data.loading.build_loader import DatasetInfo, Split, dataset_info, open_loader, rank_sampler
from sfw_dist.data.loading.loader import Loader

__all__ = [
    "Batch",
    "DatasetInfo",
    "Loader",
    "MixUpCutMix",
    "Normalize",
    "Split",
    "dataset_info",
    "open_loader",
    "rank_sampler",
]
