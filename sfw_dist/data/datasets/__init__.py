"""The data sets known by name, and the readers of their raw files."""
