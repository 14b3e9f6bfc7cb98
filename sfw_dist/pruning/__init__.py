"""One-shot pruning, and what is left after it."""
