"""Data sets: prepared once on disk (:mod:`~sfw_dist.data.prepare`), then read by every rank (:mod:`~.loading`)."""
