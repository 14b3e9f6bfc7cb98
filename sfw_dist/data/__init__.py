"""Data sets: prepared once on disk (:mod:`~sfw_dist.data.prepare`), then read by every rank (:mod:`~.loading`)."""

from sfw_dist.data.datasets.csv_set import Table
from sfw_dist.data.prepare import write
from sfw_dist.data.write_parts import Options

__all__ = ["Options", "Table", "write"]
