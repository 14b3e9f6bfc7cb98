"""Batches out of prepared files."""
