"""Data sets: prepared once on disk (:mod:`~sfw_dist.data.prepare`), then read by every rank (:mod:`~.loading`)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sfw_dist.data.datasets.csv_set import Table
    from sfw_dist.data.options import Options
    from sfw_dist.data.prepare import write

__all__ = ["Options", "Table", "write"]


def __getattr__(name: str) -> Any:
    """Import a public name when it is asked for: the command must begin where what it needs is not installed."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from sfw_dist.errors import needs_extra

    with needs_extra(f"sfw_dist.data.{name}", "train"):
        from sfw_dist.data import options, prepare
        from sfw_dist.data.datasets import csv_set
    return {"Options": options.Options, "Table": csv_set.Table, "write": prepare.write}[name]
