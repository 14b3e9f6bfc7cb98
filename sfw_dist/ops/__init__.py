"""Exact sums and selections, on one rank and over shards."""
