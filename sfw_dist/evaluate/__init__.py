"""Finished runs, pruned and measured: at many sparsities, or at the highest one within an accuracy budget."""
