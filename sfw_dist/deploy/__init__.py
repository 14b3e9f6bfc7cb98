"""Deployment: a pruned network as one that is really smaller."""

from sfw_dist.deploy.compacting import Compacted, compact

__all__ = ["Compacted", "compact"]
