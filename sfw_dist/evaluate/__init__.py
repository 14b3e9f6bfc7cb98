"""Pruning and measuring a trained run."""
