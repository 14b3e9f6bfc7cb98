"""Ranks, their replicas and shards."""
